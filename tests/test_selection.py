"""`opcd.selection`: every score belongs to its own experience, and chance chooses nothing."""

import json
import random
from pathlib import Path

import pytest

from opcd.selection import (
    Candidate,
    Scored,
    batches,
    choose,
    find_candidates,
    standard_error,
    verdict,
)
from opcd.errors import RunFolderError
from opcd.runs import RoundFolder


def scored(tokens: int, hits: int, rows: int = 100, seed: int = 0, step: int = 1) -> Scored:
    text = f"- {tokens} tokens" if tokens else ""
    marks = (1.0,) * hits + (0.0,) * (rows - hits)
    return Scored(Candidate(seed, step if tokens else 0, text, tokens // 10, tokens), marks)


def test_the_highest_wins_if_it_is_clearly_the_highest() -> None:
    found = choose([scored(0, 20), scored(30, 40), scored(60, 80, step=2)])
    assert found.chosen == found.highest == scored(60, 80, step=2)


def test_what_is_within_one_standard_error_is_as_good_and_the_shortest_of_it_wins() -> None:
    """Of 100 rows at 80 % the standard error is 4 points: 77 is near, 75 is not."""
    found = choose([scored(0, 20), scored(10, 75), scored(30, 77), scored(60, 80, step=2)])
    assert found.chosen.candidate.tokens == 30 and found.highest.candidate.tokens == 60
    assert 0.039 < found.standard_error < 0.041
    assert "the highest is 0.800" in verdict(found)


def test_no_items_can_win_and_that_is_said() -> None:
    found = choose([scored(0, 50), scored(30, 52), scored(60, 49, step=2)])
    assert found.chosen.candidate.text == ""
    assert verdict(found).startswith("no items: 0.500 without any experience")


def test_of_equally_short_ones_the_better_then_the_earlier_wins() -> None:
    worse, better, later = (
        scored(30, 77, seed=0),
        scored(30, 78, seed=1),
        scored(30, 78, seed=1, step=2),
    )
    top = scored(60, 80, step=3)
    assert choose([worse, later, better, top]).chosen == better


def test_the_order_of_the_candidates_is_of_no_account() -> None:
    source = random.Random(3)
    candidates = [
        scored(10 * source.randrange(5), source.randrange(40, 60), seed=seed, step=step)
        for seed in range(3)
        for step in range(1, 6)
    ]
    first = choose(candidates)
    for _ in range(20):
        source.shuffle(candidates)
        again = choose(candidates)
        assert again.chosen == first.chosen and again.standard_error == first.standard_error


@pytest.mark.parametrize("mark", [0.0, 1.0])
def test_a_share_of_none_or_all_has_an_error_too(mark: float) -> None:
    """Else five rows out of five could not be told from five hundred."""
    few, many = standard_error([mark] * 5), standard_error([mark] * 500)
    assert 0.1 < few < 0.2 and 0.0 < many < 0.01


def test_other_metrics_have_the_error_of_their_own_spread() -> None:
    assert standard_error([2.0, 4.0, 6.0, 8.0]) == pytest.approx(2.581989 / 2)


def test_candidates_are_none_the_last_and_every_so_many(tmp_path: Path) -> None:
    """A candidate's step is that of its file: the text after so many traces."""
    for seed, last in ((0, 5), (1, 4), (10, 2)):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        for step in range(last + 1):
            text = "".join(f"- item {i} of {seed}\n" for i in range(step))
            (folder / f"experience-{step:03d}.md").write_text(text, encoding="utf-8")
    found = find_candidates(RoundFolder(tmp_path), 3, lambda text: len(text.split()))
    assert [(c.seed, c.step) for c in found] == [
        (0, 0), (0, 3), (0, 5), (1, 0), (1, 3), (1, 4), (10, 0), (10, 2),
    ]  # fmt: skip
    assert [c.items for c in found] == [c.step for c in found]
    assert all(c.name.endswith(f"seed-{c.seed}/experience-{c.step:03d}.md") for c in found)
    assert found[0].tokens == 0 and found[1].tokens == 15
    assert found[1].text == "- item 0 of 0\n- item 1 of 0\n- item 2 of 0"


def test_without_experiences_there_is_nothing_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="has no experiences to choose from"):
        find_candidates(RoundFolder(tmp_path), 1, len)


def test_short_candidates_share_a_call_and_long_ones_have_their_own() -> None:
    """A batch holds at most the engine's rows; a long text is read once, not once a row."""
    short = [Candidate(0, i, f"- {i}", 1, 20) for i in range(5)]
    assert [len(b) for b in batches(short, 30, 64)] == [2, 2, 1]
    assert [len(b) for b in batches(short, 100, 64)] == [1] * 5, "more rows than a batch"
    assert [len(b) for b in batches(short, 30, 0)] == [1] * 5
    long = [Candidate(0, i, f"- {i}", 1, 3000) for i in range(3)]
    assert [len(b) for b in batches([*short[:1], *long], 4, 64)] == [1, 1, 1, 1]
    assert [one for batch in batches(short, 30, 64) for one in batch] == short
