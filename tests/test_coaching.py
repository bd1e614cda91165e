"""`opcd.coaching`: a sample's lesson comes from its own response, and only the teacher has it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from learners import Learner
from opcd import assembly, coaching
from opcd.assembly import Parts, assemble
from opcd.coaching import coach_rollouts, count_empty, feedback_of
from opcd.config import Run, load_config
from opcd.config.inputs import Coach
from opcd.config.training import Loss
from opcd.contexts import lessons_context
from opcd.drawing import roll_out
from opcd.errors import ConfigError, ContextError
from opcd.evaluation import evaluate, validate
from opcd.extraction import Request, Written
from opcd.programs import context_for, evaluate_run
from opcd.responses import respond, rows_of, score
from opcd.runs import RunFolder, read_jsonl
from opcd.training import train
from opcd.types import Task
from tiny import make_game_run, make_run
from worlds import write_jsonl

COACH = ("context={type='coach'}", "anchor.share=0.25", "steps=2", "evaluation.every_steps=2")


class Scribe:
    """A coach that writes what it is told to, and keeps what it was shown."""

    name = "scribe"

    def __init__(self, answer: str) -> None:
        """A `#` in the answer becomes the request's number."""
        self.answer = answer
        self.shown: list[Request] = []

    def write(self, requests: Any) -> list[Written]:
        self.shown += requests
        return [Written(self.answer.replace("#", str(number))) for number in range(len(requests))]


def parts_with(
    tmp_path: Path, model: Path, *overrides: str, answer: str = "- EXPERIENCE ITEM: try #"
) -> tuple[Parts, Scribe]:
    parts, scribe = assemble(make_run(tmp_path, model, *COACH, *overrides)), Scribe(answer)
    parts.coach = scribe
    return parts, scribe


