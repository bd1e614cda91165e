"""`opcd.config.games`: games that cannot be played are refused before anything is made."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from opcd.config.games import FrozenLake, GameConfig, LakeSymbols, Sokoban, SokobanSymbols

TABLE: TypeAdapter[GameConfig] = TypeAdapter(GameConfig)


def test_the_type_says_which_game() -> None:
    lake = TABLE.validate_python({"type": "frozen_lake", "size": 4, "turns": 8, "slippery": True})
    assert isinstance(lake, FrozenLake) and lake.slippery
    room = TABLE.validate_python({"type": "sokoban", "boxes": 2, "symbols": {"box": "B"}})
    assert isinstance(room, Sokoban) and room.symbols.box == "B"


def test_defaults_are_the_paper_s() -> None:
    lake = FrozenLake()
    assert (lake.size, lake.holes, lake.turns, lake.invalid_moves_allowed) == (3, 2, 5, 1)
    assert (lake.slippery, lake.rules) == (False, True)
    room = Sokoban()
    assert (room.size, room.boxes, room.turns) == (6, 1, 5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"type": "chess"}, "chess"),
        ({"type": "sokoban", "holes": 2}, "Extra inputs"),
        ({"type": "frozen_lake", "size": 4}, "the shortest path .* has 6 moves; write turns = 7"),
        ({"type": "frozen_lake", "holes": 5}, "no path across a lake of 3 x 3; write at most 4"),
        ({"type": "frozen_lake", "success_rate": 0}, "greater than 0"),
        ({"type": "frozen_lake", "invalid_moves_allowed": -1}, "greater than or equal to 0"),
        ({"type": "frozen_lake", "boards": {"test": -1}}, "greater than or equal to 0"),
        ({"type": "sokoban", "boxes": 5}, "leaves 14 cells of floor, too few to move 5 boxes"),
        ({"type": "sokoban", "size": 4}, "greater than or equal to 5"),
        ({"type": "frozen_lake", "symbols": {"hole": "G"}}, "goal and hole are both 'G'"),
        ({"type": "frozen_lake", "symbols": {"ice": " "}}, "ice = ' ' cannot stand in a cell"),
        ({"type": "sokoban", "symbols": {"box": "[]"}}, "box = '\\[\\]' cannot stand in a cell"),
        ({"type": "sokoban", "symbols": {"wall": ""}}, "wall = '' cannot stand in a cell"),
        ({"type": "sokoban", "symbols": {"wall": "P"}}, "player and wall are both 'P'"),
    ],
)
def test_what_cannot_be_played_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TABLE.validate_python(table)


def test_the_limits_themselves_are_allowed() -> None:
    assert FrozenLake(size=3, holes=4, turns=4).holes == 4
    assert Sokoban(size=5, boxes=2, inner_walls=1).boxes == 2


def test_a_table_survives_being_written() -> None:
    """`config.json` holds the resolved table; a run must read it back as it was."""
    lake = FrozenLake(symbols=LakeSymbols(hole="o"), slippery=True)
    room = Sokoban(symbols=SokobanSymbols(box="B"))
    for game in (lake, room):
        assert TABLE.validate_json(game.model_dump_json()) == game
