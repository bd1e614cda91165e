"""`opcd.envs.sokoban`: rooms against a brute-force solver, moves against the rules on letters."""

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opcd.config.games import Sokoban, SokobanSymbols
from opcd.envs.boards import Picture, read_board
from opcd.envs.env import STEPS, Action
from opcd.envs.sokoban import (
    SokobanWorld,
    draw_room,
    room_of,
    sokoban_rules,
    sokoban_source,
    sokoban_symbols,
)
from opcd.errors import GameError

ACTIONS: tuple[Action, ...] = ("up", "down", "left", "right")
LEAVES = {"@": "-", "+": "."}
"""What is left where the player was."""
TAKES = {"-": "@", ".": "+", "$": "@", "*": "+"}
"""What a cell becomes when the player steps on it."""
GETS_BOX = {"-": "$", ".": "*"}


def step(picture: Picture, action: Action) -> Picture | None:
    """The rules once more, by replacing letters; `None` where the move is not possible."""
    cells = [list(row) for row in picture]
    ((r, c),) = [
        (r, c) for r, row in enumerate(picture) for c, letter in enumerate(row) if letter in "@+"
    ]
    down, right = STEPS[action]
    ahead, beyond = (r + down, c + right), (r + 2 * down, c + 2 * right)
    letter = cells[ahead[0]][ahead[1]]
    if letter == "#":
        return None
    if letter in "$*":
        if cells[beyond[0]][beyond[1]] not in GETS_BOX:
            return None
        cells[beyond[0]][beyond[1]] = GETS_BOX[cells[beyond[0]][beyond[1]]]
    cells[ahead[0]][ahead[1]] = TAKES[letter]
    cells[r][c] = LEAVES[cells[r][c]]
    return tuple("".join(row) for row in cells)


def solution_moves(picture: Picture, most: int) -> int | None:
    """The fewest moves that solve it, by trying all; `None` if there are more than `most`."""
    edge, seen = {picture}, {picture}
    for moves in range(most + 1):
        if any("$" not in "".join(each) for each in edge):
            return moves
        edge = {n for each in edge for a in ACTIONS if (n := step(each, a))} - seen
        seen |= edge
    return None


SETTINGS = st.sampled_from(
    [
        Sokoban(),
        Sokoban(size=5, inner_walls=0, turns=1),
        Sokoban(size=5, inner_walls=1, turns=4),
        Sokoban(size=6, boxes=2, turns=7),
        Sokoban(size=7, boxes=3, inner_walls=5, turns=6),
    ]
)


@given(SETTINGS, st.integers(0, 10_000))
@settings(max_examples=80)
def test_rooms_can_be_solved_in_time_and_are_not_solved_yet(config: Sokoban, seed: int) -> None:
    """The solver knows nothing of how they were made."""
    picture = draw_room(config, Random(seed)).picture()
    moves = solution_moves(picture, config.turns)
    assert moves is not None and 1 <= moves <= config.turns
    letters = Counter("".join(picture))
    assert letters["@"] + letters["+"] == 1
    assert letters["$"] + letters["*"] == letters["."] + letters["*"] + letters["+"] == config.boxes
    assert letters["#"] == 4 * (config.size - 1) + config.inner_walls
    assert draw_room(config, Random(seed)).picture() == picture


def test_most_rooms_need_more_than_one_move() -> None:
    """A walk that pulls nothing, or back and forth, would make no puzzle."""
    config = Sokoban(turns=8)
    needed = [
        solution_moves(draw_room(config, Random(seed)).picture(), 8) or 0 for seed in range(60)
    ]
    assert sum(moves >= 4 for moves in needed) > 30


@given(st.integers(0, 200), st.lists(st.sampled_from(ACTIONS), max_size=25), SETTINGS)
@settings(max_examples=80)
def test_moves_follow_the_rules(seed: int, actions: list[Action], config: Sokoban) -> None:
    """Every push, wall and stuck box, against the rules written on letters."""
    picture = sokoban_source(config).draw(Random(seed))
    world = SokobanWorld(picture, config)
    for action in actions:
        after = step(picture, action)
        effect = world.move(action)
        assert effect.valid == (after is not None)
        picture = after or picture
        assert read_board(world.text, sokoban_symbols(config.symbols)) == picture
        assert (effect.verdict == "solved") == (effect.valid and "$" not in "".join(picture))
        if effect.verdict:
            break


def play(picture: Picture, *actions: Action, **config: Any) -> tuple[Any, str]:
    world = SokobanWorld(picture, Sokoban(**config))
    effect = None
    for action in actions:
        effect = world.move(action)
    return effect, world.text


ROW = ("######", "#@$-.#", "######")


def test_a_box_on_every_target_solves_it() -> None:
    effect, text = play(ROW, "right", "right")
    assert (effect.verdict, effect.text) == ("solved", "Every X is on O: solved.")
    assert text == "# # # # # #\n# _ _ P * #\n# # # # # #"


@pytest.mark.parametrize(
    ("picture", "action", "message"),
    [
        (ROW, "left", "You cannot go left: # is there."),
        (("#####", "#@$##", "#.-##", "#####"), "right", "You cannot go right: X cannot be moved."),
        (("######", "#@$$.#", "#..--#", "######"), "right", "X cannot be moved."),
    ],
)
def test_walls_and_stuck_boxes_are_invalid(picture: Picture, action: Action, message: str) -> None:
    balanced = tuple(row.replace("#..--#", "#.---#") for row in picture)
    world = SokobanWorld(balanced, Sokoban())
    before = world.text
    effect = world.move(action)
    assert (effect.valid, effect.verdict) == (False, None)
    assert message in effect.text
    assert world.text == before


def test_symbols_of_one_s_own_are_in_the_text_and_in_the_rules() -> None:
    names = dict(player="me", box="crate", wall="W", target="x", floor=".")
    symbols = SokobanSymbols(**names, box_on_target="ok", player_on_target="on")
    _, text = play(ROW, "right", symbols=symbols)
    assert text == "W W W W W W\nW . me crate x W\nW W W W W W"
    rules = sokoban_rules(Sokoban(symbols=symbols))
    assert "me has to push every crate onto a target, x" in rules
    assert "unless W (a wall)" in rules
    assert ". is floor, ok a box on a target, on yourself on one." in rules


@given(SETTINGS, st.integers(0, 500))
@settings(max_examples=40)
def test_picture_and_room_say_the_same(config: Sokoban, seed: int) -> None:
    room = draw_room(config, Random(seed))
    assert room_of(room.picture()) == room


@pytest.mark.parametrize(
    "picture",
    [
        ("####", "#$.#", "####"),
        ("######", "#@@$.#", "######"),
        ("#####", "#@$-#", "#####"),
        ("#####", "#@--#", "#####"),
        ("#####", "#@$.-", "#####"),
    ],
)
def test_a_picture_that_is_no_room_is_refused(picture: Picture) -> None:
    """A gap in the outer walls would let the player leave the picture."""
    with pytest.raises(GameError, match="is no Sokoban; draw one player"):
        room_of(picture)


def test_rooms_that_cannot_be_made_are_refused_not_drawn_for_ever() -> None:
    """Walls leave a corridor at best, in which no box has been pushed within a move."""
    config = Sokoban(size=5, inner_walls=0, turns=1).model_copy(update={"inner_walls": 7})
    with pytest.raises(GameError, match="none of 1000 random rooms of 5x5 with 7 inner walls"):
        draw_room(config, Random(0))