def test_the_teacher_sees_the_lesson_of_this_very_response(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """And nothing else changes: the student's prompt, the response, the anchors."""
    parts, scribe = parts_with(tmp_path, tiny_model_path)
    plain = roll_out(parts, 0)
    coached = coach_rollouts(parts, plain, 0).answered
    tasks = {item.task.id: item.task for item in parts.items["train"]}
    assert isinstance(parts.config.context, Coach)
    own = [n for n, a in enumerate(plain.answered) if a.pair.origin == "task"]
    assert len(own) == len(scribe.shown) == 3
    for number, n in enumerate(own):
        before, after, request = plain.answered[n], coached[n], scribe.shown[number]
        assert after.rollout is before.rollout
        assert after.pair.student_ids == before.pair.student_ids == before.pair.teacher_ids
        context = lessons_context(parts.config.context.lessons, f"- try {number}\n")
        wanted = parts.renderer.pair(tasks[before.pair.task_id], context).teacher_ids
        assert after.pair.teacher_ids == wanted != after.pair.student_ids
        asked = request.messages[-1].content
        assert tasks[before.pair.task_id].messages[-1].content in asked
        assert parts.renderer.decode(before.rollout.response_ids) in asked
    rest = set(range(len(coached))) - set(own)
    assert rest and all(coached[n] is plain.answered[n] for n in rest)
    assert len({request.id for request in scribe.shown}) == 3, "one task may be drawn twice"


@pytest.mark.parametrize(
    ("answer", "lesson"),
    [
        ("- EXPERIENCE ITEM: a\n- EXPERIENCE ITEM: b", "- a\n- b\n"),
        ("<think>- EXPERIENCE ITEM: no</think>\n- EXPERIENCE ITEM: yes", "- yes\n"),
        ("Well done!", ""),
        ("- EXPERIENCE ITEM:", ""),
        ("", ""),
    ],
)
def test_only_marked_lines_are_lessons(
    answer: str, lesson: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    """Whatever else a coach says is no lesson, and no crash."""
    parts, _ = parts_with(tmp_path, tiny_model_path, answer=answer)
    answered = coach_rollouts(parts, roll_out(parts, 0), 0).answered
    assert count_empty(answered) == (0 if lesson else 3)
    assert isinstance(parts.config.context, Coach)
    context = lessons_context(parts.config.context.lessons, lesson)
    for given in (a for a in answered if a.pair.origin == "task"):
        task = next(i.task for i in parts.items["train"] if i.task.id == given.pair.task_id)
        assert given.pair.teacher_ids == parts.renderer.pair(task, context).teacher_ids


def test_without_a_lesson_the_sample_holds_the_student_to_its_base(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """A fresh adapter is the base, so that there is nothing to pull at; with a lesson there is."""
    found: list[float] = []
    for answer in ("nothing", "- EXPERIENCE ITEM: say it in verse"):
        parts, _ = parts_with(tmp_path, tiny_model_path, answer=answer)
        answered = coach_rollouts(parts, roll_out(parts, 0), 0).answered
        tasks = [a for a in answered if a.pair.origin == "task"]
        with torch.no_grad():
            nats = [s.kl_T.abs().max().item() for _, s in score(parts, tasks, Loss())]
        found.append(max(nats))
    assert found[0] < 1e-6 and found[1] > 0.01


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("none", "judge for yourself"),
        ("outcome", "The answer is wrong."),
        ("answer", "The answer is wrong. The right answer is: kettle"),
        ("rubric", "A good answer is to be like this: short and kind"),
    ],
)
def test_the_coach_is_told_what_the_run_says(
    kind: str, told: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    """With `outcome` the right answer stays unknown: the lesson could give it away."""
    parts, _ = parts_with(tmp_path, tiny_model_path)
    config = Coach.model_validate({"feedback": kind})
    task = Task("t", (), answer="kettle", context="short and kind")
    text = feedback_of(parts, config, coaching.Seen(task, "?", "a pot"))
    assert told in text and (kind == "answer") == ("kettle" in text)
    right = feedback_of(parts, config, coaching.Seen(task, "?", "a kettle"))
    assert ("right" in right) == (kind in ("outcome", "answer"))


def test_measured_the_base_answers_the_coach_writes_and_the_base_answers_again(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """The lesson is on the base's answer, the same for every condition, and written once."""
    parts, scribe = parts_with(tmp_path, tiny_model_path)
    plain = parts.items["test"]
    first = respond(parts, plain, "base")
    items = rows_of(parts, "test", None)
    assert [r.text in s.messages[-1].content for r, s in zip(first, scribe.shown, strict=True)]
    assert [item.task for item in items] == [item.task for item in plain]
    assert all(item.pair.teacher_ids != item.pair.student_ids for item in items)
    again = respond(parts, items, "in_context")
    assert [a.pair for r in again for a in r.turns] == [item.pair for item in items]
    assert rows_of(parts, "test", 2) == items[:2] and len(scribe.shown) == len(items)
    assert parts.items["test"] == plain, "training rows and others stay bare"
    assert parts.context_tokens > 0


def test_validation_and_evaluation_know_the_lessons(tiny_model_path: Path, tmp_path: Path) -> None:
    """KL is to the teacher with the lesson: a fresh student is its base, and so not at 0."""
    parts, _ = parts_with(tmp_path, tiny_model_path, "evaluation.suites=['kept', 'leak', 'spill']")
    assert validate(parts, 0)["kl_nats_per_token"] > 0.01
    found = evaluate(parts, "test", "step-0").summary
    assert set(found["suites"]["task"]) == {"base", "in_context", "baked"}
    assert found["suites"]["task"]["baked"]["kl_nats_per_token"]["mean"] > 0.01
    assert found["context_tokens"] > 0
    assert found["suites"]["leak"] == {}, "there is no one context that could leak"


def test_a_whole_run_counts_what_the_coach_left_empty(
    learner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, measured and resumable like any other; the coach is the base model itself."""

    class Terse(Learner):
        def script(self, policy: Any, prompt: Any) -> tuple[int, ...]:
            answer = super().script(policy, prompt)
            silent = prompt.task_id.startswith("step-") and "/0/" in prompt.task_id
            return answer[-1:] if silent else answer

    monkeypatch.setattr(assembly, "HFEngine", Terse)
    run = make_run(tmp_path, learner_path, *COACH)
    outcome = train(run)
    rows = list(read_jsonl(outcome.folder.metrics))
    assert [row["coach_empty"] for row in rows] == [1, 1], "the first of three, in each step"
    assert rows[0]["kl_nats_per_token"] > 0.01
    found = evaluate_run(outcome.folder.path).summary["suites"]["task"]
    assert found["in_context"]["correct"]["mean"] == 0.25, "one lesson, one row of four"
    assert found["base"]["correct"]["mean"] == 0.0
    with pytest.raises(ContextError, match="every row of this run has a context of its own"):
        context_for(outcome.parts, Task("sample", ()))


def test_other_runs_have_no_coach_and_no_count_of_it(tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, "steps=1")
    parts = assemble(run)
    plain = roll_out(parts, 0)
    assert coach_rollouts(parts, plain, 0) is plain and parts.coach is None
    train(run)
    assert all(
        "coach_empty" not in row for row in read_jsonl(RunFolder(run.out / run.name).metrics)
    )


def test_every_turn_of_a_game_has_a_lesson_of_its_own(player_path: Path, tmp_path: Path) -> None:
    """Written from what happened up to that turn, and from what the game said at the end."""
    run = make_game_run(tmp_path, player_path, "context={type='coach'}", "anchor.share=0.0")
    parts, scribe = assemble(run), Scribe("- EXPERIENCE ITEM: try #")
    parts.coach = scribe
    plain = roll_out(parts, 0)
    answered = coach_rollouts(parts, plain, 0).answered
    turns = [turn for episode in plain.played.episodes for turn in episode.turns]
    assert len(scribe.shown) == len(turns) == len(answered) > len(plain.played.episodes)
    assert count_empty(answered) == 0
    said = [e.feedback for e in plain.played.episodes for _ in e.turns]
    for turn, request, feedback in zip(turns, scribe.shown, said, strict=True):
        assert turn.task.messages[-1].content in request.messages[-1].content
        assert feedback in request.messages[-1].content
    items = rows_of(parts, "test", 1)
    assert not items[0].context.is_empty and items[0].game is not None
    first = respond(parts, items, "in_context")[0].turns[0].pair
    assert first.teacher_ids == items[0].pair.teacher_ids != first.student_ids


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.teacher_fraction=0.5", "nobody could answer with it before"),
        ("anchor.context_return=0.25", "nobody could answer with it before"),
        ("context={type='coach', template='{experience}'}", "template lacks {prompt}"),
        ("context={type='coach', feedback='praise'}", "Input should be 'none', 'outcome'"),
    ],
)
def test_what_does_not_fit_a_coach_is_refused(
    override: str, message: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_run(tmp_path, tiny_model_path, *COACH, override)
    assert message in str(refused.value)


def test_a_coach_without_a_checker_cannot_tell_right_from_wrong(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    make_run(tmp_path, tiny_model_path)
    toml = tmp_path / "recipe" / "run.toml"
    lines = [line for line in toml.read_text("utf-8").splitlines() if "grader" not in line]
    toml.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"feedback = .outcome. but there is no \[grader\]"):
        load_config(toml, COACH)
    assert isinstance(load_config(toml, ["context={type='coach', feedback='none'}"]), Run)


def test_a_rubric_is_in_the_rows(tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, *COACH, "context={type='coach', feedback='rubric'}")
    with pytest.raises(ContextError, match=r"context.feedback = 'rubric' takes what the coach"):
        assemble(run)
    for split in ("train", "validation", "test"):
        rows = [
            {"prompt": f"{split} {i}?", "answer": "a", "context": f"kind {i}"} for i in range(4)
        ]
        write_jsonl(tmp_path / "recipe" / f"{split}.jsonl", rows)
    parts, scribe = assemble(run), Scribe("")
    parts.coach = scribe
    coach_rollouts(parts, roll_out(parts, 0), 0)
    assert all("to be like this: kind" in r.messages[-1].content for r in scribe.shown)


def test_the_coach_is_loaded_once(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model on this machine is not read anew in every step."""
    built: list[str] = []

    def build(parts: Parts, experience: Any) -> Scribe:
        del parts
        built.append(experience.extractor.path)
        return Scribe("- EXPERIENCE ITEM: x")

    monkeypatch.setattr(coaching, "build_extractor", build)
    local = f"context={{type='coach', coach={{type='local', path={str(tiny_model_path)!r}}}}}"
    parts = assemble(make_run(tmp_path, tiny_model_path, *COACH, local, "steps=3"))
    for step in range(3):
        coach_rollouts(parts, roll_out(parts, step), step)
    rows_of(replace(parts), "test", None)
    assert built == [str(tiny_model_path)]
