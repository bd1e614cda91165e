"""`opcd.comparing`: the same rows, nothing trained twice, the baseline as classic as it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from opcd import comparing
from opcd.comparing import (
    Measured,
    check_same_rows,
    compare,
    ensure_trained,
    off_policy,
    paired,
    search,
    spread,
    with_seed,
)
from opcd.config import Run, derive, read_rates
from opcd.errors import ConfigError, RunFolderError
from opcd.runs import append_jsonl, check_free, create_run, open_run, read_jsonl
from tiny import make_run

FAST = ("steps=2", "evaluation.every_steps=2", "optimizer.lr=0.02", "optimizer.warmup_steps=0")


def measured(marks: list[float], ids: str = "abcd", **metrics: float) -> Measured:
    rows = [
        {"id": i, "base": {"correct": 0.0}, "in_context": {"correct": 1.0}, "baked": {"correct": m}}
        for i, m in zip(ids, marks, strict=True)
    ]
    table = {name: {"mean": value} for name, value in metrics.items()}
    summary = {"checkpoint": "step-1", "suites": {"task": {"baked": table}}}
    return Measured(Run.model_construct(name="-".join(ids)), summary, rows)


def test_the_baseline_is_the_teachers_answers_and_forward_kl(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Everything else, the learning rate and the number of tokens too, stays the run's."""
    warm = 'loss.warmup={direction="jsd", steps=1, teacher_fraction=0.5}'
    run = make_run(tmp_path, tiny_model_path, warm, "loss.temperature=0.5")
    classic = off_policy(run)
    assert classic.rollout.teacher_fraction == 1.0 and classic.loss.warmup is None
    assert classic.loss.direction == "forward_kl" and classic.loss.temperature == 0.5
    same = ("seed", "steps", "model", "context", "tasks", "optimizer", "batch", "anchor")
    assert all(getattr(classic, name) == getattr(run, name) for name in same)
    assert classic.name == "tiny-off_policy" and classic.out == run.out


def test_a_teacher_that_moves_has_no_such_baseline(tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, 'teacher={type="ema"}')
    with pytest.raises(ConfigError, match="no weights of its own to answer with"):
        off_policy(run)


