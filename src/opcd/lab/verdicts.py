"""What the lab says of a claim, decided by intervals and never by hand."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from opcd.intervals import Estimate

Verdict = Literal["holds", "does not hold", "undecided"]
DRAWS = 2000
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t by degrees of freedom; 1.96 beyond."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One inequality of a claim: the first is better than the second by more than `margin`."""

    first: str
    second: str
    metric: str
    difference: Estimate
    """First less second, such that more is better."""
    margin: float = 0.0
    """Negative where the first must only not be worse by so much."""

    @property
    def verdict(self) -> Verdict:
        """Holds where the whole interval is above the margin."""
        if self.difference.low > self.margin:
            return "holds"
        return "does not hold" if self.difference.high < self.margin else "undecided"


def overall(comparisons: Sequence[Comparison]) -> Verdict:
    """A claim holds if all its inequalities do, and does not if one of them does not."""
    found = {comparison.verdict for comparison in comparisons}
    if "does not hold" in found:
        return "does not hold"
    return "holds" if found == {"holds"} else "undecided"


def pooled(seeds: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The mean over seeds and rows; its interval by drawing seeds, then rows, with replacement."""
    flat = [value for rows in seeds for value in rows]
    random, means = Random(seed), []
    for _ in range(DRAWS):
        drawn: list[float] = []
        for rows in random.choices(seeds, k=len(seeds)):
            drawn += random.choices(rows, k=len(rows))
        means.append(statistics.fmean(drawn))
    means.sort()
    low, high = means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS) - 1]
    return Estimate(statistics.fmean(flat), low, high, len(flat))


def paired(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Estimate:
    """The difference on the same rows of the same seeds."""
    rows = [
        [a - b for a, b in zip(one, other, strict=True)]
        for one, other in zip(first, second, strict=True)
    ]
    return pooled(rows)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one figure a seed, with Student's interval."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = T_975.get(count - 1, 1.96) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)
