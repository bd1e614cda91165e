"""`opcd.consolidation`: what was chosen is baked in, and all conditions have the same rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from learners import Learner, experience_run, game_learner
from opcd import assembly
from opcd.config import Run, derive
from opcd.consolidation import (
    check_unchanged,
    consolidate,
    experience_files,
    measure_raw,
    paired,
    raw_files,
)
from opcd.errors import ConfigError, NothingLearnedError, RunFolderError, TaskError
from opcd.runs import RoundFolder, RunFolder, open_run, read_jsonl, round_folder, write_json
from opcd.traces import Trace, append_traces
from opcd.types import Message


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, learner_path: Path, tmp_path: Path) -> Run:
    """A run of one step whose first round was gathered and selected by hand."""
    monkeypatch.setattr(assembly, "HFEngine", Learner)
    few = ("steps=1", "evaluation.every_steps=1", "evaluation.suites=[]")
    run = experience_run(tmp_path, learner_path, *few)
    choose(round_folder(run))
    return run


def choose(folder: RoundFolder, text: str = "- lesson from a\n- lesson from b\n") -> None:
    verdict = "no items: 0.5 without any experience"
    write_json(folder.selection, {"verdict": verdict, "chosen": {"seed": 1}})
    folder.selected.write_text(text, encoding="utf-8")
    for seed in (0, 1):
        folder.seed(seed).mkdir(exist_ok=True)
        said = f"User:\nproblem {seed}?\n\nAssistant:\nb\n"
        folder.raw(seed).write_text(said, encoding="utf-8")


def prompts(*texts: str) -> list[Trace]:
    return [Trace(f"t{n}", (Message("user", t),), "said") for n, t in enumerate(texts)]


def marks(**by_condition: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [{"id": str(n), "correct": mark} for n, mark in enumerate(found)]
        for name, found in by_condition.items()
    }


def test_conditions_are_paired_row_by_row() -> None:
    tests = {
        (t["first"], t["second"]): t
        for t in paired(marks(base=[0, 0, 0, 1], items=[1, 1, 0, 1], baked=[1, 1, 1, 1]))
    }
    assert set(tests) == {("baked", "items"), ("baked", "base"), ("items", "base")}
    assert tests["baked", "base"]["difference"] == 0.75
    assert tests["baked", "base"]["p"] == 0.25, "three rows differ, all one way"


def test_other_rows_do_not_stand_in_one_table() -> None:
    found = marks(base=[0, 1], baked=[1, 1])
    found["base"][0]["id"] = "another"
    with pytest.raises(RunFolderError, match="base and baked were measured on different test rows"):
        paired(found)


def test_ungraded_answers_are_not_tested() -> None:
    assert paired({"base": [{"id": "1"}], "baked": [{"id": "1"}]}) == []


def test_without_a_choice_there_is_nothing_to_bake_yet(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="choose with opcd select first"):
        experience_files(run, RoundFolder(tmp_path))


def test_where_no_items_is_best_there_is_nothing_to_bake(run: Run) -> None:
    folder = round_folder(run)
    folder.selected.unlink()
    with pytest.raises(NothingLearnedError, match=r"nothing to bake in: no items.*use = .pool"):
        experience_files(run, folder)


def test_a_pool_leaves_out_seeds_that_learned_nothing(run: Run) -> None:
    run, folder = derive(run, experience={"use": "pool"}), round_folder(run)
    for seed, texts in enumerate((["", "- one\n", "- one\n- two\n"], ["", "", ""])):
        for step, text in enumerate(texts):
            folder.experience(seed, step).write_text(text, encoding="utf-8")
    assert experience_files(run, folder) == [folder.experience(0, 2)]
    folder.experience(0, 2).write_text("", encoding="utf-8")
    with pytest.raises(NothingLearnedError, match="none of 2 seeds has an item"):
        experience_files(run, folder)


def test_a_run_trained_with_another_experience_is_not_taken_for_this_one(run: Run) -> None:
    """The same files that changed since: the run's own table would not show it."""
    folder = round_folder(run)
    baked = derive(run, name="tiny-round-1")
    check_unchanged(folder, [folder.selected], baked)
    choose(folder, "- lesson from c\n")
    check_unchanged(folder, [folder.selected], baked)
    (run.out / "tiny-round-1").mkdir()
    RunFolder(run.out / "tiny-round-1").config.write_text("{}", encoding="utf-8")
    check_unchanged(folder, [folder.selected], baked)
    choose(folder, "- lesson from d\n")
    with pytest.raises(RunFolderError, match="was not trained with the experience"):
        check_unchanged(folder, [folder.selected], baked)
    folder.baked_from.unlink()
    with pytest.raises(RunFolderError, match="was not trained with the experience"):
        check_unchanged(folder, [folder.selected], baked)


def test_raw_traces_are_those_of_the_seeds_that_are_baked_in(run: Run) -> None:
    """Other traces would be another comparison."""
    folder = round_folder(run)
    assert raw_files(folder, [folder.selected]) == [folder.raw(1)]
    pool = [folder.experience(seed, 2) for seed in (0, 1)]
    assert raw_files(folder, pool) == [folder.raw(0), folder.raw(1)]
    folder.raw(0).write_text("\n", encoding="utf-8")
    assert raw_files(folder, pool) == [folder.raw(1)]


