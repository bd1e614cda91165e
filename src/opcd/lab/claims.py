"""The paper's claims, each as trials in a world of the lab and inequalities between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from opcd.intervals import Estimate
from opcd.lab.minds import MINDS, mind_folder
from opcd.lab.trials import Bench, Marks, Measured
from opcd.lab.verdicts import Comparison, Verdict, over_seeds, overall, paired, pooled
from opcd.lab.worlds import World, WorldName, make_world, run_of

Say = Callable[[str], object]


def be_silent(text: str) -> None:
    """Say nothing; a function with a name, since it is handed to other processes."""
    del text


FORGETS_LITTLE = -0.05
"""Not worse by more than so much counts as kept."""

BUDGET: dict[WorldName, dict[str, Any]] = {
    "code_book": {"steps": 150, "batch": {"prompts_per_step": 16}},
    "rulebook": {"steps": 80, "batch": {"prompts_per_step": 16}},
    "lake": {"steps": 140, "batch": {"prompts_per_step": 6}, "optimizer": {"lr": 2e-4}},
}
"""What every way to train gets in a world: steps, and prompts or boards in each."""
OFF_POLICY: dict[str, Any] = {"rollout": {"teacher_fraction": 1.0}}
FORWARD: dict[str, Any] = {"loss": {"direction": "forward_kl"}}


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a claim's table."""

    condition: str
    figures: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of a claim."""

    claim: str
    world: str
    lines: Sequence[Line]
    comparisons: Sequence[Comparison]
    notes: Sequence[str] = ()
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """By its inequalities alone."""
        return overall(self.comparisons)


@dataclass(frozen=True, slots=True)
class Setup:
    """Where and how often things are tried."""

    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    pace: float = 1.0
    """Share of the steps that a training gets: below 1 it is quicker, and worse."""
    say: Say = be_silent

    @property
    def bench(self) -> Bench:
        """Where trials are kept."""
        return Bench(self.folder / "trials")

    def steps(self, full: int) -> int:
        """Steps of a training that has so many at full pace."""
        return max(1, round(full * self.pace))

    def worlds(self, name: WorldName) -> list[World]:
        """One world of a kind for each seed."""
        return [make_world(name, seed, self.folder / "worlds") for seed in self.seeds]

    def measure(self, name: WorldName, way: str, *changes: Mapping[str, Any]) -> list[Measured]:
        """A way to train, in each of the worlds."""
        found: list[Measured] = []
        for world in self.worlds(name):
            self.say(f"{name} {world.seed}: {way}")
            table = _merge(BUDGET[name], *changes)
            run = run_of(world, **{**table, "steps": self.steps(table["steps"])})
            found.append(self.bench.measure(world, run))
        return found


def gains(setup: Setup) -> Finding:
    """OPCD > off-policy > in-context > base."""
    on = setup.measure("lake", "on-policy")
    off = setup.measure("lake", "off-policy", OFF_POLICY, FORWARD)
    marks = {
        "base": [m.base for m in on],
        "in_context": [m.in_context for m in on],
        "off_policy": [m.baked for m in off],
        "baked": [m.baked for m in on],
    }
    order = ("baked", "off_policy", "in_context", "base")
    pairs = pairwise(order)
    kl_nats = {"off_policy": off, "baked": on}
    return Finding(
        "OPCD beats off-policy distillation, which beats the context in the prompt, which beats "
        "nothing",
        "lake",
        [
            Line(
                name,
                {"solved": pooled(marks[name])}
                | ({"kl_nats_per_token": _kl(kl_nats[name])} if name in kl_nats else {}),
            )
            for name in reversed(order)
        ],
        [Comparison(a, b, "solved", paired(marks[a], marks[b])) for a, b in pairs],
    )


def factorial(setup: Setup) -> Finding:
    """On-policy and reverse KL each matter: the 2 x 2."""
    cells = {
        "on, reverse": (),
        "on, forward": (FORWARD,),
        "off, reverse": (OFF_POLICY,),
        "off, forward": (OFF_POLICY, FORWARD),
    }
    found = {name: setup.measure("rulebook", name, *changes) for name, changes in cells.items()}
    pairs = (
        ("on, reverse", "off, reverse"),
        ("on, forward", "off, forward"),
        ("on, reverse", "on, forward"),
        ("off, reverse", "off, forward"),
    )
    return Finding(
        "Being on-policy and the reverse direction each help by themselves",
        "rulebook",
        _task_lines(found),
        [_right(found, a, b) for a, b in pairs],
    )


def teachers(setup: Setup) -> Finding:
    """A frozen teacher beats a live one; EMA lies between; refresh."""
    longer = {"steps": 120}
    kinds = {
        "frozen": {"type": "frozen"},
        "ema": {"type": "ema", "decay": 0.95},
        "refresh": {"type": "refresh", "every_steps": 20},
        "live": {"type": "live"},
    }
    found = {
        kind: setup.measure("rulebook", f"{kind} teacher", longer, {"teacher": table})
        for kind, table in kinds.items()
    }
    return Finding(
        "A frozen teacher beats a live one, and a running mean lies between them",
        "rulebook",
        [
            Line(
                kind,
                {
                    "right": pooled([m.baked for m in several]),
                    "returned": pooled([m.returned for m in several]),
                    "collapsed": pooled([[float(_has_collapsed(m))] for m in several]),
                },
            )
            for kind, several in found.items()
        ],
        [
            _right(found, "frozen", "live"),
            _right(found, "frozen", "ema"),
            _right(found, "ema", "live"),
        ],
        ["collapsed: the share of runs that end with fewer rows right than their teacher's half"],
    )


def sizes(setup: Setup) -> Finding:
    """Small students cannot use the lessons in context but can have them baked."""
    small = {"model": {"path": str(mind_folder(MINDS["small"]))}}
    teacher = {"teacher": {"type": "frozen", "path": str(mind_folder(MINDS["large"]))}}
    own = setup.measure("lake", "small student, its own teacher", small)
    cross = setup.measure("lake", "small student, large teacher", small, teacher)
    marks = {
        "small, base": [m.base for m in own],
        "small, in_context": [m.in_context for m in own],
        "small, baked by itself": [m.baked for m in own],
        "small, baked by large": [m.baked for m in cross],
    }
    return Finding(
        "A small student that gains little from a context in its prompt can have it baked in by a "
        "large teacher",
        "lake",
        [Line(name, {"solved": pooled(several)}) for name, several in marks.items()],
        [
            Comparison(a, b, "solved", paired(marks[a], marks[b]))
            for a, b in (
                ("small, baked by large", "small, in_context"),
                ("small, baked by large", "small, base"),
            )
        ],
    )


def forgetting(setup: Setup) -> Finding:
    """On-policy forgets less."""
    anchored = {"anchor": {"share": 0.34}, "batch": {"prompts_per_step": 24}}
    found = {
        "on-policy": setup.measure("code_book", "on-policy"),
        "off-policy": setup.measure("code_book", "off-policy", OFF_POLICY, FORWARD),
        "on-policy, anchors": setup.measure("code_book", "on-policy, anchors", anchored),
        "off-policy, anchors": setup.measure(
            "code_book", "off-policy, anchors", OFF_POLICY, FORWARD, anchored
        ),
    }
    others = {name: [m.others for m in several] for name, several in found.items()}
    lines = [
        Line(name, {"right": pooled([m.baked for m in several]), "others": pooled(others[name])})
        for name, several in found.items()
    ]
    before = [m.others_before for m in found["on-policy"]]
    return Finding(
        "On-policy distillation forgets less: other books can still be read from the prompt",
        "code_book",
        [Line("before", {"others": pooled(before)}), *lines],
        [
            Comparison(
                "on-policy",
                "off-policy",
                "others",
                paired(others["on-policy"], others["off-policy"]),
            ),
        ],
        ["others: questions under other code books, which the prompt tells"],
    )


def supports(setup: Setup) -> Finding:
    """A few tokens of support are enough; bare top-k is no divergence."""
    few = {"type": "top_k", "k": 4}
    kinds: dict[str, dict[str, Any]] = {
        "exact": {"type": "exact"},
        "top 4, bucket": {**few, "tail": "bucket"},
        "top 4, renormalised": {**few, "tail": "renormalise"},
        "top 4, dropped": {**few, "tail": "drop"},
    }
    found: dict[str, list[Measured]] = {}
    for lr in (5e-4, 2e-3):
        for kind, support in kinds.items():
            changes = {"loss": {"support": support}, "optimizer": {"lr": lr}}
            found[f"{kind}, lr {lr:g}"] = setup.measure("rulebook", f"{kind}, lr {lr:g}", changes)
    comparisons = [
        Comparison(
            f"top 4, bucket, lr {lr:g}",
            f"exact, lr {lr:g}",
            "right",
            _right(found, f"top 4, bucket, lr {lr:g}", f"exact, lr {lr:g}").difference,
            FORGETS_LITTLE,
        )
        for lr in (5e-4, 2e-3)
    ]
    comparisons += [
        _right(found, f"top 4, bucket, lr {lr:g}", f"top 4, dropped, lr {lr:g}")
        for lr in (5e-4, 2e-3)
    ]
    return Finding(
        "A small top-k with a bucket for the rest is as good as the whole vocabulary, and better "
        "than bare top-k",
        "rulebook",
        _task_lines(found),
        comparisons,
    )


def returning(setup: Setup) -> Finding:
    """The context given again does harm, and the remedy works."""
    term = {"anchor": {"context_return": 0.34}, "batch": {"prompts_per_step": 24}}
    found = {
        "without the term": setup.measure("code_book", "on-policy"),
        "with the term": setup.measure("code_book", "context_return", term),
    }
    before = [m.in_context for m in found["without the term"]]
    returned = {name: [m.returned for m in several] for name, several in found.items()}
    return Finding(
        "The context given again does harm after baking, and a term in the loss mends it",
        "code_book",
        [
            Line("before", {"returned": pooled(before)}),
            *(
                Line(
                    name,
                    {
                        "right": pooled([m.baked for m in several]),
                        "returned": pooled(returned[name]),
                    },
                )
                for name, several in found.items()
            ),
        ],
        [
            Comparison(
                "before",
                "without the term",
                "returned",
                paired(before, returned["without the term"]),
            ),
            Comparison(
                "with the term",
                "without the term",
                "returned",
                paired(returned["with the term"], returned["without the term"]),
            ),
        ],
    )


def _has_collapsed(measured: Measured) -> bool:
    return sum(measured.baked) < sum(measured.in_context) / 2


def _right(found: Mapping[str, Sequence[Measured]], first: str, second: str) -> Comparison:
    marks: dict[str, list[Marks]] = {n: [m.baked for m in found[n]] for n in (first, second)}
    return Comparison(first, second, "right", paired(marks[first], marks[second]))


def _kl(several: Sequence[Measured]) -> Estimate:
    return over_seeds([measured.kl_nats_per_token for measured in several])


def _task_lines(found: Mapping[str, Sequence[Measured]]) -> list[Line]:
    return [
        Line(name, {"right": pooled([m.baked for m in several]), "kl_nats_per_token": _kl(several)})
        for name, several in found.items()
    ]


def _merge(*tables: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged
