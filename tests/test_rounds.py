"""`opcd.rounds`: each begins where the last one ended, and nothing is lost or done twice."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learners import Learner, experience_run
from opcd import assembly
from opcd.config import Run, derive
from opcd.errors import ConfigError, RunFolderError
from opcd.rounds import (
    consolidate_round,
    gather_round,
    learn,
    paired_rounds,
    run_of_round,
    select_round,
    starts_again,
)
from opcd.runs import RunFolder, open_run, read_jsonl, round_folder
from opcd.traces import read_traces
from tiny import at_step, terminate
from worlds import END_ID, write_jsonl

Learn = Callable[..., Run]


class CrashError(Exception):
    """Something that has nothing to do with us went wrong."""


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch, learner_path: Path, tmp_path: Path) -> Learn:
    """A run whose base model is scripted to learn; training and measuring are real."""
    monkeypatch.setattr(assembly, "HFEngine", Learner)
    return lambda *overrides: experience_run(tmp_path, learner_path, *overrides)


def told(found: dict[str, Any]) -> dict[str, Any]:
    """What was found, without the place where it happened."""
    rounds = [{k: v for k, v in one.items() if k != "model"} for one in found["rounds"]]
    return {**found, "rounds": rounds}


def test_two_rounds_have_a_table_with_all_conditions(
    undisturbed: tuple[Run, dict[str, Any], list[str]],
) -> None:
    run, found, _ = undisturbed
    assert json.loads(RunFolder(run.out / run.name).experience.read_text("utf-8")) == found
    names = ["base", "raw_traces", "items", "off_policy", "baked"]
    for number, one in enumerate(found["rounds"], start=1):
        assert one["round"] == number and list(one["conditions"]) == names
        assert all("ci95" in table["correct"] for table in one["conditions"].values())
        assert {"first": "items", "second": "base"}.items() <= one["paired"][5].items()
        assert one["runs"] == {
            "baked": f"tiny-round-{number}",
            "off_policy": f"tiny-round-{number}-off_policy",
        }
    pairs = [(test["first"], test["second"]) for test in found["paired"]]
    assert pairs == [("round 1", "base"), ("round 2", "base"), ("round 2", "round 1")]


def test_in_context_the_table_shows_what_the_lessons_are_worth(
    undisturbed: tuple[Run, dict[str, Any], list[str]],
) -> None:
    """Right on as many rows as there are lessons: of the 4 test rows, those of the chosen ones."""
    _, found, _ = undisturbed
    for one in found["rounds"]:
        items = one["selected"]["chosen"]["items"]
        assert one["conditions"]["items"]["correct"]["mean"] == items / 4
        assert one["conditions"]["base"]["correct"]["mean"] == 0.0


def test_the_second_round_begins_with_the_model_that_the_first_baked(
    undisturbed: tuple[Run, dict[str, Any], list[str]],
) -> None:
    run, found, _ = undisturbed
    model = round_folder(run, 2).model
    _, second = open_run(run.out / "tiny-round-2")
    assert second.model.path == found["rounds"][1]["model"] == str(model.resolve())
    assert (model / "config.json").is_file() and not (model / "adapter_config.json").exists()
    assert {t.model for t in read_traces(round_folder(run, 2).traces)} == {str(model.resolve())}


def test_the_rounds_are_ordinary_runs_with_the_lessons_as_context(
    undisturbed: tuple[Run, dict[str, Any], list[str]],
) -> None:
    run, _, _ = undisturbed
    _, baked = open_run(run.out / "tiny-round-1")
    assert baked.context.type == "experience" and baked.experience is None
    assert baked.context.files == (round_folder(run, 1).selected.resolve(),)
    kept = ("seed", "steps", "tasks", "grader", "model", "optimizer", "batch", "anchor", "loss")
    assert all(getattr(baked, name) == getattr(run, name) for name in kept)
    _, classic = open_run(run.out / "tiny-round-1-off_policy")
    assert classic.rollout.teacher_fraction == 1.0 and classic.context == baked.context


def test_problems_go_on_in_their_order_and_starting_again_is_said(
    undisturbed: tuple[Run, dict[str, Any], list[str]],
) -> None:
    """Five problems, three a round: the second round takes two others, then one again."""
    run, _, said = undisturbed
    traces = [t for n in (1, 2) for t in read_traces(round_folder(run, n).traces)]
    for seed in range(2):
        own = [t.problem for t in traces if t.seed == seed]
        assert len(own) == 6 and len(set(own[:5])) == 5 and own[5] in own[:5]
    assert [line for line in said if "start again" in line] == [
        "round 2 needs problems 4 to 6 of each seed's order, but there are 5: they start again"
    ]


def test_each_round_says_what_became_of_its_traces_and_what_was_chosen(
    undisturbed: tuple[Run, dict[str, Any], list[str]],
) -> None:
    """Before the minutes of training, and with the counts of what was lost."""
    run, found, said = undisturbed
    for number, one in enumerate(found["rounds"], start=1):
        start = said.index(f"round {number} of 2")
        told = said[start : said.index(f"training {run.out / one['runs']['baked']}")]
        counted = [line for line in told if "traces, mean outcome" in line]
        assert len(counted) == 1 and counted[0].startswith("6 traces, mean outcome 0.00 of 6 known")
        assert sum(line.startswith("items: ") for line in told) == 1
        assert f"chosen: {one['selected']['verdict']}" in told
        assert any(line.startswith(str(round_folder(run, number).growth)) for line in told)


def test_problems_that_suffice_are_not_talked_of(learner: Learn) -> None:
    assert starts_again(learner(), 1, 5) == "" and starts_again(learner(), 2, 6) == ""
    assert starts_again(learner(), 2, 5).endswith("they start again")


def test_nothing_is_done_twice(
    undisturbed: tuple[Run, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again answers from the files, whoever is asked."""
    run, found, _ = undisturbed

    class Silent(Learner):
        def generate(self, prompts: Any, sampling: Any) -> Any:
            del prompts, sampling
            pytest.fail("everything has been asked")

    monkeypatch.setattr(assembly, "HFEngine", Silent)
    said: list[str] = []
    assert learn(run, 2, said.append) == found
    assert not [line for line in said if line.split()[0] in ("training", "measuring", "scoring")]


