"""`opcd.envs.frozen_lake`: boards against brute force, steps against gymnasium itself."""

import sys
from collections import Counter
from itertools import combinations, product
from random import Random
from typing import Any

import pytest
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from opcd.config.games import FrozenLake, LakeSymbols
from opcd.envs.boards import Picture, read_board
from opcd.envs.env import Action, Effect
from opcd.envs.frozen_lake import (
    LakeWorld,
    draw_lake,
    every_lake,
    lake_rules,
    lake_source,
    lake_symbols,
    shortest_path,
)
from opcd.errors import GameError

ACTIONS: tuple[Action, ...] = ("left", "down", "right", "up")
"""In gymnasium's order: 0, 1, 2, 3."""
LAKE = ("SFF", "FHF", "FFG")
PLAIN = FrozenLake()


def world(picture: Picture = LAKE, seed: int = 0, **config: Any) -> LakeWorld:
    return LakeWorld(picture, FrozenLake(**config), seed)


def reachable(picture: Picture, moves: int) -> bool:
    """By trying every walk of so many steps, on the letters."""
    cells = {(0, 0)}
    size = len(picture)
    for _ in range(moves):
        if (size - 1, size - 1) in cells:
            return True
        cells |= {
            (r + down, c + right)
            for r, c in cells
            for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0))
            if 0 <= r + down < size
            and 0 <= c + right < size
            and picture[r + down][c + right] != "H"
        }
    return (size - 1, size - 1) in cells


def all_pictures(size: int, holes: int) -> list[Picture]:
    found = []
    for chosen in combinations(range(1, size * size - 1), holes):
        cells = ["H" if i in chosen else "F" for i in range(size * size)]
        cells[0], cells[-1] = "S", "G"
        found.append(tuple("".join(cells[i * size : i * size + size]) for i in range(size)))
    return found


@pytest.mark.parametrize(("size", "holes", "moves"), [(3, 2, 5), (3, 3, 3), (3, 4, 9), (4, 4, 7)])
def test_all_boards_are_those_that_brute_force_can_cross(size: int, holes: int, moves: int) -> None:
    wanted = [picture for picture in all_pictures(size, holes) if reachable(picture, moves)]
    assert sorted(every_lake(size, holes, moves)) == sorted(wanted)


def test_the_paper_s_lake_has_19_boards() -> None:
    assert len(list(every_lake(3, 2, 5))) == 19


