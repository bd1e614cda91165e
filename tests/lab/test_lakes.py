"""Lakes as numbers: what the documents hold to be the best way is the best way."""

from itertools import product

import pytest

from opcd.envs.games import boards_of
from opcd.lab.lakes import GOAL, Lake, best_actions, lake_of, neighbour, shore
from opcd.lab.minds import LAKE, train_lakes

ACTIONS = ("[up]", "[down]", "[left]", "[right]")
SLOPES = {"[up]": (-1, 0), "[down]": (1, 0), "[left]": (0, -1), "[right]": (0, 1)}
BOARDS = [board for boards in boards_of(LAKE).values() for board in boards][::29]


def beside(place: int, action: str) -> int | None:
    """Written anew, with a table of what lies off the board."""
    row, column = place // 4, place % 4
    down, right = SLOPES[action]
    inside = row + down in range(4) and column + right in range(4)
    return 4 * (row + down) + column + right if inside else None


def fewest_moves(holes: frozenset[int], place: int) -> int | None:
    """By trying every walk of 1, 2, 3 ... moves, without a queue."""
    reached = {place}
    for moves in range(17):
        if GOAL in reached:
            return moves
        around = {beside(p, action) for p, action in product(reached, ACTIONS)}
        reached |= {p for p in around if p is not None and p not in holes}
    return None


@pytest.mark.parametrize("board", BOARDS)
def test_best_actions_are_those_after_which_the_fewest_moves_are_left(board: tuple[str]) -> None:
    """Guards what a model is taught to do: the documents' answers come from here."""
    lake = lake_of(board)
    for place in set(range(16)) - lake.holes - {GOAL}:
        left = fewest_moves(lake.holes, place)
        assert lake.moves.get(place) == left
        if left is None:
            continue
        after = {action: beside(place, action) for action in ACTIONS}
        best = {
            action
            for action, p in after.items()
            if p is not None and p not in lake.holes and fewest_moves(lake.holes, p) == left - 1
        }
        assert set(best_actions(lake, place)) == best and best


def test_neighbours_and_the_shore() -> None:
    """Off the board there is nothing; a hole is a neighbour, but no shore."""
    for place, action in product(range(16), ACTIONS):
        assert neighbour(place, action) == beside(place, action)
    lake = lake_of(("SHFF", "FFFF", "FFFF", "FFFG"))
    assert lake.holes == {1}
    assert shore(lake, 0) == ["[down]"]
    assert set(shore(lake, 5)) == {"[right]", "[down]", "[left]"}


def test_a_lake_by_hand() -> None:
    lake = lake_of(("SFFF", "FHFH", "FFFH", "HFFG"))
    assert lake.holes == {5, 7, 11, 12}
    assert (lake.moves[0], lake.moves[14], lake.moves[GOAL]) == (6, 1, 0)
    assert best_actions(lake, 14) == ["[right]"]
    assert set(best_actions(lake, 0)) == {"[right]", "[down]"}
    assert best_actions(lake, 3) == ["[left]"]


def test_train_lakes_are_the_games_train_boards_and_their_mirrors() -> None:
    """A mirror is the same board to the game's splits, hence no test board."""
    boards = boards_of(LAKE)["train"]
    holes = {lake.holes for lake in train_lakes()}
    assert {lake_of(board).holes for board in boards} <= holes
    mirrored = {frozenset(4 * (h % 4) + h // 4 for h in own) for own in holes}
    assert mirrored == holes
    assert len(boards) < len(holes) == len(train_lakes()) <= 2 * len(boards)


def test_every_train_lake_can_be_crossed_within_the_turns() -> None:
    lakes: list[Lake] = train_lakes()
    assert all(6 <= lake.moves[0] <= LAKE.turns for lake in lakes)
    assert all(best_actions(lake, place) for lake in lakes for place in lake.moves if place != GOAL)
