"""Traces: on which problems, by whom, how they are drawn, and what is said of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from learning import GAME, TOML, asked_of, learner, load_learner
from opcd.assembly import assemble
from opcd.gathering import Gathering
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.scripted import ScriptedEngine
from opcd.solving import feedback_on, places, solve
from opcd.traces import Trace, read_traces
from opcd.types import Message, Rollout, Task
from worlds import END_ID


def made(round_: Gathering) -> list[list[Trace]]:
    return solve(round_.parts, round_.experience, round_.store, round_.number)


def order(round_: Gathering, number: int = 1) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for place, item in places(round_.parts, round_.experience, number):
        found.setdefault(place.seed, []).append(item.task.id)
    return list(found.values())


def test_problems_come_again_only_when_all_have_been(tiny_model_path: Path, tmp_path: Path) -> None:
    """And in another order for each accumulation, and in the next round."""
    run = load_learner(tmp_path, tiny_model_path, "experience.steps=10", "experience.seeds=4")
    round_ = learner(run)
    for problems in (orders := order(round_)):
        assert len(set(problems[:4])) == len(set(problems[4:8])) == 4
    assert len({tuple(problems) for problems in orders}) == 4
    assert order(round_) == orders != order(round_, number=2)


def test_more_steps_only_add_problems(tiny_model_path: Path, tmp_path: Path) -> None:
    """So that an accumulation can be made longer without being made anew."""
    short = order(learner(load_learner(tmp_path, tiny_model_path, "experience.steps=3")))
    long = order(learner(load_learner(tmp_path, tiny_model_path, "experience.steps=9")))
    assert [problems[:3] for problems in long] == short


def test_traces_hold_all_that_is_known(tiny_model_path: Path, tmp_path: Path) -> None:
    round_ = learner(load_learner(tmp_path, tiny_model_path))
    (first, second, third), _ = made(round_)
    assert first.id == "round-1/seed-0/step-1"
    assert (first.round, first.seed, first.step) == (1, 0, 1)
    assert first.model == str(tiny_model_path)
    assert first.problem in {f"extraction-{i:05d}" for i in range(4)}
    assert first.prompt[0].content == f"problems {int(first.problem[-1])}?"
    assert [t.outcome for t in (first, second, third)] == [1.0, 0.0, 1.0]
    assert [t.feedback for t in (first, second)] == ["The answer is right.", "The answer is wrong."]
    assert [t for own in made(round_) for t in own] == read_traces(round_.store)


def test_the_base_answers_at_the_temperature_of_rollouts(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Also where answers are measured greedily: accumulations would all be alike."""
    asked: list[tuple[str, float]] = []

    class Watched(ScriptedEngine):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
            asked.append((self.policy, sampling.temperature))
            return super().generate(prompts, sampling)

    round_ = learner(load_learner(tmp_path, tiny_model_path))
    assert isinstance(round_.parts.engine, ScriptedEngine)
    round_.parts.engine = Watched(round_.parts.engine.script)
    made(round_)
    assert asked == [("base", 0.7)]


def test_what_is_in_the_store_is_not_solved_again(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path)
    before = made(learner(run))
    more = learner(load_learner(tmp_path, tiny_model_path, "experience.steps=5"))
    assert [own[:3] for own in made(more)] == before
    assert sorted(asked_of(more.parts)) == [
        f"round-1/seed-{seed}/step-{step}" for seed in (0, 1) for step in (4, 5)
    ]


def test_traces_do_not_depend_on_what_is_solved_beside_them(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """A real model at temperature 0.7: all at once, or two by two."""
    found: list[list[list[Trace]]] = []
    for rows in (64, 2):
        run = load_learner(tmp_path, tiny_model_path, f"rollout.batch_rows={rows}")
        round_ = replace(learner(run), parts=assemble(run))
        found.append(solve(round_.parts, round_.experience, tmp_path / f"{rows}.jsonl"))
    together, apart = found
    assert apart == together
    texts = [trace.response for own in together for trace in own]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("toml", [TOML, GAME], ids=["answers", "games"])
def test_a_reply_that_the_token_limit_ended_is_known_as_cut(
    tiny_model_path: Path, tmp_path: Path, toml: str
) -> None:
    """An answer that was never finished looks wrong; so does a game whose first turn was cut."""
    round_ = learner(load_learner(tmp_path, tiny_model_path, toml=toml))
    most = round_.parts.config.rollout.max_new_tokens

    def say(policy: str, prompt: Prompt) -> tuple[int, ...]:
        del policy
        is_long = "seed-0/step-2" in prompt.task_id and "/turn-2" not in prompt.task_id
        return (*[END_ID - 1] * (most - 1 + is_long), END_ID)

    round_.parts.engine = ScriptedEngine(say)
    assert [[trace.cut for trace in own] for own in made(round_)] == [
        [False, True, False],
        [False, False, False],
    ]
    assert sum(trace.cut for trace in read_traces(round_.store)) == 1


def test_without_feedback_no_grader_is_asked(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path, "experience.feedback=none")
    round_ = learner(run)

    def refuse(*_: object) -> object:
        raise AssertionError("no labels are needed")

    round_.parts.grader = refuse  # type: ignore[assignment]
    traces = [trace for own in made(round_) for trace in own]
    assert {(trace.outcome, trace.feedback) for trace in traces} == {(None, "")}


@pytest.mark.parametrize(
    ("outcome", "kind", "expected"),
    [
        (1.0, "outcome", "The answer is right."),
        (0.0, "outcome", "The answer is wrong."),
        (0.25, "outcome", "The answer is right to 25%."),
        (0.0, "answer", "The answer is wrong. The right answer is: 42"),
        (1.0, "none", ""),
        (None, "answer", ""),
    ],
)
def test_feedback_tells_as_much_as_asked_for(
    outcome: float | None, kind: str, expected: str
) -> None:
    task = Task("t", (Message("user", "?"),), answer=42)
    assert feedback_on(task, outcome, kind) == expected


def test_games_are_played_and_tell_what_happened(tiny_model_path: Path, tmp_path: Path) -> None:
    """A real model on extraction boards: each turn is kept as it was asked and answered."""
    run = load_learner(tmp_path, tiny_model_path, toml=GAME)
    round_ = replace(learner(run), parts=assemble(run))
    traces = [trace for own in made(round_) for trace in own]
    assert len(traces) == 6
    for trace in traces:
        assert trace.problem.startswith("extraction-")
        assert 1 <= len(trace.turns) <= 5
        assert trace.turns[-1] == (trace.prompt, trace.response)
        assert trace.outcome in (0.0, 1.0)
        assert trace.feedback
    assert read_traces(round_.store) == traces


def test_a_game_without_feedback_says_nothing(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path, "experience.feedback=none", toml=GAME)
    round_ = replace(learner(run), parts=assemble(run))
    assert {trace.feedback for own in made(round_) for trace in own} == {""}
