"""Verdicts: intervals that cover the truth, and claims that are decided by them alone."""

import math
import statistics
from random import Random

import pytest

from opcd.intervals import Estimate
from opcd.lab import verdicts
from opcd.lab.verdicts import Comparison, Verdict, over_seeds, overall, paired, pooled


def comparison(low: float, high: float, margin: float = 0.0) -> Comparison:
    return Comparison("a", "b", "right", Estimate((low + high) / 2, low, high, 10), margin)


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.01, 0.2, 0.0, "holds"),
        (-0.2, -0.01, 0.0, "does not hold"),
        (-0.01, 0.2, 0.0, "undecided"),
        # An end on the margin decides nothing.
        (0.0, 0.2, 0.0, "undecided"),
        (-0.2, 0.0, 0.0, "undecided"),
        # With a margin, a little worse is not worse ...
        (-0.04, 0.01, -0.05, "holds"),
        (-0.2, -0.06, -0.05, "does not hold"),
        (-0.06, 0.01, -0.05, "undecided"),
        # ... and with a positive one, a little better is not better.
        (0.01, 0.04, 0.05, "does not hold"),
        (-math.inf, math.inf, 0.0, "undecided"),
    ],
)
def test_a_comparison_is_decided_by_its_interval(
    low: float, high: float, margin: float, verdict: Verdict
) -> None:
    assert comparison(low, high, margin).verdict == verdict


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ("h", "holds"),
        ("hh", "holds"),
        ("hu", "undecided"),
        ("u", "undecided"),
        ("hun", "does not hold"),
        ("n", "does not hold"),
        ("", "undecided"),
    ],
)
def test_a_claim_is_decided_by_its_comparisons(parts: str, verdict: Verdict) -> None:
    """Nothing compared is nothing shown."""
    kinds = {"h": (0.1, 0.2), "u": (-0.1, 0.1), "n": (-0.2, -0.1)}
    assert overall([comparison(*kinds[part]) for part in parts]) == verdict


def test_pooled_is_the_mean_of_all_rows() -> None:
    found = pooled([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert found.mean == pytest.approx(4 / 6) and found.n == 6
    assert 0.0 <= found.low < found.mean < found.high <= 1.0
    assert found == pooled([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), "the same every time"
    assert pooled([[1.0] * 5] * 2)[:3] == (1.0, 1.0, 1.0)


def test_pooled_draws_seeds_and_rows() -> None:
    """Exact where rows of a seed are alike: means of 2 draws from 0 and 1 are 0, 1/2, 1/2, 1."""
    assert pooled([[0.0] * 50, [1.0] * 50])[:3] == (0.5, 0.0, 1.0)
    # And rows are drawn within one seed: the spread is that of a share of 100.
    low, high = pooled([[0.0] * 50 + [1.0] * 50])[1:3]
    assert 0.5 - low == pytest.approx(1.96 * 0.05, rel=0.15) == high - 0.5


def test_paired_is_pooled_over_differences() -> None:
    first, second = [[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    differences = [[1.0, 0.0, 0.0], [0.0, -1.0, 1.0]]
    assert paired(first, second) == pooled(differences)
    swapped = paired(second, first)
    assert swapped.mean == -paired(first, second).mean
    with pytest.raises(ValueError):
        paired(first, [[1.0], [1.0]])


@pytest.mark.parametrize("effect", [0.0, 0.2])
def test_intervals_cover_the_truth(effect: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds whose rows differ by chance alone: at least 19 of 20 intervals hold the truth."""
    monkeypatch.setattr(verdicts, "DRAWS", 200)
    random, times = Random(1), 200
    covered = 0
    for number in range(times):
        rows = [[float(random.random() < 0.5 + effect) for _ in range(40)] for _ in range(3)]
        found = pooled(rows, seed=number)
        covered += found.low <= 0.5 + effect <= found.high
    assert covered / times > 0.93


def test_students_intervals_cover_the_truth() -> None:
    random, times = Random(2), 2000
    for count in (2, 3, 5):
        drawn = [over_seeds([random.gauss(3, 1) for _ in range(count)]) for _ in range(times)]
        covered = sum(found.low <= 3 <= found.high for found in drawn) / times
        assert covered == pytest.approx(0.95, abs=0.02), count


def test_over_seeds_by_hand() -> None:
    values = [1.0, 2.0, 6.0]
    found = over_seeds(values)
    half = 4.303 * statistics.stdev(values) / 3**0.5
    assert found == pytest.approx((3.0, 3.0 - half, 3.0 + half, 3))
    assert over_seeds([2.0]) == (2.0, -math.inf, math.inf, 1)
