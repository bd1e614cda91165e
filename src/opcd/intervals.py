"""How sure a measured mean is, and whether two conditions differ. Plain numbers, no tensors."""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

BOOTSTRAP_DRAWS = 2000
Z_95 = 1.959964
SIGNIFICANT = 0.05
"""A p below it counts as more than chance."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, Any]:
        """The form it has in `evaluation.json`."""
        return {"mean": self.mean, "ci95": [self.low, self.high], "n": self.n}


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Wilson's interval where all values are 0 or 1, else a percentile bootstrap."""
    assert values, "a mean of nothing"
    mean = sum(values) / len(values)
    if set(values) <= {0.0, 1.0}:
        return Estimate(mean, *wilson(mean, len(values)), len(values))
    return Estimate(mean, *bootstrap(values, seed), len(values))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share of `n`; unlike the normal one, sound at 0 and 1."""
    spread = Z_95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the mean over resampled rows."""
    source = random.Random(seed)
    means = sorted(
        sum(source.choices(values, k=len(values))) / len(values) for _ in range(BOOTSTRAP_DRAWS)
    )
    return means[int(0.025 * BOOTSTRAP_DRAWS)], means[int(0.975 * BOOTSTRAP_DRAWS) - 1]


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided p-value that two conditions, graded 0 or 1 on the same rows, are alike.

    Only the rows on which they differ tell anything; under the null either side wins with 1/2.
    """
    first_only = sum(a > b for a, b in zip(first, second, strict=True))
    second_only = sum(b > a for a, b in zip(first, second, strict=True))
    discordant = first_only + second_only
    fewer = min(first_only, second_only)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    return min(1.0, 2 * tail)
