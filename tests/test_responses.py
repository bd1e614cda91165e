"""`opcd.responses`: the right weights see the right prompt, and every token is scored once."""

from pathlib import Path
from typing import Any

import pytest

from opcd.assembly import assemble
from opcd.config.training import Loss
from opcd.responses import ASKED, ask, respond, score, teacher_margins
from tiny import log_probs_of, make_run, parts_of


def test_conditions_ask_the_right_weights_with_the_right_prompt(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    scripted = parts_of(make_run(tmp_path, tiny_model_path))
    seen: list[tuple[str, tuple[int, ...]]] = []

    def script(policy: str, prompt: Any) -> tuple[int, ...]:
        seen.append((policy, prompt.ids))
        return (7, 2)

    scripted.engine.script = script  # type: ignore[attr-defined]
    item = scripted.items["test"][0]
    for condition in ASKED:
        respond(scripted, [item], condition)
    pair = item.pair
    assert seen == [
        ("base", pair.student_ids),
        ("base", pair.teacher_ids),
        ("student", pair.student_ids),
        ("student", pair.teacher_ids),
    ]


def test_answers_are_drawn_as_the_evaluation_says(tiny_model_path: Path, tmp_path: Path) -> None:
    """Of one token, or of one token's mass, a warm draw is greedy; rollouts have their own."""

    def texts(*overrides: str) -> list[str]:
        parts = assemble(make_run(tmp_path, tiny_model_path, *overrides))
        return [r.text for r in respond(parts, parts.items["train"], "base")]

    greedy, warm = texts(), texts("evaluation.temperature=1.0")
    assert warm != greedy
    assert texts("evaluation.temperature=1.0", "evaluation.top_k=1") == greedy
    assert texts("evaluation.temperature=1.0", "evaluation.top_p=1e-9") == greedy
    assert texts("evaluation.temperature=1.0", "rollout.top_p=1e-9") == warm


def test_scoring_goes_portion_by_portion_through_everything(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Every response is scored once, with as many values as it has tokens, without gradient."""
    parts = assemble(make_run(tmp_path, tiny_model_path))
    pairs = [item.pair for item in parts.items["train"]]
    answered = ask(parts, pairs, "base")
    seen = []
    for portion, stats in score(parts, answered, Loss()):
        assert len(portion) <= parts.config.batch.rows_per_forward
        assert len(stats.kl_T) == sum(len(a.rollout.response_ids) for a in portion)
        assert not stats.divergence_T.requires_grad
        seen += [a.pair.task_id for a in portion]
    assert sorted(seen) == sorted(pair.task_id for pair in pairs)


def test_margins_are_of_the_teachers_two_likeliest_tokens(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Along its own greedy answers: the first of the two is the token that was chosen."""
    parts = assemble(make_run(tmp_path, tiny_model_path))
    answered = ask(parts, [item.pair for item in parts.items["test"]], "in_context")
    found = list(teacher_margins(parts, answered))
    assert {a.pair.task_id for a, _ in found} == {a.pair.task_id for a in answered}
    for given, margins in found:
        ids = given.rollout.response_ids
        log_probs_TV = log_probs_of(parts.base.model, given.pair.teacher_ids, ids)
        first_two = log_probs_TV.topk(2)
        assert first_two.indices[:, 0].tolist() == list(ids)
        wanted = (first_two.values[:, 0] - first_two.values[:, 1]).tolist()
        assert margins == pytest.approx(wanted, abs=1e-3)


def test_an_answer_may_be_longer_where_a_suite_says_so(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    parts = assemble(make_run(tmp_path, tiny_model_path))
    pairs = [item.pair for item in parts.items["test"]]
    assert max(len(a.rollout.response_ids) for a in ask(parts, pairs, "base")) <= 5
    longer = ask(parts, pairs, "base", max_new_tokens=9)
    assert max(len(a.rollout.response_ids) for a in longer) > 5
