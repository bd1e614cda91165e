"""Intervals and paired tests against textbook values and brute force."""

import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.intervals import bootstrap, estimate, mcnemar, wilson

BITS = st.sampled_from([0.0, 1.0])


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 1 - 0.1170, 1.0),
    ],
)
def test_wilson_matches_published_values(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits / n, n) == pytest.approx((low, high), abs=6e-5)


@given(n=st.integers(1, 500), data=st.data())
def test_wilson_bounds_solve_the_score_equation(n: int, data: st.DataObject) -> None:
    """Each bound is the share p0 at which the observed share lies 1.96 standard errors away."""
    hits = data.draw(st.integers(0, n))
    share, bounds = hits / n, wilson(hits / n, n)
    assert 0.0 <= bounds[0] <= share + 1e-12
    assert share - 1e-12 <= bounds[1] <= 1.0
    for bound in bounds:
        if 1e-9 < bound < 1 - 1e-9:
            z = abs(share - bound) / math.sqrt(bound * (1 - bound) / n)
            assert z == pytest.approx(1.959964, rel=1e-6)


@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_covers_the_true_mean(skewed: bool) -> None:
    """A 95 % interval from 40 values holds the true mean in about 95 of 100 samples."""
    source = random.Random(1)
    covered = 0
    for seed in range(60):
        sample = [source.expovariate(1.0) if skewed else source.gauss(1.0, 1.0) for _ in range(40)]
        low, high = bootstrap(sample, seed)
        covered += low <= 1.0 <= high
    assert 51 <= covered <= 60


def test_bootstrap_is_as_wide_as_the_standard_error() -> None:
    source = random.Random(2)
    values = [source.gauss(0.0, 3.0) for _ in range(300)]
    mean = sum(values) / 300
    error = math.sqrt(sum((v - mean) ** 2 for v in values)) / 300
    low, high = bootstrap(values, seed=0)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=error / 6)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    values = [0.1, 0.5, 0.9, 2.0]
    assert bootstrap(values, 3) == bootstrap(values, 3)


def test_estimate_takes_wilson_for_shares_and_bootstrap_for_the_rest() -> None:
    shares, numbers = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.5]
    assert estimate(shares)[1:3] == wilson(0.75, 4)
    assert estimate(numbers, seed=5)[1:3] == bootstrap(numbers, 5)


def test_estimate_is_sound_where_all_values_are_alike() -> None:
    """All right in 20 is no proof of 100 %: the interval must not have width 0."""
    found = estimate([1.0] * 20)
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - 0.1611, abs=1e-3)


def test_an_estimate_has_the_form_of_evaluation_json() -> None:
    found = estimate([0.5, 0.5])
    assert found.as_json() == {"mean": 0.5, "ci95": [0.5, 0.5], "n": 2}


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="mean of nothing"):
        estimate([])


@given(st.lists(st.tuples(BITS, BITS), max_size=12))
def test_mcnemar_is_the_brute_force_binomial_test(pairs: list[tuple[float, float]]) -> None:
    """Sum the probability of every way the differing rows could fall that is at least as uneven."""
    differing = [a > b for a, b in pairs if a != b]
    n, fewer = len(differing), min(sum(differing), len(differing) - sum(differing))
    outcomes = [min(sum(o), n - sum(o)) <= fewer for o in product((0, 1), repeat=n)]
    expected = sum(outcomes) / len(outcomes)
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    assert mcnemar(first, second) == pytest.approx(expected, abs=1e-12)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_matches_a_textbook_value() -> None:
    """Ten rows differ, one of them the other way: p = 2 * (1 + 10) / 1024."""
    first = [1.0] * 9 + [0.0] + [1.0] * 30
    second = [0.0] * 9 + [1.0] + [1.0] * 30
    assert mcnemar(first, second) == pytest.approx(22 / 1024)


def test_mcnemar_refuses_rows_that_are_not_paired() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([1.0, 0.0], [1.0])