def test_one_command_trains_measures_and_is_idle_the_second_time(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Two kinds with two seeds are four runs; their checkpoints are named."""
    run = make_run(tmp_path, tiny_model_path, *FAST)
    said: list[str] = []
    found = compare(run, 2, (), said.append)
    names = ["tiny", "tiny-seed1", "tiny-off_policy", "tiny-off_policy-seed1"]
    assert list(found["checkpoints"]) == names
    assert [line.split()[0] for line in said].count("training") == 4
    assert set(found["suites"]["task"]) == {"base", "in_context", "off_policy", "baked"}
    assert set(found["suites"]["kept"]) == {"off_policy", "baked"}
    assert found["suites"]["task"]["baked"]["kl_nats_per_token"]["mean"] > 0
    assert found["seeds"]["baked"]["runs"] == 2 and len(found["paired"]) == 6
    assert json.loads((run.out / "tiny" / "comparison.json").read_text("utf-8")) == found
    said.clear()
    assert compare(run, 2, (), said.append) == found and not said


def test_both_kinds_choose_among_the_same_learning_rates(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Each on its own validation rows; the table is of the chosen runs."""
    run = make_run(tmp_path, tiny_model_path, *FAST)
    found = compare(run, 1, (0.01, 0.03), lambda _: None)
    for kind, name in (("baked", "tiny"), ("off_policy", "tiny-off_policy")):
        searched = found["searches"][kind]
        assert [row["lr"] for row in searched["rows"]] == [0.01, 0.03]
        assert found["lr"][kind] == searched["chosen"]
        assert f"{name}-lr{searched['chosen']:g}" in found["checkpoints"]
    assert json.loads((run.out / "tiny" / "comparison.json").read_text("utf-8")) == found


def test_an_interrupted_run_is_continued(tiny_model_path: Path, tmp_path: Path) -> None:
    """As `--resume` would: the rows of the steps that were done are still there."""
    run = make_run(tmp_path, tiny_model_path, *FAST, "steps=4", "checkpoint.every_steps=2")
    folder = ensure_trained(run, lambda _: None)
    rows = list(read_jsonl(folder.metrics))
    kept = "".join(json.dumps(row) + "\n" for row in rows[:3])
    folder.metrics.write_text(kept, encoding="utf-8")
    for name in ("step-4",):
        for path in sorted((folder.checkpoints / name).rglob("*"), reverse=True):
            path.unlink()
        (folder.checkpoints / name).rmdir()
    ensure_trained(run, lambda _: None)
    again = list(read_jsonl(folder.metrics))
    assert [row["loss_nats"] for row in again] == [row["loss_nats"] for row in rows]


def test_a_run_that_was_killed_before_its_first_checkpoint_is_trained_anew(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """A signal that cannot be caught leaves a folder with nothing to go on from."""
    run = make_run(tmp_path, tiny_model_path, *FAST)
    folder = create_run(run)
    append_jsonl(folder.metrics, [{"step": 0, "loss_nats": 9.0}])
    said: list[str] = []
    assert ensure_trained(run, said.append) == folder
    assert said == [f"training {folder.path} anew: it stopped before its first checkpoint"]
    assert [row["step"] for row in read_jsonl(folder.metrics)] == [0, 1]
    assert next(read_jsonl(folder.metrics))["loss_nats"] != 9.0


def test_a_folder_with_another_run_is_not_taken_for_this_one(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    folder = ensure_trained(make_run(tmp_path, tiny_model_path, *FAST), lambda _: None)
    assert open_run(folder.path)[1].optimizer.lr == 0.02
    other = make_run(tmp_path, tiny_model_path, *FAST, "optimizer.lr=0.01")
    with pytest.raises(RunFolderError, match=r"(?s)other values:.*optimizer.lr: 0.02 -> 0.01"):
        ensure_trained(other, lambda _: None)


def test_other_test_rows_are_refused() -> None:
    with pytest.raises(RunFolderError, match="a-b-c-d and a-b-c-x were measured on different test"):
        check_same_rows([measured([1] * 4), measured([1] * 4, "abcx")])


def test_pairs_are_of_the_same_row() -> None:
    first = {"baked": measured([1, 1, 1, 0]), "off_policy": measured([0, 1, 0, 0])}
    tests = {(t["first"], t["second"]): t for t in paired(first)}
    assert tests["baked", "off_policy"]["difference"] == 0.5
    assert tests["baked", "off_policy"]["p"] == 0.5, "two rows differ, both one way"
    assert tests["off_policy", "in_context"]["difference"] == -0.75


def test_the_spread_is_over_training_runs() -> None:
    runs = [measured([1] * 4, correct=share) for share in (0.8, 0.9, 1.0)]
    found = spread(runs)
    assert found["runs"] == 3
    assert found["correct"] == {"mean": pytest.approx(0.9), "deviation": pytest.approx(0.1)}
    assert spread(runs[:1])["correct"]["deviation"] is None, "one run has no spread"


def test_a_later_seed_is_a_run_of_its_own(tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path, "seed=5")
    assert with_seed(run, 0) == run
    later = with_seed(run, 2)
    assert (later.seed, later.name) == (7, "tiny-seed7")


def test_a_search_chooses_on_validation(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The highest share wins; among equal ones, the smaller distance to the teacher."""
    bests: dict[str, dict[str, Any]] = {
        "0.1": {"correct": 0.5, "kl_nats_per_token": 0.1},
        "0.2": {"correct": 0.9, "kl_nats_per_token": 0.4},
        "0.3": {"correct": 0.9, "kl_nats_per_token": 0.2},
    }
    run = make_run(tmp_path, tiny_model_path)
    monkeypatch.setattr(comparing, "ensure_trained", lambda one, _: one.optimizer.lr)
    monkeypatch.setattr(
        comparing,
        "read_best",
        lambda lr: {"step": 2, "chosen_by": "correct", **bests[f"{lr:g}"]},
    )
    found = search(run, (0.1, 0.2, 0.3), lambda _: None)
    assert found["chosen"] == 0.3 and found["selected_by"] == "correct"
    assert [row["run"] for row in found["rows"]] == ["tiny-lr0.1", "tiny-lr0.2", "tiny-lr0.3"]
    assert json.loads((run.out / "tiny" / "search.json").read_text("utf-8")) == found
    check_free(run)  # the run itself can still be started


def test_a_search_without_validation_trains_nothing(tiny_model_path: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_model_path)
    blind = derive(run, tasks={"validation": []})
    with pytest.raises(ConfigError, match="no validation split, so no learning rate can be chosen"):
        search(blind, (0.1, 0.2), pytest.fail)
    assert not (run.out / "tiny-lr0.1").exists()


@pytest.mark.parametrize("text", ["", "1e-4", "1e-4,x", "1e-4,-1", "1e-4,1e-4", "2,3"])
def test_a_search_wants_rates_to_choose_from(text: str) -> None:
    with pytest.raises(ConfigError, match="two or more different learning rates"):
        read_rates(text)


def test_rates_are_read() -> None:
    assert read_rates("1e-4, 5e-4") == (1e-4, 5e-4)