@given(st.integers(2, 5), st.data())
@settings(max_examples=60)
def test_the_shortest_path_is_the_first_number_of_moves_that_is_enough(
    size: int, data: st.DataObject
) -> None:
    holes = data.draw(st.sets(st.integers(1, size * size - 2), max_size=size * size // 2))
    cells = ["H" if i in holes else "F" for i in range(size * size)]
    cells[0], cells[-1] = "S", "G"
    picture = tuple("".join(cells[i * size : i * size + size]) for i in range(size))
    enough = [moves for moves in range(size * size) if reachable(picture, moves)]
    assert shortest_path(picture) == (enough[0] if enough else None)


@given(st.integers(0, 10_000), st.integers(3, 6))
def test_drawn_boards_have_their_holes_and_can_be_solved_in_time(seed: int, size: int) -> None:
    moves = 2 * size
    picture = draw_lake(size, size, moves, Random(seed))
    assert Counter("".join(picture))["H"] == size
    assert picture[0][0] == "S" and picture[-1][-1] == "G"
    assert reachable(picture, moves)
    assert draw_lake(size, size, moves, Random(seed)) == picture


def test_boards_that_take_more_moves_than_there_are_turns_are_left_out() -> None:
    """Ten turns cannot solve a detour of 14 moves, whatever has been learnt."""
    detour = ("SHFFF", "FHFHF", "FHFHF", "FFFHF", "FHHHG")
    assert shortest_path(detour) == 14
    with pytest.raises(
        GameError, match="can be solved in 3 moves; take fewer holes, or more turns"
    ):
        draw_lake(3, 2, 3, Random(0))


def test_a_lake_without_a_way_is_refused_not_drawn_for_ever() -> None:
    with pytest.raises(GameError, match="none of 10000 random lakes of 2x2 with 2 holes"):
        draw_lake(2, 2, 5, Random(0))


def test_few_boards_are_listed_and_many_are_drawn() -> None:
    assert lake_source(PLAIN).every is not None
    many = lake_source(FrozenLake(size=8, holes=10, turns=15))
    assert many.every is None
    assert reachable(many.draw(Random(0)), 15)


@given(st.lists(st.sampled_from(ACTIONS), max_size=12), st.integers(0, 50), st.booleans())
@settings(max_examples=60)
def test_steps_are_gymnasium_s(actions: list[Action], seed: int, slippery: bool) -> None:
    """The same seed and the same actions walk the same way as gymnasium's own environment."""
    ours = world(("SFFF", "FFFF", "FFHF", "FFFG"), seed, size=4, turns=9, slippery=slippery)
    theirs: Any = FrozenLakeEnv(desc=["SFFF", "FFFF", "FFHF", "FFFG"], is_slippery=slippery)
    state, _ = theirs.reset(seed=seed)
    for action in actions:
        row, column = divmod(state, 4)
        off = {"left": column == 0, "right": column == 3, "up": row == 0, "down": row == 3}
        effect = ours.move(action)
        assert effect.valid == (not off[action])
        if not effect.valid:
            continue
        state, reward, ended, _, _ = theirs.step(ACTIONS.index(action))
        row, column = divmod(state, 4)
        assert ours.text.split("\n")[row].split()[column] == "P"
        assert ours.text.count("P") == 1
        verdict = ("solved" if reward else "failed") if ended else None
        assert effect.verdict == verdict
        if ended:
            break


@pytest.mark.parametrize("rate", [1 / 3, 0.8])
def test_slips_are_as_likely_as_configured(rate: float) -> None:
    """A step goes on with the success rate, else to one of the sides alike; bounds are 5 sigma."""
    count = 500
    ends: Counter[str] = Counter()
    for seed in range(count):
        lake = world(("SFF", "FFF", "FFG"), seed, slippery=True, success_rate=rate)
        assert lake.move("right") == Effect()
        ends[lake.text] += 1
    side = (1 - rate) / 2
    expected = {
        "_ P _\n_ _ _\n_ _ G": rate,
        "_ _ _\nP _ _\n_ _ G": side,
        "P _ _\n_ _ _\n_ _ G": side,
    }
    assert ends.keys() == expected.keys()
    for text, share in expected.items():
        assert abs(ends[text] / count - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_ice_that_is_not_slippery_never_slips() -> None:
    for seed in range(30):
        lake = world(seed=seed)
        lake.move("down")
        assert lake.text == "_ _ _\nP H _\n_ _ G"


def test_the_edge_is_an_invalid_move_and_nothing_moves() -> None:
    lake = world(slippery=True)
    for action in ("up", "left"):
        effect = lake.move(action)
        assert (effect.valid, effect.verdict) == (False, None)
        assert effect.text == f"You cannot go {action}: there the board ends."
        assert lake.text == "P _ _\n_ H _\n_ _ G"


def test_goal_and_hole_end_the_game_and_are_named_by_their_symbols() -> None:
    symbols = {"goal": "@", "hole": "o", "player": "me", "ice": "."}
    lake = world(symbols=symbols)
    for action in ("down", "down", "right"):
        assert lake.move(action) == Effect()
    assert lake.text == ". . .\n. o .\n. me @"
    assert lake.move("right") == Effect("You reached @: solved.", verdict="solved")
    lake = world(symbols=symbols)
    lake.move("right")
    assert lake.move("down") == Effect("You fell into o: lost.", verdict="failed")


@given(st.integers(0, 200), st.permutations(["P", "G", "o", "~"]))
@settings(max_examples=40)
def test_the_first_text_shows_the_whole_board(seed: int, names: list[str]) -> None:
    """Read back by its symbols, it is the picture that it was made from."""
    symbols = LakeSymbols(**dict(zip(("player", "goal", "hole", "ice"), names, strict=True)))
    picture = draw_lake(4, 4, 7, Random(seed))
    lake = LakeWorld(picture, FrozenLake(size=4, turns=7, symbols=symbols), 0)
    assert read_board(lake.text, lake_symbols(symbols)) == picture


def test_rules_stay_true_when_symbols_change() -> None:
    symbols = LakeSymbols(player="me", goal="home", hole="pit", ice="snow")
    text = lake_rules(FrozenLake(symbols=symbols))
    assert all(name in text for name in ("me stands", "reach home", "snow is ice", "pit is a hole"))
    assert not any(f" {old} " in text for old in "PGH_")
    assert "slippery" not in text


def test_rules_say_how_slippery_it_is() -> None:
    assert "slippery: a step goes where you mean it to with a chance of 0.333," in lake_rules(
        FrozenLake(slippery=True)
    )


@pytest.mark.parametrize("picture", [("FFG",), ("SFS", "FFG"), ("SF", "FF"), ("SX", "FG")])
def test_a_picture_that_is_no_lake_is_refused(picture: Picture) -> None:
    """Gymnasium would divide by zero, or start somewhere."""
    with pytest.raises(GameError, match="is no lake; draw one S"):
        world(picture)


def test_without_gymnasium_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium.envs.toy_text.frozen_lake", None)
    with pytest.raises(GameError, match=r"opcd-lm\[games\]"):
        world()


def test_every_direction_is_the_one_it_says() -> None:
    """From the middle of a lake, each action goes to its own side."""
    middle = ("FFF", "FSF", "FFG")
    found = {}
    for action in ACTIONS:
        lake = world(middle)
        lake.move(action)
        found[action] = next(
            (r, c) for r, c in product(range(3), range(3)) if lake.text.split("\n")[r][2 * c] == "P"
        )
    assert found == {"left": (1, 0), "right": (1, 2), "up": (0, 1), "down": (2, 1)}
