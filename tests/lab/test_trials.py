"""Trials: a real one of a small mind, and that what was measured is not measured again."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from opcd.adapters import trainable
from opcd.assembly import Parts, assemble
from opcd.lab import trials
from opcd.lab.trials import Bench, Measured, train_to_best, trial
from opcd.lab.worlds import OTHERS, World, make_world, run_of

MEASURED = Measured([0.0], [1.0], [1.0], [1.0], [], [], [], [], [0.1], 0.2, 60, 0.2, 3.0)


@pytest.fixture
def world(tmp_path: Path, reading: Path) -> World:
    return make_world("code_book", 0, tmp_path / "worlds")


def test_a_trial_bakes_a_code_book(world: World) -> None:
    """The method itself, for real: told right, untold wrong, and after training right untold."""
    changes = {"steps": 30, "batch": {"prompts_per_step": 16}, "optimizer": {"lr": 1e-3}}
    found = trial(world, run_of(world, **changes))
    assert (
        len(found.base) == len(found.baked) == len(found.in_context) == len(found.returned) == 144
    )
    assert fmean(found.base) <= 0.25
    assert fmean(found.in_context) >= 0.85
    assert fmean(found.baked) >= 0.6
    assert fmean(found.returned) >= 0.6
    # Other books are read before it; how much of that is lost is a claim, no law.
    assert fmean(found.others_before) >= 0.85
    assert len(found.others) == len(found.others_before) == 12 * OTHERS
    # Rulebooks were never read by this mind; that they are asked about is what counts here.
    assert len(found.other_task) == len(found.other_task_before) == 12 * OTHERS
    assert len(found.kl_nats) == 144 and 0 < fmean(found.kl_nats) < 3
    assert found.kept_kl_nats_per_token > 0 and found.best_step == 30
    assert found.least_entropy_nats >= 0 and found.wall_s > 0


def test_the_best_weights_are_put_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came after them; and a run that is not validated ends with its last ones."""
    seen: list[dict[str, torch.Tensor]] = []

    def validate(parts: Parts, step: int) -> dict[str, float]:
        seen.append({name: w.detach().clone() for name, w in trainable(parts.student).items()})
        good = float(step == 9)
        return {"step": step, "rows": 144, "correct": good, "kl_nats_per_token": 1.0 - good}

    monkeypatch.setattr(trials, "validate", validate)
    parts = assemble(run_of(world, steps=15, evaluation={"every_steps": 5}))
    metrics, best_step = train_to_best(parts)
    found = trainable(parts.student)
    assert (len(metrics), len(seen), best_step) == (15, 3, 10)
    assert all(torch.equal(found[name], weight) for name, weight in seen[1].items())
    assert not all(torch.equal(found[name], weight) for name, weight in seen[2].items())
    assert train_to_best(assemble(run_of(world, steps=2)))[1] == 2 and len(seen) == 3


Tried = list[tuple[str, int]]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Tried:
    """The trials that were made, by world and steps; none of them real."""
    made: Tried = []

    def fake(world: World, run: trials.Run) -> Measured:
        made.append((f"{world.name}-{world.seed}", run.steps))
        return replace(MEASURED, wall_s=float(len(made)))

    monkeypatch.setattr(trials, "trial", fake)
    return made


def test_what_was_measured_is_not_measured_again(
    world: World, tmp_path: Path, tried: Tried
) -> None:
    bench = Bench(tmp_path / "trials")
    first = bench.measure(world, run_of(world))
    assert bench.measure(world, run_of(world)) == first
    assert Bench(tmp_path / "trials").measure(world, run_of(world, name="other")) == first
    assert len(tried) == 1, "a run's name changes nothing"


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 61},
        {"seed": 9},
        {"optimizer": {"lr": 1e-3}},
        {"loss": {"direction": "forward_kl"}},
        {"teacher": {"type": "live"}},
    ],
    ids=str,
)
def test_another_setting_is_another_trial(
    world: World, tmp_path: Path, tried: Tried, changes: dict[str, object]
) -> None:
    bench = Bench(tmp_path / "trials")
    bench.measure(world, run_of(world))
    bench.measure(world, run_of(world, **changes))
    assert len(tried) == 2 == len(list(bench.folder.iterdir()))


def test_what_was_measured_on_other_rows_is_no_answer(
    world: World, tmp_path: Path, tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path / "trials")
    bench.measure(world, run_of(world))
    monkeypatch.setitem(trials.ROWS, "test", 7)
    bench.measure(world, run_of(world))
    assert len(tried) == 2


def test_what_was_measured_under_another_page_is_no_answer(
    world: World, tmp_path: Path, tried: Tried
) -> None:
    bench = Bench(tmp_path / "trials")
    bench.measure(world, run_of(world))
    world.context.write_text("- alpha is red\n", encoding="utf-8")
    bench.measure(world, run_of(world))
    assert len(tried) == 2


def test_another_world_is_another_trial(world: World, tmp_path: Path, tried: Tried) -> None:
    bench = Bench(tmp_path / "trials")
    other = make_world("code_book", 1, tmp_path / "worlds")
    for one in (world, other):
        bench.measure(one, run_of(one, seed=0))
    assert tried == [("code_book-0", 60), ("code_book-1", 60)]


def test_where_a_world_lies_changes_nothing(world: World, tmp_path: Path, tried: Tried) -> None:
    """Trials go on after the folder was moved."""
    bench = Bench(tmp_path / "trials")
    moved = make_world("code_book", 0, tmp_path / "elsewhere")
    for one in (world, moved):
        bench.measure(one, run_of(one))
    assert len(tried) == 1


def test_where_the_minds_lie_changes_nothing(
    world: World, tmp_path: Path, tried: Tried, reading: Path
) -> None:
    """Neither the student's folder nor a larger teacher's; their names say what they are."""
    bench = Bench(tmp_path / "trials")
    for cache in ("one", "two"):
        path = str(tmp_path / cache / "lab-large-0123")
        teacher = {"type": "frozen", "path": path}
        bench.measure(world, run_of(world, model={"path": path}, teacher=teacher))
    assert len(tried) == 1
    bench.measure(world, run_of(world, teacher={"path": str(tmp_path / "lab-large-4567")}))
    assert len(tried) == 2


def break_off(*_: object) -> Measured:
    raise KeyboardInterrupt


@pytest.mark.parametrize("broken", ["trial", "write_json"])
def test_a_trial_that_breaks_off_leaves_nothing(
    world: World,
    tmp_path: Path,
    tried: Tried,
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(tmp_path / "trials")
    bad: Callable[..., Measured] = break_off
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trials, broken, bad)
        bench.measure(world, run_of(world))
    assert not list(bench.folder.glob("*"))
    assert bench.measure(world, run_of(world)).base == MEASURED.base


def test_what_is_kept_says_what_was_run(world: World, tmp_path: Path, tried: Tried) -> None:
    bench = Bench(tmp_path / "trials")
    found = bench.measure(world, run_of(world, steps=7))
    (path,) = bench.folder.iterdir()
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["run"]["steps"] == 7 and kept["measured"] == asdict(found)
