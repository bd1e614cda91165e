"""Boards as pictures of letters: their text, their symmetries, and splits that share none.

A picture shows everything that makes a board: start and goal, player and boxes too. Two boards are
the same if one is the other turned or mirrored, whole. A Frozen Lake starts in one corner and ends
in the opposite one, so that among its boards only the mirror on that diagonal maps one to another;
turning the holes alone by half makes another board, which is walked from the other end. Comparing
whole pictures gets this right for every game without knowing its letters.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Literal

from opcd.envs.env import Cell
from opcd.errors import GameError

Picture = tuple[str, ...]
"""Rows of one letter a cell, from the top."""
Split = Literal["train", "extraction", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "extraction", "validation", "test")
PATIENCE = 2_000
"""Draws in a row without a new board after which there are taken to be no more."""


@dataclass(frozen=True, slots=True)
class BoardSource:
    """Where the boards of a game come from."""

    name: str
    """For people, and for the seed: `frozen_lake 3x3 with 2 holes`."""
    draw: Callable[[Random], Picture]
    """A random board that can be solved."""
    every: Callable[[], Iterable[Picture]] | None = None
    """All boards that can be solved, where they are few enough to be listed."""


def cells_of(picture: Picture) -> dict[Cell, str]:
    """The letter of each cell."""
    return {(r, c): letter for r, row in enumerate(picture) for c, letter in enumerate(row)}


def symmetries(picture: Picture) -> tuple[Picture, ...]:
    """The picture in its eight orientations: four turns, each as it is and mirrored."""
    found: list[Picture] = []
    for _ in range(4):
        found += [picture, tuple(row[::-1] for row in picture)]
        picture = tuple("".join(column) for column in zip(*picture[::-1], strict=True))
    return tuple(found)


def canonical(picture: Picture) -> Picture:
    """The one orientation that stands for all eight."""
    return min(symmetries(picture))


def board_hash(picture: Picture) -> str:
    """A name of the board that is the same in every orientation."""
    return hashlib.sha256("\n".join(canonical(picture)).encode()).hexdigest()


def write_board(picture: Picture, symbols: Mapping[str, str]) -> str:
    """The picture as text, a symbol for each letter, with spaces between them."""
    return "\n".join(" ".join(symbols[letter] for letter in row) for row in picture)


def read_board(text: str, symbols: Mapping[str, str]) -> Picture:
    """The picture that a text shows.

    Raises:
        GameError: a symbol is unknown, or the rows are not equally long.
    """
    letters = {symbol: letter for letter, symbol in symbols.items()}
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if unknown := {symbol for row in rows for symbol in row} - letters.keys():
        raise GameError(
            f"the board has {sorted(unknown)}, but its symbols are {sorted(letters)}; write one "
            "of these in each cell, with spaces between them"
        )
    if len({len(row) for row in rows}) != 1:
        raise GameError(
            f"the board's rows have {[len(row) for row in rows]} cells; give all of them the same "
            "number"
        )
    return tuple("".join(letters[symbol] for symbol in row) for row in rows)


def split_boards(
    source: BoardSource, counts: Mapping[Split, int], seed: int
) -> dict[Split, tuple[Picture, ...]]:
    """So many boards for each split; none of one is in another, in any orientation.

    The boards are a function of the source and the seed, and `train` takes what the other splits
    leave: with more boards to train on, those of validation and test stay what they were.

    Raises:
        GameError: there are fewer distinct boards than asked for.
    """
    wanted = sum(counts.values())
    boards = _distinct(source, wanted, seed)
    if len(boards) < wanted:
        raise GameError(_too_few(source, counts, len(boards)))
    found: dict[Split, tuple[Picture, ...]] = {}
    start = 0
    for split in reversed(SPLITS):
        end = start + counts.get(split, 0)
        found[split] = tuple(boards[start:end])
        start = end
    return {split: found[split] for split in SPLITS}


def _distinct(source: BoardSource, wanted: int, seed: int) -> list[Picture]:
    """The first distinct boards; which they are does not depend on how many are wanted."""
    random = Random(f"{seed}/{source.name}")
    kept: dict[str, Picture] = {}
    in_vain = 0
    for board in _stream(source, random):
        if len(kept) == wanted or (source.every is None and in_vain == PATIENCE):
            break
        known = len(kept)
        kept.setdefault(board_hash(board), board)
        in_vain = 0 if len(kept) > known else in_vain + 1
    return list(kept.values())


def _stream(source: BoardSource, random: Random) -> Iterator[Picture]:
    if source.every is not None:
        listed = list(source.every())
        random.shuffle(listed)
        yield from listed
        return
    while True:
        yield source.draw(random)


def _too_few(source: BoardSource, counts: Mapping[Split, int], distinct: int) -> str:
    asked = ", ".join(f"{split} {counts.get(split, 0)}" for split in SPLITS)
    if source.every is not None:
        there = f"has only {len(list(source.every()))} boards that can be solved, {distinct}"
    else:
        there = f"gave no new board in {PATIENCE} draws in a row, after {distinct}"
    return (
        f"boards: {asked} make {sum(counts.values())}, but {source.name} {there} distinct under "
        "rotation and reflection, and no board may be in two splits; ask for fewer boards, or take "
        "a larger size"
    )
