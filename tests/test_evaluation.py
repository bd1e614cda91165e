"""`opcd.evaluation`: the contract of evaluation.json, and what its numbers mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.adapters import adapter_off
from opcd.assembly import Parts, assemble
from opcd.errors import TaskError
from opcd.evaluation import (
    CONDITIONS,
    Evaluation,
    evaluate,
    paired_tests,
    task_suite,
    token_kl,
    validate,
)
from opcd.intervals import mcnemar
from opcd.programs import evaluate_outcome, evaluate_run, sample_run
from opcd.responses import Response, respond
from opcd.training import train
from opcd.types import Answered, PromptPair, Rollout, Score, Task
from tiny import acting, log_probs_of, make_game_run, make_run, nudge, parts_of, reverse_kl


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Parts:
    """An untrained student with the real engine."""
    return assemble(make_run(tmp_path_factory.mktemp("untrained"), tiny_model_path))


@pytest.fixture(scope="module")
def untrained(parts: Parts) -> Evaluation:
    return evaluate(parts, "test", "step-0")


def leaves(suites: dict[str, Any]) -> list[dict[str, Any]]:
    return [m for suite in suites.values() for c in suite.values() for m in c.values()]


def test_evaluation_json_is_as_the_design_says(untrained: Evaluation) -> None:
    summary = json.loads(json.dumps(untrained.summary))
    assert {"suites", "paired", "split", "checkpoint", "context_tokens"} <= summary.keys()
    assert summary["split"] == "test" and summary["checkpoint"] == "step-0"
    assert set(summary["suites"]) == {"task", "kept"}
    assert tuple(summary["suites"]["task"]) == CONDITIONS == ("base", "in_context", "baked")
    for metrics in summary["suites"]["task"].values():
        assert {"valid", "correct", "agreement"} <= metrics.keys()
    found = summary["suites"]["kept"]["baked"].keys()
    assert {"kl_nats_per_token", "greedy_agreement", "length_ratio"} == found
    for metric in leaves(summary["suites"]):
        assert metric.keys() == {"mean", "ci95", "n"}
        low, high = metric["ci95"]
        assert low - 1e-9 <= metric["mean"] <= high + 1e-9 and metric["n"] > 0


def test_the_context_is_counted_in_tokens(parts: Parts, untrained: Evaluation) -> None:
    pairs = [item.pair for items in parts.items.values() for item in items]
    extra = {len(pair.teacher_ids) - len(pair.student_ids) for pair in pairs}
    assert len(extra) == 1, "one system prompt for all"
    assert untrained.summary["context_tokens"] == extra.pop() > 10


def test_an_untrained_student_has_lost_nothing(untrained: Evaluation) -> None:
    kept = untrained.summary["suites"]["kept"]["baked"]
    assert abs(kept["kl_nats_per_token"]["mean"]) < 1e-5
    assert kept["greedy_agreement"]["mean"] == 1.0
    assert kept["kl_nats_per_token"]["n"] == 3
    for row in untrained.answers:
        assert row["base"] == row["baked"]


def test_agreement_is_with_in_context_on_the_whole_answer(untrained: Evaluation) -> None:
    task = untrained.summary["suites"]["task"]
    assert task["in_context"]["agreement"]["mean"] == 1.0
    same = [row["baked"]["text"] == row["in_context"]["text"] for row in untrained.answers]
    assert task["baked"]["agreement"]["mean"] == sum(same) / 4 < 1.0


def test_answers_are_rows_for_people(untrained: Evaluation) -> None:
    assert [row["prompt"] for row in untrained.answers] == [f"test {i}?" for i in range(4)]
    for row in untrained.answers:
        assert row["answer"] == "a"
        for condition in CONDITIONS:
            assert {"text", "note", "valid", "correct"} <= row[condition].keys()


def test_tokens_show_what_the_context_changes_and_what_is_left_of_it(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """KL(with || without the context) of base and baked, against transformers alone."""
    parts = assemble(make_run(tmp_path, tiny_model_path))
    nudge(parts.student, size=0.1)
    parts.student.eval()
    items = parts.items["test"]
    responses = respond(parts, items, "in_context")
    with torch.no_grad():
        for given, row in zip(responses, token_kl(parts, items, responses), strict=True):
            pair, ids = given.answered.pair, given.answered.rollout.response_ids
            baked_TV = log_probs_of(parts.student, pair.student_ids, ids)
            with adapter_off(parts.student):
                base_TV = log_probs_of(parts.student, pair.student_ids, ids)
                teacher_TV = log_probs_of(parts.student, pair.teacher_ids, ids)
            assert row["prompt"].startswith("test ") and row["id"] == pair.task_id
            assert len(row["tokens"]) == len(ids)
            assert row["base_kl_nats"] == pytest.approx(
                reverse_kl(teacher_TV, base_TV).tolist(), rel=1e-3, abs=1e-5
            )
            assert row["baked_kl_nats"] == pytest.approx(
                reverse_kl(teacher_TV, baked_TV).tolist(), rel=1e-3, abs=1e-5
            )


def test_validation_is_on_validation_rows_without_the_context(parts: Parts) -> None:
    found = validate(parts, 0)
    assert found.keys() == {"step", "rows", "valid", "correct", "kl_nats_per_token"}
    assert found["step"] == 0 and found["kl_nats_per_token"] > 0.05


@pytest.fixture(scope="module")
def player(tmp_path_factory: pytest.TempPathFactory, player_path: Path) -> Parts:
    """A game whose player goes down, down, right, right."""
    keys = ("rollout.max_new_tokens=30", 'evaluation.suites=["context_return"]')
    parts = assemble(make_game_run(tmp_path_factory.mktemp("game"), player_path, *keys))
    way = ["[down]", "[down]", "[right]", "[right]"]
    parts.engine = acting(parts.renderer, lambda _, number: way[number - 1])
    return parts


def test_a_game_is_evaluated_by_board(player: Parts) -> None:
    """What is solved is right; lengths are those of a reply, not of an episode."""
    found = evaluate(player, "train", "step-0")
    json.dumps(found.summary)
    responses = respond(player, player.items["train"], "in_context")
    solved = [r.score.metrics["correct"] for r in responses]
    assert 0 < sum(solved) < len(solved), "boards of both kinds"
    for metrics in found.summary["suites"]["task"].values():
        assert metrics["correct"]["mean"] == pytest.approx(sum(solved) / len(solved))
        assert metrics["turns"]["mean"] == sum(len(r.turns) for r in responses) / len(solved)
        assert metrics["invalid_moves"]["mean"] == metrics["truncated"]["mean"] == 0.0
        assert metrics["agreement"]["mean"] == 1.0
        lengths = [
            sum(len(t.rollout.response_ids) for t in r.turns) / len(r.turns) for r in responses
        ]
        assert metrics["response_tokens"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert {t["p"] for t in found.summary["paired"]} == {1.0} and found.summary["paired"]
    returned = found.summary["suites"]["context_return"]["baked"]
    assert returned["correct"]["mean"] == pytest.approx(sum(solved) / len(solved))
    for row, item, r in zip(found.answers, player.items["train"], responses, strict=True):
        assert (row["id"], row["answer"]) == (item.task.id, None)
        assert row["prompt"] == item.task.messages[0].content
        for condition in CONDITIONS:
            shown = row[condition]
            assert (shown["text"], shown["note"]) == (r.text, r.score.note)
            assert (shown["feedback"], shown["turns"]) == (r.feedback, len(r.turns))


def test_tokens_of_a_game_are_those_of_its_first_turn(player: Parts) -> None:
    items = player.items["train"]
    responses = respond(player, items, "in_context")
    for row, item, r in zip(token_kl(player, items, responses), items, responses, strict=True):
        assert row["prompt"] == item.task.messages[0].content
        assert len(row["tokens"]) == len(r.turns[0].rollout.response_ids)
        assert "".join(row["tokens"]).startswith("[down]")


def test_validation_of_a_game_is_over_all_of_its_turns(player: Parts) -> None:
    """The KL is that of every reply, by token; what is solved, by board."""
    found = validate(player, 0)
    names = {"correct", "turns", "invalid_moves", "kl_nats_per_token"}
    assert found.keys() == {"step", "rows"} | names and found["rows"] == 2
    responses = respond(player, player.items["validation"], "baked")
    kl_nats: list[float] = []
    with torch.no_grad():
        for a in (turn for r in responses for turn in r.turns):
            sides = (a.pair.student_ids, a.pair.teacher_ids)
            both = [log_probs_of(player.base.model, s, a.rollout.response_ids) for s in sides]
            kl_nats += reverse_kl(*both).tolist()
    mean = sum(kl_nats) / len(kl_nats)
    assert found["kl_nats_per_token"] == pytest.approx(mean, rel=1e-3)


def test_a_split_that_is_not_there_names_the_others(parts: Parts) -> None:
    with pytest.raises(TaskError, match=r"no dev split, only \['test', 'train', 'validation'\]"):
        evaluate(parts, "dev", "step-0")


PAIR = PromptPair("x", (1,), (1,))


def response(text: str, **metrics: float) -> Response:
    return Response((Answered(PAIR, Rollout("x", (7,), True)),), text, Score(metrics))


def test_paired_tests_compare_the_same_rows() -> None:
    marks = {"base": [0, 0, 0, 0, 1], "in_context": [1, 1, 1, 1, 1], "baked": [1, 1, 1, 0, 1]}
    rows = {c: [response("x", correct=float(m)) for m in ms] for c, ms in marks.items()}
    tests = {(t["first"], t["second"]): t for t in paired_tests(rows)}
    assert set(tests) == {("baked", "in_context"), ("baked", "base"), ("in_context", "base")}
    assert tests["baked", "in_context"]["difference"] == pytest.approx(-0.2)
    assert tests["in_context", "base"]["difference"] == pytest.approx(0.8)
    assert tests["in_context", "base"]["p"] == mcnemar([1] * 5, [0, 0, 0, 0, 1]) == 0.125
    assert tests["baked", "in_context"]["p"] == 1.0


def test_a_metric_of_one_class_is_the_mean_over_its_rows() -> None:
    """Over all rows, a model that flags everything would look better the fewer rows are harmless.

    The first row has none of the second's metrics, and must not decide which are reported.
    """
    marks: list[dict[str, float]] = [
        {"correct": 1.0, "correct_yes": 1.0},
        {"correct": 0.0, "correct_no": 0.0},
        {"correct": 1.0, "correct_yes": 1.0},
        {"correct": 1.0, "correct_no": 1.0},
        {"correct": 1.0, "correct_yes": 1.0},
    ]
    rows = [response("x", **mark) for mark in marks]
    suite = task_suite(dict.fromkeys(CONDITIONS, rows), {})
    assert {
        (m, suite["baked"][m]["mean"], suite["baked"][m]["n"]) for m in marks[0] | marks[1]
    } == {
        ("correct", 0.8, 5),
        ("correct_yes", 1.0, 3),
        ("correct_no", 0.5, 2),
    }


def test_validation_counts_the_rows_of_a_class(tiny_model_path: Path, tmp_path: Path) -> None:
    """`rows_METRIC` says what its mean is of; a metric that all rows have needs no count."""
    scripted = parts_of(make_run(tmp_path, tiny_model_path))

    def grade(task: Task, text: str) -> Score:
        own = {"correct_no": 1.0} if task.id.endswith("0") else {"correct_yes": 0.0}
        return Score({"valid": 1.0, **own})

    scripted.grader = grade
    found = validate(scripted, 0)
    assert (found["rows"], found["rows_correct_no"], found["rows_correct_yes"]) == (3, 1, 2)
    assert (found["correct_no"], found["correct_yes"], found["valid"]) == (1.0, 0.0, 1.0)
    assert "rows_valid" not in found


def test_without_a_grader_there_is_agreement_but_no_paired_test() -> None:
    texts = {"base": "ab", "in_context": "aa", "baked": "aa"}
    rows = {c: [response(t) for t in texts[c]] for c in CONDITIONS}
    suite = task_suite(rows, {})
    assert suite["base"]["agreement"]["mean"] == 0.5
    assert suite["baked"]["agreement"]["mean"] == 1.0
    assert "correct" not in suite["baked"]
    assert paired_tests(rows) == []


def test_a_run_is_evaluated_with_its_best_weights(tiny_model_path: Path, tmp_path: Path) -> None:
    """evaluation.json and answers.jsonl are written; a second time replaces them."""
    run = make_run(tmp_path, tiny_model_path, "optimizer.lr=0.02", "optimizer.warmup_steps=0")
    outcome = train(run)
    folder = outcome.folder
    found = evaluate_run(folder.path)
    assert json.loads(folder.evaluation.read_text("utf-8")) == found.summary
    assert found.summary["checkpoint"] == f"step-{outcome.best['step']}"
    assert found.summary["suites"]["kept"]["baked"]["kl_nats_per_token"]["mean"] > 1e-4
    nudge(outcome.parts.student)
    assert evaluate_outcome(outcome).summary == found.summary, "not the last weights: the best"
    lines = folder.answers.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found.answers
    texts = sample_run(folder.path, "test 0?")
    assert texts == {c: found.answers[0][c]["text"] for c in CONDITIONS}
