"""`opcd.envs.boards`: eight orientations are one board, and splits share none."""

from collections.abc import Iterable
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.envs.boards import (
    SPLITS,
    BoardSource,
    Picture,
    Split,
    board_hash,
    canonical,
    read_board,
    split_boards,
    symmetries,
    write_board,
)
from opcd.errors import GameError

SYMBOLS = {"S": "P", "G": "<>", "F": "_", "H": "o"}


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    row = st.text("SGFH", min_size=columns, max_size=columns)
    return tuple(draw(st.lists(row, min_size=rows, max_size=rows)))


def moved(picture: Picture, swap: bool, down: bool, right: bool) -> Picture:
    """A symmetry of the square by its definition: where each cell comes from."""
    rows, columns = len(picture), len(picture[0])
    found = [
        ["" for _ in range(rows if swap else columns)] for _ in range(columns if swap else rows)
    ]
    for r, c in product(range(rows), range(columns)):
        to_r, to_c = (rows - 1 - r if down else r), (columns - 1 - c if right else c)
        if swap:
            to_r, to_c = to_c, to_r
        found[to_r][to_c] = picture[r][c]
    return tuple("".join(row) for row in found)


FLIPS = tuple(product((False, True), repeat=3))


@given(pictures())
def test_the_eight_symmetries_are_those_of_a_square(picture: Picture) -> None:
    """Against cell by cell arithmetic: swapping the axes or not, mirroring each or not."""
    assert set(symmetries(picture)) == {moved(picture, *flips) for flips in FLIPS}
    assert len(symmetries(picture)) == 8


@given(pictures(), st.sampled_from(FLIPS))
def test_all_orientations_have_one_hash(picture: Picture, flips: tuple[bool, bool, bool]) -> None:
    assert board_hash(moved(picture, *flips)) == board_hash(picture)


@given(pictures(), pictures())
def test_boards_with_one_hash_are_orientations_of_each_other(one: Picture, other: Picture) -> None:
    same = other in {moved(one, *flips) for flips in FLIPS}
    assert (board_hash(one) == board_hash(other)) == same


def test_start_and_goal_are_part_of_the_board() -> None:
    """Holes turned alone make another lake, but for the mirror from the start to the goal."""
    lake = ("SHF", "FFF", "FFG")
    assert board_hash(lake) == board_hash(("SFF", "HFF", "FFG"))
    assert board_hash(lake) == board_hash(("FHS", "FFF", "GFF"))
    assert board_hash(lake) != board_hash(("SFF", "FFF", "FHG"))
    assert board_hash(lake) != board_hash(("GHF", "FFF", "FFS"))


@given(pictures())
def test_text_and_picture_say_the_same(picture: Picture) -> None:
    assert read_board(write_board(picture, SYMBOLS), SYMBOLS) == picture


@pytest.mark.parametrize(
    ("text", "message"),
    [("P x\n_ _", r"\['x'\].*its symbols are"), ("P _\n_", r"\[2, 1\] cells"), ("", "cells")],
)
def test_text_that_is_no_board_is_refused(text: str, message: str) -> None:
    with pytest.raises(GameError, match=message):
        read_board(text, SYMBOLS)


def bits(width: int) -> Iterable[Picture]:
    return [("".join(row),) for row in product("FH", repeat=width)]


def source(width: int = 8, listed: bool = True) -> BoardSource:
    """Rows of ice and holes; a row and its mirror image are one board."""

    def draw(random: Random) -> Picture:
        return ("".join(random.choices("FH", k=width)),)

    return BoardSource(f"rows of {width}", draw, (lambda: bits(width)) if listed else None)


COUNTS: dict[Split, int] = {"train": 20, "extraction": 5, "validation": 6, "test": 7}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_board_is_in_two_splits_in_any_orientation(listed: bool, seed: int) -> None:
    """A test board that was trained on, turned, would measure memory."""
    splits = split_boards(source(listed=listed), COUNTS, seed)
    assert {split: len(boards) for split, boards in splits.items()} == COUNTS
    assert tuple(splits) == SPLITS
    seen: set[Picture] = set()
    for boards in splits.values():
        for board in boards:
            orientations = {moved(board, *flips) for flips in FLIPS}
            assert not orientations & seen
            seen |= orientations


@pytest.mark.parametrize("listed", [True, False])
def test_boards_are_a_function_of_the_seed(listed: bool) -> None:
    first = split_boards(source(listed=listed), COUNTS, 3)
    assert split_boards(source(listed=listed), COUNTS, 3) == first
    assert split_boards(source(listed=listed), COUNTS, 4) != first


@pytest.mark.parametrize("listed", [True, False])
def test_more_boards_to_train_on_leave_the_other_splits_as_they_were(listed: bool) -> None:
    """Results on the test boards stay comparable."""
    few = split_boards(source(listed=listed), COUNTS, 0)
    more = split_boards(source(listed=listed), {**COUNTS, "train": 60}, 0)
    assert more["train"][:20] == few["train"]
    assert {s: more[s] for s in SPLITS[1:]} == {s: few[s] for s in SPLITS[1:]}


def test_every_board_can_be_used_and_not_one_more() -> None:
    """A row of 3 has 8 pictures and 6 boards; the message gives both."""
    all_of_them: dict[Split, int] = {"train": 3, "extraction": 1, "validation": 1, "test": 1}
    splits = split_boards(source(3), all_of_them, 0)
    found = {canonical(board) for boards in splits.values() for board in boards}
    assert found == {canonical(board) for board in bits(3)}
    with pytest.raises(
        GameError, match=r"train 4, .* make 7, but rows of 3 has only 8 boards .* 6 distinct"
    ):
        split_boards(source(3), {**all_of_them, "train": 4}, 0)


def test_drawing_stops_where_nothing_new_comes() -> None:
    with pytest.raises(GameError, match=r"2000 draws in a row, after 6 distinct"):
        split_boards(source(3, listed=False), {"train": 7}, 0)
