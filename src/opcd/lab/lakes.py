"""Lakes of 4 x 4 as numbers, for documents by the thousand; the game itself is in `opcd.envs`."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

SIDE = 4
STEPS = {"[right]": (0, 1), "[down]": (1, 0), "[left]": (0, -1), "[up]": (-1, 0)}
GOAL = SIDE * SIDE - 1


@dataclass(frozen=True)
class Lake:
    """Where the holes are, and how far each cell is from the goal."""

    holes: frozenset[int]
    moves: dict[int, int] = field(default_factory=dict)


def neighbour(place: int, action: str) -> int | None:
    """The next cell that way; `None` off the board."""
    (row, column), (down, right) = divmod(place, SIDE), STEPS[action]
    row, column = row + down, column + right
    return row * SIDE + column if 0 <= row < SIDE and 0 <= column < SIDE else None


def lake_of(picture: Sequence[str]) -> Lake:
    """A board of the game."""
    cells = "".join(picture)
    holes = frozenset(i for i, letter in enumerate(cells) if letter == "H")
    moves, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        place = queue.popleft()
        for action in STEPS:
            after = neighbour(place, action)
            if after is not None and after not in holes and after not in moves:
                moves[after] = moves[place] + 1
                queue.append(after)
    return Lake(holes, moves)


def best_actions(lake: Lake, place: int) -> list[str]:
    """Those on a shortest way to the goal."""
    around = ((action, neighbour(place, action)) for action in STEPS)
    near = lake.moves[place] - 1
    return [a for a, after in around if after is not None and lake.moves.get(after) == near]


def shore(lake: Lake, place: int) -> list[str]:
    """The actions that neither fall into a hole nor leave the board."""
    around = ((action, neighbour(place, action)) for action in STEPS)
    return [a for a, after in around if after is not None and after not in lake.holes]
