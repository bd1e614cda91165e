"""Text games as tables: which boards there are, how they are written, when an episode ends."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from opcd.config.section import Count, NonNegative, Section


class Symbols(Section):
    """How the cells of a board are written, with spaces between them."""

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> Self:
        meaning: dict[str, str] = {}
        for name, symbol in self:
            if not symbol or any(char.isspace() or char in "[]" for char in symbol):
                raise ValueError(
                    f"{name} = {symbol!r} cannot stand in a cell, since cells have spaces between "
                    'them and actions have brackets; write a visible character, such as "#"'
                )
            if symbol in meaning:
                raise ValueError(
                    f"{meaning[symbol]} and {name} are both {symbol!r}, so that nobody could tell "
                    "them apart; write another symbol for one of them"
                )
            meaning[symbol] = name
        return self


class LakeSymbols(Symbols):
    """How the cells of a Frozen Lake are written."""

    player: str = "P"
    goal: str = "G"
    hole: str = "H"
    ice: str = "_"


class SokobanSymbols(Symbols):
    """How the cells of a Sokoban room are written."""

    player: str = "P"
    box: str = "X"
    wall: str = "#"
    target: str = "O"
    floor: str = "_"
    box_on_target: str = "*"
    player_on_target: str = "+"


class Boards(Section):
    """How many boards each split has; none is in two of them, however turned or mirrored."""

    train: NonNegative = 64
    extraction: NonNegative = 32
    """Played to gather experience."""
    validation: NonNegative = 32
    """Chooses among experiences and weights."""
    test: NonNegative = 64


class Game(Section):
    """What the tables of all games have in common."""

    turns: Count = 5
    """One reply and one action each; then the episode is over. No board needs more of them."""
    invalid_moves_allowed: NonNegative = 1
    """So many are answered with a warning, counted over the episode; the next one ends it."""
    rules: bool = True
    """Whether the text explains the game; if not, the rules have to be found out by playing."""
    episodes: Count = 1
    """How often each board is played where experience is gathered or chosen, and in tests. With few
    boards that says more of those, and nothing of others."""
    seed: int = 0
    """Decides the boards, and on slippery ice where each step goes."""


class FrozenLake(Game):
    """Cross the ice to the goal, around the holes; start and goal are in opposite corners.

    The defaults are the paper's. They leave 10 distinct boards, so that they show whether rules are
    found out, not whether what was learnt carries over to new maps: for that, take
    `size = 4, holes = 4, turns = 7`, which has 381.
    """

    type: Literal["frozen_lake"] = "frozen_lake"
    size: Annotated[int, Field(ge=2)] = 3
    """Cells of a side."""
    holes: NonNegative = 2
    slippery: bool = False
    """Whether a step may go off at a right angle."""
    success_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 1 / 3
    """On slippery ice: how likely a step goes where it was meant to."""
    symbols: LakeSymbols = LakeSymbols()
    boards: Boards = Boards(train=4, extraction=2, validation=2, test=2)

    @model_validator(mode="after")
    def _can_be_crossed(self) -> Self:
        path_moves = 2 * (self.size - 1)
        most_holes = self.size**2 - path_moves - 1
        if self.holes > most_holes:
            raise ValueError(
                f"holes = {self.holes} leave no path across a lake of {self.size} x {self.size}; "
                f"write at most {most_holes}, or a larger size"
            )
        if self.turns < path_moves:
            raise ValueError(
                f"turns = {self.turns}, but the shortest path across a lake of {self.size} x "
                f"{self.size} has {path_moves} moves; write turns = {path_moves + 1}, or a "
                "smaller size"
            )
        return self


class Sokoban(Game):
    """Push each box onto a target, in a room with walls around it."""

    type: Literal["sokoban"] = "sokoban"
    size: Annotated[int, Field(ge=5)] = 6
    """Cells of a side, the outer walls included."""
    boxes: Count = 1
    inner_walls: NonNegative = 2
    """Wall cells inside the room."""
    symbols: SokobanSymbols = SokobanSymbols()
    boards: Boards = Boards()

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        floor = (self.size - 2) ** 2 - self.inner_walls
        if floor < 3 * self.boxes + 2:
            raise ValueError(
                f"size = {self.size} with inner_walls = {self.inner_walls} leaves {floor} cells of "
                f"floor, too few to move {self.boxes} boxes; write a larger size, fewer boxes or "
                "fewer inner_walls"
            )
        return self


GameConfig = Annotated[FrozenLake | Sokoban, Field(discriminator="type")]
