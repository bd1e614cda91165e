"""Frozen Lake as text, on gymnasium's own dynamics: cross the ice, around the holes.

Letters of a picture are gymnasium's: S start, G goal, H hole, F ice. What gymnasium leaves open is
decided here: a step off the board is invalid (gymnasium would stay in place), and boards can be
solved within a number of moves. A slip against the edge stays in place and is valid: the player
meant a step that could be taken.
"""

import importlib
from collections.abc import Iterator
from itertools import combinations
from math import comb
from random import Random
from typing import Any

from opcd.config.games import FrozenLake, LakeSymbols
from opcd.envs.boards import BoardSource, Picture, cells_of, write_board
from opcd.envs.env import Action, Cell, Effect, beside, waves
from opcd.errors import GameError

START, GOAL, HOLE, ICE = "SGHF"
MOST_LISTED = 10_000
"""Placements of holes up to which all of them are looked at."""
TRIES = 10_000
"""Random placements after which there is taken to be none that can be solved."""
GYMNASIUM_ACTIONS: dict[Action, int] = {"left": 0, "down": 1, "right": 2, "up": 3}


class LakeWorld:
    """One lake, its ice and its player: a `World`."""

    def __init__(self, picture: Picture, config: FrozenLake, seed: int) -> None:
        """Put the player on the start.

        Args:
            picture: the board.
            config: whether it is slippery, and how it is written.
            seed: decides where each step on slippery ice goes.

        Raises:
            GameError: the picture is no lake, or gymnasium is not installed.
        """
        _check_lake(picture)
        self._picture = picture
        self._symbols = config.symbols
        self._lake = _load_gymnasium().FrozenLakeEnv(
            desc=list(picture), is_slippery=config.slippery, success_rate=config.success_rate
        )
        self._state, _ = self._lake.reset(seed=seed)

    @property
    def text(self) -> str:
        """The board; under the player, nothing else is seen."""
        rows = [list(row.replace(START, ICE)) for row in self._picture]
        row, column = self._position
        rows[row][column] = START
        return write_board(tuple("".join(row) for row in rows), lake_symbols(self._symbols))

    def move(self, action: Action) -> Effect:
        """Step that way, or where the ice takes one."""
        if beside(self._position, action) not in cells_of(self._picture):
            return Effect(f"You cannot go {action}: there the board ends.", valid=False)
        self._state = self._lake.step(GYMNASIUM_ACTIONS[action])[0]
        row, column = self._position
        match self._picture[row][column]:
            case "G":
                return Effect(f"You reached {self._symbols.goal}: solved.", verdict="solved")
            case "H":
                return Effect(f"You fell into {self._symbols.hole}: lost.", verdict="failed")
            case _:
                return Effect()

    @property
    def _position(self) -> Cell:
        row, column = divmod(self._state, len(self._picture[0]))
        return row, column


def lake_source(config: FrozenLake) -> BoardSource:
    """The boards of a lake that can be solved within its turns; all of them, if they are few."""
    size, holes = config.size, config.holes
    free = size**2 - 2
    listed = comb(free, holes) <= MOST_LISTED
    return BoardSource(
        f"frozen_lake {size}x{size} with {holes} holes and {config.turns} turns",
        lambda random: draw_lake(size, holes, config.turns, random),
        (lambda: every_lake(size, holes, config.turns)) if listed else None,
    )


def every_lake(size: int, holes: int, moves: int) -> Iterator[Picture]:
    """All boards that can be solved in so many moves."""
    for chosen in combinations(range(1, size**2 - 1), holes):
        picture = _picture(size, chosen)
        if _solvable(picture, moves):
            yield picture


def draw_lake(size: int, holes: int, moves: int, random: Random) -> Picture:
    """A random board that can be solved in so many moves; all are equally likely.

    Raises:
        GameError: none was found.
    """
    for _ in range(TRIES):
        picture = _picture(size, random.sample(range(1, size**2 - 1), holes))
        if _solvable(picture, moves):
            return picture
    raise GameError(
        f"none of {TRIES} random lakes of {size}x{size} with {holes} holes can be solved in "
        f"{moves} moves; take fewer holes, or more turns"
    )


def shortest_path(picture: Picture) -> int | None:
    """The fewest moves from start to goal on ice that does not slip; `None` without a path."""
    cells = cells_of(picture)
    where = {letter: cell for cell, letter in cells.items()}
    reached = enumerate(waves(where[START], (c for c, letter in cells.items() if letter != HOLE)))
    return next((moves for moves, wave in reached if where[GOAL] in wave), None)


def lake_symbols(symbols: LakeSymbols) -> dict[str, str]:
    """Letter -> symbol; the start shows the player, who stands there."""
    return {START: symbols.player, GOAL: symbols.goal, HOLE: symbols.hole, ICE: symbols.ice}


def lake_rules(config: FrozenLake) -> str:
    """What the player has to know, in the symbols that are in use."""
    symbols = config.symbols
    slips = (
        f"The ice is slippery: a step goes where you mean it to with a chance of "
        f"{config.success_rate:.3g}, and otherwise off to one side or the other, at a right angle. "
        if config.slippery
        else ""
    )
    return (
        f"{symbols.player} stands on a frozen lake and has to reach {symbols.goal}. Each action is "
        f"one step. {symbols.ice} is ice, which is safe; {symbols.hole} is a hole: whoever steps "
        f"onto it has lost. {slips}Nobody can leave the board."
    )


def _check_lake(picture: Picture) -> None:
    letters = "".join(picture)
    starts, goals = letters.count(START), letters.count(GOAL)
    if (starts, goals) != (1, 1) or set(letters) - {START, GOAL, HOLE, ICE}:
        raise GameError(
            f"a board with {starts} starts and {goals} goals, of the letters "
            f"{sorted(set(letters))}, is no lake; draw one S, one G, and else only F and H"
        )


def _solvable(picture: Picture, moves: int) -> bool:
    shortest = shortest_path(picture)
    return shortest is not None and shortest <= moves


def _picture(size: int, holes: tuple[int, ...] | list[int]) -> Picture:
    cells = [ICE] * size**2
    for cell in holes:
        cells[cell] = HOLE
    cells[0], cells[-1] = START, GOAL
    return tuple("".join(cells[row * size : (row + 1) * size]) for row in range(size))


def _load_gymnasium() -> Any:
    try:
        return importlib.import_module("gymnasium.envs.toy_text.frozen_lake")
    except ImportError as error:
        raise GameError(
            "Frozen Lake needs the package gymnasium, which is not installed; run pip install "
            'gymnasium (or install opcd-lm with its extra: "opcd-lm[games]"), or play sokoban'
        ) from error
