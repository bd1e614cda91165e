"""Claims: inequalities that point the right way, and tables that show every condition."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from opcd.lab import claims, verdicts
from opcd.lab.setups import Finding, Setup
from opcd.lab.trials import Measured

ROWS = 60
Share = Callable[[str], Mapping[str, float]]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The differences here are far from 0: coarse intervals will do."""
    monkeypatch.setattr(verdicts, "DRAWS", 100)


def marks(share: float) -> list[float]:
    """So many of the rows right, always the first ones."""
    return [float(row < share * ROWS) for row in range(ROWS)]


MARKS = (
    *("base", "in_context", "baked", "returned"),
    *("others_before", "others", "other_task_before", "other_task"),
)


def measured(kl_nats: float = 0.1, **shares: float) -> Measured:
    found: Any = {name: marks(shares.get(name, 0.5)) for name in MARKS}
    return Measured(
        **found,
        kl_nats=[kl_nats] * ROWS,
        kept_kl_nats_per_token=0.3,
        best_step=9,
        least_entropy_nats=0.1,
        wall_s=1.0,
    )


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
        "baked": 0.7 if way.startswith("off-policy") else 1.0,
    },
    "factorial": lambda way: {
        "baked": {"on, reverse": 1.0, "off, forward": 0.1}.get(way, 0.5),
    },
    "teachers": lambda way: {"baked": {"frozen": 1.0, "ema": 0.5}.get(way.split()[0], 0.1)},
    "sizes": lambda way: {"base": 0.1, "in_context": 0.3, "baked": 1.0 if "large" in way else 0.5},
    "forgetting": lambda way: dict.fromkeys(
        ("others", "other_task"), 0.9 if way == "on, reverse" else 0.3
    ),
    "supports": lambda way: {
        "baked": 0.2 if "dropped" in way else 0.9,
        "kl_nats": 3.0 if "dropped" in way else 0.1,
    },
    "returning": lambda way: {"in_context": 1.0, "returned": 0.9 if "return" in way else 0.3},
}
"""What is measured where the paper is right."""
WORSE: dict[str, Share] = {
    "gains": lambda way: {
        "base": 0.1,
        "in_context": 0.4,
        "baked": 1.0 if way.startswith("off-policy") else 0.7,
    },
    "factorial": lambda way: {"baked": {"on, reverse": 0.1, "off, forward": 1.0}.get(way, 0.5)},
    "teachers": lambda way: {"baked": {"frozen": 0.1, "ema": 0.5}.get(way.split()[0], 1.0)},
    "sizes": lambda way: {"base": 0.1, "in_context": 0.8, "baked": 0.5},
    "forgetting": lambda way: {"other_task": 0.3 if way == "on, reverse" else 0.9},
    "supports": lambda way: {"kl_nats": 0.1 if "dropped" in way else 3.0},
    "returning": lambda way: {"in_context": 0.3, "returned": 0.3 if "return" in way else 0.9},
}
"""And where it is wrong."""
PLACES = ("lake, large", "lake, middle", "rulebook")
CONDITIONS = {
    "gains": {f"{p}: {c}" for p in PLACES for c in ("base", "in_context", "off_policy", "baked")},
    "factorial": {"on, reverse", "on, forward", "off, reverse", "off, forward"},
    "teachers": {"frozen", "ema", "refresh", "live"},
    "sizes": {
        f"{size}, {condition}"
        for size in ("middle", "small")
        for condition in ("base", "in_context", "baked by itself", "baked by large")
    },
    "forgetting": {
        "before",
        *("on, reverse", "on, forward, then reverse", "on, forward"),
        *("off, reverse", "off, forward"),
        *("on, forward, then reverse, anchors", "off, forward, anchors"),
    },
    "supports": {f"{kind}, lr {lr:g}" for kind in claims.SUPPORTS for lr in claims.RATES},
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
    shown = {line.condition: line.figures["right"].mean for line in one.lines}
    expected = {"base": 0.1, "in_context": 0.4, "off_policy": 0.7, "baked": 1.0}
    for place in PLACES:
        assert {name: shown[f"{place}: {name}"] for name in expected} == pytest.approx(expected)
    teachers = found(claims.teachers, setup, monkeypatch, BETTER["teachers"])
    # Half of in_context, 0.5, is the line below which a run has collapsed.
    collapsed = {line.condition: line.figures["collapsed"].mean for line in teachers.lines}
    assert collapsed == {"frozen": 0.0, "ema": 0.0, "refresh": 1.0, "live": 1.0}


def test_what_is_little_worse_is_as_good(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The support's margin: as good as exact is not better than exact."""
    one = found(claims.supports, setup, monkeypatch, BETTER["supports"])
    margins = {(c.second.split(", lr")[0], c.metric): c.margin for c in one.comparisons}
    assert margins == {
        ("exact", "right"): claims.KEEPS_SHARE,
        ("exact", "kl_nats_per_token"): claims.KEEPS_NATS,
        ("top 4, dropped", "right"): 0.0,
        ("top 4, dropped", "kl_nats_per_token"): 0.0,
    }


def test_nearer_to_the_teacher_is_better(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences are such that more is better; of a KL that is what it is less."""
    one = found(claims.supports, setup, monkeypatch, BETTER["supports"])
    less = [c.difference.mean for c in one.comparisons if c.metric == "kl_nats_per_token"]
    assert less == pytest.approx([0.0, 2.9] * len(claims.RATES))


def test_forgetting_is_of_both_suites(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other truths of the same kind, and another kind of task, each beside what it was before."""
    one = found(
        claims.forgetting,
        setup,
        monkeypatch,
        lambda _: {"others_before": 1.0, "other_task_before": 0.8, "other_task": 0.2},
    )
    before, *after = one.lines
    assert [before.figures[m].mean for m in ("others", "other_task")] == pytest.approx([1.0, 0.8])
    assert all(line.figures["other_task"].mean == pytest.approx(0.2) for line in after)
    assert all(line.figures["kl_nats_per_token"].mean == pytest.approx(0.3) for line in after)
