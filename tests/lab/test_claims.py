"""Claims: inequalities that point the right way, and tables that show every condition."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opcd.lab import claims, verdicts
from opcd.lab.claims import Finding, Setup
from opcd.lab.trials import Measured
from opcd.lab.worlds import World

ROWS = 60
Share = Callable[[str], Mapping[str, float]]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The differences here are far from 0: coarse intervals will do."""
    monkeypatch.setattr(verdicts, "DRAWS", 100)


def marks(share: float) -> list[float]:
    """So many of the rows right, always the first ones."""
    return [float(row < share * ROWS) for row in range(ROWS)]


def measured(**shares: float) -> Measured:
    names = ("base", "in_context", "baked", "returned", "others_before", "others")
    found: Any = {name: marks(shares.get(name, 0.5)) for name in names}
    return Measured(**found, kl_nats_per_token=0.1, least_entropy_nats=0.1, wall_s=1.0)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(claims, "mind_folder", lambda mind: tmp_path / mind.name)
    return Setup(tmp_path)


def found(
    claim: Callable[[Setup], Finding], setup: Setup, patch: pytest.MonkeyPatch, share: Share
) -> Finding:
    """The finding where each way to train gave these shares of rows right, in three worlds."""

    def measure(self: Setup, name: str, way: str, *changes: Mapping[str, Any]) -> list[Measured]:
        del self, name, changes
        return [measured(**share(way))] * 3

    patch.setattr(Setup, "measure", measure)
    return claim(setup)


BETTER: dict[str, Share] = {
    "gains": lambda way: {
        "base": 0.1,
        "in_context": 0.4,
        "baked": 0.7 if way == "off-policy" else 1.0,
    },
    "factorial": lambda way: {
        "baked": {"on, reverse": 1.0, "off, forward": 0.1}.get(way, 0.5),
    },
    "teachers": lambda way: {"baked": {"frozen": 1.0, "ema": 0.5}.get(way.split()[0], 0.1)},
    "sizes": lambda way: {"base": 0.1, "in_context": 0.3, "baked": 1.0 if "large" in way else 0.5},
    "forgetting": lambda way: {"others": 0.9 if way == "on-policy" else 0.3},
    "supports": lambda way: {"baked": 0.2 if "dropped" in way else 0.9},
    "returning": lambda way: {"in_context": 1.0, "returned": 0.9 if "return" in way else 0.3},
}
"""What is measured where the paper is right."""
WORSE: dict[str, Share] = {
    "gains": lambda way: {
        "base": 0.1,
        "in_context": 0.4,
        "baked": 1.0 if way == "off-policy" else 0.7,
    },
    "factorial": lambda way: {"baked": {"on, reverse": 0.1, "off, forward": 1.0}.get(way, 0.5)},
    "teachers": lambda way: {"baked": {"frozen": 0.1, "ema": 0.5}.get(way.split()[0], 1.0)},
    "sizes": lambda way: {"base": 0.1, "in_context": 0.8, "baked": 0.5},
    "forgetting": lambda way: {"others": 0.3 if way == "on-policy" else 0.9},
    "supports": lambda way: {"baked": 0.9 if "dropped" in way else 0.2},
    "returning": lambda way: {"in_context": 0.3, "returned": 0.3 if "return" in way else 0.9},
}
"""And where it is wrong."""
CONDITIONS = {
    "gains": {"base", "in_context", "off_policy", "baked"},
    "factorial": {"on, reverse", "on, forward", "off, reverse", "off, forward"},
    "teachers": {"frozen", "ema", "refresh", "live"},
    "sizes": {
        "small, base",
        "small, in_context",
        "small, baked by itself",
        "small, baked by large",
    },
    "forgetting": {
        "before",
        "on-policy",
        "off-policy",
        "on-policy, anchors",
        "off-policy, anchors",
    },
    "supports": {
        f"{kind}, lr {lr}"
        for kind in ("exact", "top 4, bucket", "top 4, renormalised", "top 4, dropped")
        for lr in ("0.0005", "0.002")
    },
    "returning": {"before", "without the term", "with the term"},
}


@pytest.mark.parametrize("name", BETTER)
def test_inequalities_point_the_right_way(
    name: str, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the better is better a claim holds, and swapped it does not."""
    claim = getattr(claims, name)
    holds = found(claim, setup, monkeypatch, BETTER[name])
    assert {c.verdict for c in holds.comparisons} == {"holds"} and holds.verdict == "holds"
    assert found(claim, setup, monkeypatch, WORSE[name]).verdict == "does not hold"
    same = found(claim, setup, monkeypatch, lambda _: {})
    # Where nothing differs nothing is shown, but that nothing was lost.
    assert same.verdict == "undecided"


@pytest.mark.parametrize("name", CONDITIONS)
def test_tables_have_every_condition(
    name: str, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = found(getattr(claims, name), setup, monkeypatch, BETTER[name])
    assert {line.condition for line in one.lines} == CONDITIONS[name]
    assert all(line.figures for line in one.lines)
    assert all({c.first, c.second} <= CONDITIONS[name] for c in one.comparisons)


def test_the_figures_are_of_their_conditions(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    one = found(claims.gains, setup, monkeypatch, BETTER["gains"])
    shown = {line.condition: line.figures["solved"].mean for line in one.lines}
    expected = {"base": 0.1, "in_context": 0.4, "off_policy": 0.7, "baked": 1.0}
    assert shown == pytest.approx(expected)
    teachers = found(claims.teachers, setup, monkeypatch, BETTER["teachers"])
    # Half of in_context, 0.5, is the line below which a run has collapsed.
    collapsed = {line.condition: line.figures["collapsed"].mean for line in teachers.lines}
    assert collapsed == {"frozen": 0.0, "ema": 0.0, "refresh": 1.0, "live": 1.0}


def test_what_is_little_worse_is_as_good(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The support's margin: as good as exact is not better than exact."""
    one = found(claims.supports, setup, monkeypatch, BETTER["supports"])
    margins = {c.second.split(", lr")[0]: c.margin for c in one.comparisons}
    assert margins == {"exact": claims.FORGETS_LITTLE, "top 4, dropped": 0.0}


def test_measuring_tries_each_way_in_every_world(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is that of the world, with the changes of the way laid over it."""
    asked: list[tuple[int, dict[str, Any]]] = []

    def run_of(world: World, **changes: Any) -> Any:
        asked.append((world.seed, changes))

    monkeypatch.setattr(claims, "run_of", run_of)
    monkeypatch.setattr(claims.Bench, "measure", lambda *_: measured())
    said: list[object] = []
    few = replace(setup, seeds=(4, 5), pace=0.25, say=said.append)
    rate: dict[str, Any] = {"rollout": {"teacher_fraction": 1.0}, "batch": {"rows_per_forward": 2}}
    assert len(few.measure("rulebook", "a way", rate, claims.FORWARD)) == 2
    expected = {
        "steps": round(claims.BUDGET["rulebook"]["steps"] / 4),
        "batch": {"prompts_per_step": 16, "rows_per_forward": 2},
        "rollout": {"teacher_fraction": 1.0},
        "loss": {"direction": "forward_kl"},
    }
    assert asked == [(4, expected), (5, expected)]
    assert said == ["rulebook 4: a way", "rulebook 5: a way"]
    assert "rollout" not in claims.BUDGET["rulebook"]


def test_a_setup_can_be_sent_to_another_process(tmp_path: Path) -> None:
    setup = Setup(tmp_path, (1,))
    assert pickle.loads(pickle.dumps(setup)) == setup
