"""Sokoban as text: push each box onto a target. Boards are made by playing backwards.

A room begins solved, with every box on a target; the player then walks and pulls boxes away. Read
forwards, that walk is a solution, so no board needs more moves than it had. Letters of a picture
are the usual ones: # wall, - floor, . target, $ box, * box on a target, @ player, + player on a
target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from opcd.config.games import Sokoban, SokobanSymbols
from opcd.envs.boards import BoardSource, Picture, cells_of, write_board
from opcd.envs.env import STEPS, Action, Cell, Effect, beside, waves
from opcd.errors import GameError

WALL, FLOOR, TARGET, BOX, BOX_ON_TARGET, PLAYER, PLAYER_ON_TARGET = "#-.$*@+"
TRIES = 1_000
"""Rooms after which there is taken to be none of the kind."""
PULL_SHARE = 0.7
"""How often a box is pulled along where one can be: walks that move no box are no puzzle."""


@dataclass(frozen=True, slots=True)
class Room:
    """A board: what stands still, and what moves."""

    rows: int
    columns: int
    walls: frozenset[Cell]
    targets: frozenset[Cell]
    boxes: frozenset[Cell]
    player: Cell

    @property
    def solved(self) -> bool:
        """Whether every box is on a target."""
        return self.boxes <= self.targets

    def is_free(self, cell: Cell) -> bool:
        """Whether a box or the player can be moved there."""
        return cell not in self.walls and cell not in self.boxes

    def picture(self) -> Picture:
        """The room in letters."""
        rows = range(self.rows)
        return tuple("".join(self._letter((r, c)) for c in range(self.columns)) for r in rows)

    def _letter(self, cell: Cell) -> str:
        on_target = cell in self.targets
        if cell in self.walls:
            return WALL
        if cell in self.boxes:
            return BOX_ON_TARGET if on_target else BOX
        if cell == self.player:
            return PLAYER_ON_TARGET if on_target else PLAYER
        return TARGET if on_target else FLOOR


class SokobanWorld:
    """One room, its boxes and its player: a `World`."""

    def __init__(self, picture: Picture, config: Sokoban) -> None:
        """Begin with the room as it is shown."""
        self._room = room_of(picture)
        self._symbols = config.symbols

    @property
    def text(self) -> str:
        """The room as it is now."""
        return write_board(self._room.picture(), sokoban_symbols(self._symbols))

    def move(self, action: Action) -> Effect:
        """Step that way, and push the box that stands there, if there is one."""
        ahead = beside(self._room.player, action)
        if ahead in self._room.walls:
            return Effect(f"You cannot go {action}: {self._symbols.wall} is there.", valid=False)
        boxes = self._room.boxes
        if ahead in boxes:
            beyond = beside(ahead, action)
            if not self._room.is_free(beyond):
                box = self._symbols.box
                return Effect(f"You cannot go {action}: {box} cannot be moved.", valid=False)
            boxes = boxes - {ahead} | {beyond}
        self._room = replace(self._room, player=ahead, boxes=boxes)
        if self._room.solved:
            text = f"Every {self._symbols.box} is on {self._symbols.target}: solved."
            return Effect(text, verdict="solved")
        return Effect()


def sokoban_source(config: Sokoban) -> BoardSource:
    """Rooms that can be solved within the turns; they cannot be listed, so they are drawn."""
    size, boxes, walls = config.size, config.boxes, config.inner_walls
    name = f"sokoban {size}x{size} with {boxes} boxes, {walls} inner walls, {config.turns} turns"
    return BoardSource(name, lambda random: draw_room(config, random).picture())


def draw_room(config: Sokoban, random: Random) -> Room:
    """A random room, not solved yet, that can be solved in as many moves as there are turns.

    Raises:
        GameError: none was found.
    """
    for _ in range(TRIES):
        room = _solved_room(config, random)
        if room is None:
            continue
        room = _play_backwards(room, config.turns, random)
        if not room.solved:
            return room
    raise GameError(
        f"none of {TRIES} random rooms of {config.size}x{config.size} with {config.inner_walls} "
        f"inner walls let {config.boxes} boxes be moved; take a larger size, fewer boxes or fewer "
        "inner_walls"
    )


def room_of(picture: Picture) -> Room:
    """The room that a picture shows.

    Raises:
        GameError: it has not exactly one player, walls all around, and as many boxes as targets.
    """
    cells = cells_of(picture)

    def where(letters: str) -> frozenset[Cell]:
        return frozenset(cell for cell, letter in cells.items() if letter in letters)

    players, boxes = where(PLAYER + PLAYER_ON_TARGET), where(BOX + BOX_ON_TARGET)
    targets, walls = where(TARGET + BOX_ON_TARGET + PLAYER_ON_TARGET), where(WALL)
    rows, columns = len(picture), len(picture[0])
    rim = {(r, c) for r, c in cells if r in (0, rows - 1) or c in (0, columns - 1)}
    if len(players) != 1 or not boxes or len(boxes) != len(targets) or rim - walls:
        raise GameError(
            f"a room with {len(players)} players, {len(boxes)} boxes, {len(targets)} targets and "
            f"{len(rim - walls)} gaps in its outer walls is no Sokoban; draw one player, as many "
            "boxes as targets, and walls all around"
        )
    return Room(rows, columns, walls, targets, boxes, next(iter(players)))


def sokoban_symbols(symbols: SokobanSymbols) -> dict[str, str]:
    """Letter -> symbol."""
    return {
        WALL: symbols.wall,
        FLOOR: symbols.floor,
        TARGET: symbols.target,
        BOX: symbols.box,
        BOX_ON_TARGET: symbols.box_on_target,
        PLAYER: symbols.player,
        PLAYER_ON_TARGET: symbols.player_on_target,
    }


def sokoban_rules(config: Sokoban) -> str:
    """What the player has to know, in the symbols that are in use."""
    symbols = config.symbols
    return (
        f"{symbols.player} has to push every {symbols.box} onto a target, {symbols.target}. Each "
        f"action is one step; a step towards a box pushes it one cell on, unless {symbols.wall} "
        f"(a wall) or another box is behind it. Boxes cannot be pulled. {symbols.floor} is floor, "
        f"{symbols.box_on_target} a box on a target, {symbols.player_on_target} yourself on one."
    )


def _solved_room(config: Sokoban, random: Random) -> Room | None:
    """A room with its boxes on the targets; `None` where its walls part the floor."""
    size = config.size
    inner = [(r, c) for r in range(1, size - 1) for c in range(1, size - 1)]
    blocks = random.sample(inner, config.inner_walls)
    floor = [cell for cell in inner if cell not in blocks]
    if not _connected(floor):
        return None
    *targets, player = random.sample(floor, config.boxes + 1)
    every = {(r, c) for r in range(size) for c in range(size)}
    boxes = frozenset(targets)
    return Room(size, size, frozenset(every - set(floor)), boxes, boxes, player)


def _play_backwards(room: Room, moves: int, random: Random) -> Room:
    """Walk and pull for so many moves, never back to where everything stood before."""
    seen = {(room.player, room.boxes)}
    for _ in range(moves):
        options = [o for o in _undone(room) if (o.player, o.boxes) not in seen]
        if not options:
            break
        pulls = [option for option in options if option.boxes != room.boxes]
        if pulls and random.random() < PULL_SHARE:
            options = pulls
        room = random.choice(options)
        seen.add((room.player, room.boxes))
    return room


def _undone(room: Room) -> list[Room]:
    """The rooms that one step leads from to this one."""
    found: list[Room] = []
    for down, right in STEPS.values():
        row, column = room.player
        before, ahead = (row - down, column - right), (row + down, column + right)
        if not room.is_free(before):
            continue
        found.append(replace(room, player=before))
        if ahead in room.boxes:
            boxes = room.boxes - {ahead} | {room.player}
            found.append(replace(room, player=before, boxes=boxes))
    return found


def _connected(cells: Sequence[Cell]) -> bool:
    return sum(map(len, waves(cells[0], cells))) == len(cells)