def test_raw_traces_are_measured_once_and_their_absence_is_said(run: Run) -> None:
    folder, said = round_folder(run), list[str]()
    rows, raw = [f"test-{n:05d}" for n in range(4)], folder.raw(0)
    found = measure_raw(run, 1, folder, [raw], rows, str)
    assert isinstance(found, dict) and [row["id"] for row in found["answers"]] == rows
    assert found["metrics"]["correct"]["mean"] == 0.0
    assert measure_raw(run, 1, folder, [raw], rows, pytest.fail) == found
    raw.write_text("User:\nanother\n", encoding="utf-8")
    measure_raw(run, 1, folder, [raw], rows, said.append)
    assert len(said) == 1, "other traces are measured anew"
    raw.write_text("word " * 3000, encoding="utf-8")
    assert "no raw_traces" in str(measure_raw(run, 1, folder, [raw], rows, str))
    assert "not one trace fits" in str(measure_raw(run, 1, folder, [], rows, str))


def test_raw_traces_that_crowd_out_a_row_have_no_place_in_the_table(run: Run) -> None:
    """They may be longer than the items, and conditions are compared row by row."""
    folder = round_folder(run)
    few = derive(run, rendering={"over_long": "drop_row"})
    rows = [f"test-{n:05d}" for n in range(5)]
    found = measure_raw(few, 1, folder, [folder.raw(0)], rows, str)
    assert found == "no raw_traces: with them 4 of 5 test rows fit the model"


def test_raw_traces_of_a_game_are_measured_turn_by_turn(
    player_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as a response of the other conditions: a mean over turns, not the last one."""

    class Wordy(Learner):
        def script(self, policy: Any, prompt: Any) -> tuple[int, ...]:
            said = super().script(policy, prompt)
            return said[:-1] * 9 if prompt.task_id.endswith("/turn-1") else said

    monkeypatch.setattr(assembly, "HFEngine", Wordy)
    run = game_learner(tmp_path, player_path)
    folder = round_folder(run)
    folder.seed(0).mkdir()
    folder.raw(0).write_text("- lesson from a\n", encoding="utf-8")
    rows = ["test-00000", "test-00001"]
    found = measure_raw(run, 1, folder, [folder.raw(0)], rows, str)
    assert isinstance(found, dict) and found["metrics"]["turns"]["mean"] > 1
    assert 0 < found["metrics"]["truncated"]["mean"] < 1, "the first turn was cut, the last not"


def test_a_store_of_prompts_is_enough_to_train_on(run: Run) -> None:
    """The answers are the student's own, the test rows are those of the run."""
    folder = round_folder(run)
    append_traces(folder.traces, prompts("served 1?", "served 2?", "served 2?", "served 3?"))
    found = consolidate(derive(run, experience={"train_on": "store"}), 1, folder, str)
    _, baked = open_run(run.out / found["runs"]["baked"])
    assert baked.tasks and [getattr(s, "path", "") for s in baked.tasks.train] == [
        folder.prefixes.resolve()
    ]
    assert [row["prompt"][0]["content"] for row in read_jsonl(folder.prefixes)] == [
        "served 1?",
        "served 2?",
        "served 3?",
    ]
    rows = list(read_jsonl(RunFolder(run.out / "tiny-round-1").rollouts))
    assert any("served" in row["prompt"] for row in rows)
    assert not any("train" in row["prompt"] for row in rows if row["origin"] == "task")
    assert found["rows"] == 4 and "baked" in found["conditions"]
    assert not any("chosen by their KL" in note for note in found["notes"]), "rows are graded"
    assert json.loads(folder.consolidation.read_text("utf-8")) == found


def test_a_stored_prompt_that_is_a_test_row_is_refused(run: Run) -> None:
    folder = round_folder(run)
    append_traces(folder.traces, prompts("served 1?", "test 2?"))
    with pytest.raises(TaskError, match="share the prompt"):
        consolidate(derive(run, experience={"train_on": "store"}), 1, folder, str)
    assert not (run.out / "tiny-round-1").exists()


def test_a_game_is_trained_from_its_store_without_an_environment(
    player_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stored turn is a prompt; only measuring plays."""
    monkeypatch.setattr(assembly, "HFEngine", Learner)
    few = ("steps=1", "evaluation.every_steps=1", "evaluation.suites=[]")
    run = game_learner(tmp_path, player_path, *few, 'experience.train_on="store"')
    folder = round_folder(run)
    choose(folder)
    append_traces(folder.traces, prompts("P _\n_ G", "_ P\n_ G"))
    found = consolidate(run, 1, folder, str)
    _, baked = open_run(run.out / found["runs"]["baked"])
    assert baked.game is None and baked.tasks is not None and baked.grader is None
    assert found["conditions"]["items"]["correct"]["mean"] == 1.0
    assert "turns" in found["conditions"]["baked"] and found["rows"] == 2
    assert any("weights were chosen by their KL to the teacher" in note for note in found["notes"])


def test_a_teacher_that_moves_has_no_off_policy_baseline_and_that_is_noted(run: Run) -> None:
    found = consolidate(derive(run, teacher={"type": "ema"}), 1, round_folder(run), str)
    assert "off_policy" not in found["conditions"]
    assert any(note.startswith("no off_policy: ") for note in found["notes"])


def test_a_missing_store_is_an_error_before_anything_is_trained(run: Run) -> None:
    with pytest.raises((ConfigError, ValueError), match="holds no trace"):
        consolidate(derive(run, experience={"train_on": "store"}), 1, round_folder(run), str)
    assert not (run.out / "tiny-round-1").exists()
