"""How claims are tried: ways to train in the worlds of the lab, and what a finding is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opcd.intervals import Estimate
from opcd.lab.trials import Bench, Measured
from opcd.lab.verdicts import Comparison, Verdict, overall
from opcd.lab.worlds import World, WorldName, make_world, run_of

Say = Callable[[str], object]


def be_silent(text: str) -> None:
    """Say nothing; a function with a name, since it is handed to other processes."""
    del text


BUDGET: dict[WorldName, dict[str, Any]] = {
    "code_book": {
        "steps": 150,
        "batch": {"prompts_per_step": 16},
        "optimizer": {"lr": 1e-3, "schedule": "linear"},
    },
    "rulebook": {"steps": 80, "batch": {"prompts_per_step": 16}, "optimizer": {"lr": 5e-4}},
    "lake": {
        "steps": 140,
        "batch": {"prompts_per_step": 6},
        "optimizer": {"lr": 3e-4, "schedule": "linear"},
        # What users of a real run get is its best step, chosen on validation boards.
        "evaluation": {"every_steps": 35},
    },
}
"""What every way to train gets in a world: steps, and prompts or boards in each."""
OFF_POLICY: dict[str, Any] = {"rollout": {"teacher_fraction": 1.0}}
FORWARD: dict[str, Any] = {"loss": {"direction": "forward_kl", "warmup": None}}
REVERSE: dict[str, Any] = {"loss": {"direction": "reverse_kl", "warmup": None}}
WARMED: dict[str, Any] = {"loss": {"warmup": {"direction": "forward_kl", "steps": 50}}}
"""Forward KL first, then reverse: the way real runs take."""


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

    def at_pace(self, table: dict[str, Any]) -> dict[str, Any]:
        """A run's tables with their steps at this pace, those of a warm-up too."""
        table = {**table, "steps": self.steps(table["steps"])}
        if every := table.get("evaluation", {}).get("every_steps"):
            table["evaluation"] = {**table["evaluation"], "every_steps": self.steps(every)}
        if warmup := table.get("loss", {}).get("warmup"):
            slower = {**warmup, "steps": self.steps(warmup["steps"])}
            table["loss"] = {**table["loss"], "warmup": slower}
        return table

    def worlds(self, name: WorldName) -> list[World]:
        """One world of a kind for each seed."""
        return [make_world(name, seed, self.folder / "worlds") for seed in self.seeds]

    def measure(self, name: WorldName, way: str, *changes: Mapping[str, Any]) -> list[Measured]:
        """A way to train, in each of the worlds."""
        found: list[Measured] = []
        for world in self.worlds(name):
            self.say(f"{name} {world.seed}: {way}")
            run = run_of(world, **self.at_pace(merge(BUDGET[name], *changes)))
            found.append(self.bench.measure(world, run))
        return found


def merge(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """Tables laid over each other, and the tables in them too."""
    merged: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged
