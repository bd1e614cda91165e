"""Setups: every way is tried in every world, with the world's budget, at the pace asked for."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from opcd.lab import setups
from opcd.lab.setups import BUDGET, FORWARD, REVERSE, WARMED, Setup, merge
from opcd.lab.trials import Measured
from opcd.lab.worlds import World

MEASURED = Measured([], [], [], [], [], [], [], [], [], 0.0, 1, 0.1, 1.0)
Asked = list[tuple[int, dict[str, Any]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """The runs that were asked for, by seed; none of them is made."""
    found: Asked = []

    def run_of(world: World, **changes: Any) -> Any:
        found.append((world.seed, changes))

    monkeypatch.setattr(setups, "run_of", run_of)
    monkeypatch.setattr(setups.Bench, "measure", lambda *_: MEASURED)
    yield found


def test_measuring_tries_each_way_in_every_world(tmp_path: Path, asked: Asked) -> None:
    """The budget is that of the world, with the changes of the way laid over it."""
    said: list[object] = []
    few = Setup(tmp_path, (4, 5), 0.25, said.append)
    rate: dict[str, Any] = {"rollout": {"teacher_fraction": 1.0}, "batch": {"rows_per_forward": 2}}
    assert len(few.measure("rulebook", "a way", rate, FORWARD)) == 2
    expected = {
        **BUDGET["rulebook"],
        "steps": round(BUDGET["rulebook"]["steps"] / 4),
        "batch": {"prompts_per_step": 16, "rows_per_forward": 2},
        "rollout": {"teacher_fraction": 1.0},
        "loss": FORWARD["loss"],
    }
    assert asked == [(4, expected), (5, expected)]
    assert said == ["rulebook 4: a way", "rulebook 5: a way"]
    assert "rollout" not in BUDGET["rulebook"]


def test_a_quick_look_has_a_shorter_warm_up_too(tmp_path: Path, asked: Asked) -> None:
    """Or half of the steps would be no reverse KL at all."""
    Setup(tmp_path, (0,), 0.5).measure("code_book", "a way", WARMED)
    warmup = WARMED["loss"]["warmup"]
    assert asked[0][1]["loss"]["warmup"] == {**warmup, "steps": warmup["steps"] // 2}
    assert WARMED["loss"]["warmup"] == warmup, "the way itself is as it was"


def test_a_quick_look_is_validated_as_often(tmp_path: Path, asked: Asked) -> None:
    """Or the step to choose from would be the last alone."""
    Setup(tmp_path, (0,), 0.25).measure("lake", "a way")
    (_, tables), full = asked[0], BUDGET["lake"]
    times = ceil(full["steps"] / full["evaluation"]["every_steps"])
    assert ceil(tables["steps"] / tables["evaluation"]["every_steps"]) == times > 1


def test_the_last_of_several_directions_counts() -> None:
    assert merge(WARMED, REVERSE) == REVERSE
    assert merge(REVERSE, WARMED)["loss"]["direction"] == "reverse_kl"


def test_a_setup_can_be_sent_to_another_process(tmp_path: Path) -> None:
    setup = Setup(tmp_path, (1,))
    assert pickle.loads(pickle.dumps(setup)) == replace(setup)
