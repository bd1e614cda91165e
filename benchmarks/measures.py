"""From repeated measurements to figures that may be printed. Plain arithmetic; knows no library.

A figure is the median of its repetitions. Where they differ by more than `MOST_SPREAD` of it, the
run has not reproduced the figure, and `not reproducible` stands in its place.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_SPREAD = 0.25
"""Of a median: how far the highest and the lowest repetition may be apart."""
UNSTABLE = "not reproducible"


@dataclass(frozen=True)
class Figure:
    """A median and what it hangs on."""

    median: float
    lowest: float
    highest: float
    repetitions: int

    @property
    def spread(self) -> float:
        """The distance of the highest from the lowest, as a share of the median."""
        return (self.highest - self.lowest) / self.median if self.median else 0.0

    @property
    def is_reproduced(self) -> bool:
        """Whether there are repetitions and they agree."""
        return self.repetitions > 1 and self.spread <= MOST_SPREAD


@dataclass(frozen=True)
class Goal:
    """What was to be reached."""

    words: str
    most: float
    """The figure should be at most this."""


def summarise(values: Sequence[float]) -> Figure:
    """The figure of some repetitions."""
    return Figure(statistics.median(values), min(values), max(values), len(values))


def pair_ratios(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Ours over theirs, one ratio for each turn in which both were measured."""
    return summarise([a / b for a, b in zip(ours, theirs, strict=True)])


def column(steps: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """One measured quantity over the repetitions."""
    return [step[name] for step in steps]


def show(figure: Figure, digits: int = 2) -> str:
    """A median with its range, or that it was not reproduced."""
    if not figure.is_reproduced:
        return UNSTABLE
    low, high = f"{figure.lowest:.{digits}f}", f"{figure.highest:.{digits}f}"
    return f"{figure.median:.{digits}f} [{low}, {high}]"


def show_plain(figure: Figure, digits: int = 2) -> str:
    """A median alone, or that it was not reproduced."""
    return f"{figure.median:.{digits}f}" if figure.is_reproduced else UNSTABLE


def judge(figure: Figure, goal: Goal) -> tuple[str, str, str, str]:
    """A row of the table of goals: what, wanted, found, and whether it was reached."""
    wanted = f"at most {goal.most:.2f}"
    if not figure.is_reproduced:
        return goal.words, wanted, UNSTABLE, "-"
    reached = "yes" if figure.median <= goal.most else "no"
    return goal.words, wanted, show(figure), reached


def faster(candidates: Mapping[str, Sequence[float]]) -> str:
    """The name whose median is the lowest."""
    return min(candidates, key=lambda name: statistics.median(candidates[name]))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