STAGES = {
    "solve": ("opcd.solving.append_traces", 1),
    "extract": ("opcd.gathering._append_answer", 3),
    "accumulate": ("opcd.gathering.write_text", 3),
    "score": ("opcd.candidates.append_jsonl", 2),
    "choose": ("opcd.selection.write_growth", 1),
    "before training": ("opcd.consolidation.check_unchanged", 1),
    "between trainings": ("opcd.consolidation.ensure_trained", 1),
    "measure": ("opcd.consolidation.evaluate_best", 1),
    "measure raw traces": ("opcd.consolidation.respond", 1),
    "tables": ("opcd.consolidation.write_json", 3),
    "the end": ("opcd.rounds.write_json", 1),
}
"""Stage -> the function just after which, at its which call, something goes wrong."""


def crash_after(monkeypatch: pytest.MonkeyPatch, target: str, call: int) -> list[int]:
    """Let something go wrong once, when a function has been called so often."""
    module, _, name = target.rpartition(".")
    real, calls = getattr(importlib.import_module(module), name), list[int]()

    def crashing(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        calls.append(1)
        if len(calls) == call:
            raise CrashError
        return found

    monkeypatch.setattr(target, crashing)
    return calls


def test_crashes_in_every_stage_change_nothing(
    learner: Learn,
    undisturbed: tuple[Run, dict[str, Any], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each time the same command goes on, and the table is that of a run nothing happened to."""
    run = learner()
    for stage, (target, call) in STAGES.items():
        with monkeypatch.context() as patch:
            calls = crash_after(patch, target, call)
            with pytest.raises(CrashError):
                learn(run, 1, str)
            assert len(calls) == call, f"the crash came elsewhere than in {stage}"
    assert told(learn(run, 1, str))["rounds"] == told(undisturbed[1])["rounds"][:1]


def test_a_signal_in_training_stops_after_the_step_and_the_command_goes_on(
    learner: Learn,
    undisturbed: tuple[Run, dict[str, Any], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = learner()
    at_step(monkeypatch, 0, terminate)
    with pytest.raises(RunFolderError, match=r"was interrupted after step 1.*goes on from there"):
        learn(run, 1, str)
    again = learn(run, 1, str)
    assert told(again)["rounds"] == told(undisturbed[1])["rounds"][:1]
    steps = [row["step"] for row in read_jsonl(RunFolder(run.out / "tiny-round-1").metrics)]
    assert steps == [0, 1]


def test_a_crash_in_the_export_changes_nothing(
    undisturbed: tuple[Run, dict[str, Any], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The next try exports the same model, to the byte."""
    run, wanted = undisturbed[0], tmp_path / "wanted"
    model = round_folder(run, 2).model
    model.rename(wanted)
    with monkeypatch.context() as patch:
        crash_after(patch, "opcd.adapters.merge", 1)
        with pytest.raises(CrashError):
            run_of_round(run, 2, str)
    assert not model.exists()
    assert run_of_round(run, 2, str).model.path == str(model.resolve())
    assert {file.name: file.read_bytes() for file in model.iterdir()} == {
        file.name: file.read_bytes() for file in wanted.iterdir()
    }


def test_a_row_that_a_round_lacks_is_not_compared(
    undisturbed: tuple[Run, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    """A longer experience may crowd it out; the others must not be shifted against each other."""
    run, found, _ = undisturbed
    lacking = derive(run, out=str(tmp_path))
    marks = ([1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    for number, of_round in enumerate(marks, start=1):
        folder = tmp_path / f"tiny-round-{number}"
        folder.mkdir()
        rows = [
            {"id": f"r{n + number - 1}", "base": {"correct": 0.0}, "baked": {"correct": mark}}
            for n, mark in enumerate(of_round)
        ]
        write_jsonl(folder / "answers.jsonl", rows)
    tests = paired_rounds(lacking, found["rounds"])
    assert [test["difference"] for test in tests] == [0.0, 0.0, 0.0]
    assert paired_rounds(lacking, []) == []


def test_what_a_service_appended_is_learned_from_in_the_next_round(learner: Learn) -> None:
    """Rows of prompt and response alone; those that come later wait for the round after."""
    run = learner("experience.steps=1", "experience.use='pool'")
    said: list[str] = []
    gather_round(run, 1, said.append)
    store = round_folder(run, 1).traces
    with store.open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "served?", "response": "b"}\n')
    gather_round(run, 1, said.append)
    assert not any("served" in row["text"] for row in read_jsonl(round_folder(run, 1).answers(0)))
    assert "1 traces of others in traces.jsonl are not read before the second round" in said[-1]
    baked = {"model": run.model.path}
    second = round_folder(run, 2)
    second.model.symlink_to(baked["model"], target_is_directory=True)
    for _ in range(2):
        gather_round(run, 2, str)
        ids = [row["trace"] for row in read_jsonl(second.answers(0))]
        assert ids == ["round-2/seed-0/step-1", "round-1/line-3"]
        assert len(second.experiences(1)) == 3
        with store.open("a", encoding="utf-8") as stream:
            stream.write('{"prompt": "later?", "response": "b"}\n')
    third = round_folder(run, 3)
    third.model.symlink_to(baked["model"], target_is_directory=True)
    gather_round(run, 3, str)
    assert [row["trace"] for row in read_jsonl(third.answers(0))][1:] == [
        "round-1/line-4",
        "round-1/line-5",
    ]


def test_where_nothing_was_learned_the_rounds_end_and_say_so(
    learner: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an error: no items is an answer, and it stands in the table's file."""

    class Forgetful(Learner):
        def script(self, policy: Any, prompt: Any) -> tuple[int, ...]:
            answer = super().script(policy, prompt)
            return answer if len(answer) > 2 else (*self.tokenizer.encode("b"), END_ID)

    monkeypatch.setattr(assembly, "HFEngine", Forgetful)
    said: list[str] = []
    run = learner()
    found = learn(run, 3, said.append)
    assert [one["round"] for one in found["rounds"]] == [1]
    assert found["rounds"][0]["conditions"] == {}
    assert "there is nothing to bake in: no items: 0.000" in found["rounds"][0]["verdict"]
    assert json.loads(RunFolder(run.out / run.name).experience.read_text("utf-8")) == found
    assert not (run.out / "tiny-round-1").exists() and "round 2 of 3" not in said


def test_a_pool_is_drawn_from_and_needs_no_selection(learner: Learn) -> None:
    few = ("experience.steps=2", "steps=1", "evaluation.every_steps=1")
    run = learner('experience.use="pool"', *few)
    found = consolidate_round(run, 1, str)
    assert found["experience"] == ["seed-0/experience-002.md", "seed-1/experience-002.md"]
    assert found["selected"] == {} and not round_folder(run, 1).selection.exists()
    rows = list(read_jsonl(RunFolder(run.out / "tiny-round-1").rollouts))
    assert {row["id"].split("/")[1] for row in rows if row["origin"] == "task"} <= {
        "lessons-0",
        "lessons-1",
    }


def test_a_round_cannot_begin_before_the_one_before_has_ended(learner: Learn) -> None:
    run = learner()
    with pytest.raises(RunFolderError, match=r"round 2 begins with the model of .*tiny-round-1"):
        run_of_round(run, 2, str)
    assert run_of_round(run, 1, str) == run


def test_a_run_with_a_context_has_nothing_to_learn(learner: Learn) -> None:
    given = {"type": "experience", "path": "somewhere.md"}
    run = derive(learner(), experience=None, context=given)
    with pytest.raises(ConfigError, match=r"no \[experience\] table"):
        select_round(run, 1, str)
