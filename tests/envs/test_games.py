"""`opcd.envs.games`: what a game's table asks for is what is played."""

import pytest

from opcd.config.games import Boards, FrozenLake, GameConfig, Sokoban
from opcd.envs.boards import SPLITS, Picture, symmetries
from opcd.envs.env import Action, Env
from opcd.envs.games import boards_of, make_env, openings_of, source_of
from opcd.errors import GameError

GAMES: tuple[GameConfig, ...] = (
    FrozenLake(
        size=4, holes=4, turns=7, boards=Boards(train=20, extraction=5, validation=4, test=6)
    ),
    Sokoban(boards=Boards(train=20, extraction=5, validation=4, test=6)),
)


@pytest.mark.parametrize("config", GAMES)
def test_splits_have_their_sizes_and_share_no_board(config: GameConfig) -> None:
    splits = boards_of(config)
    assert [len(splits[split]) for split in SPLITS] == [20, 5, 4, 6]
    seen: set[Picture] = set()
    for board in (board for boards in splits.values() for board in boards):
        assert board not in seen
        seen |= set(symmetries(board))
    assert boards_of(config) == splits
    assert boards_of(config.model_copy(update={"seed": 1})) != splits


@pytest.mark.parametrize("config", [FrozenLake(), Sokoban()])
def test_there_are_as_many_boards_as_the_defaults_ask_for(config: GameConfig) -> None:
    assert sum(map(len, boards_of(config).values())) == sum(n for _, n in config.boards)


def test_the_paper_s_lake_says_how_many_boards_it_has() -> None:
    """19 placements of holes can be crossed; all but one have a mirror image among them."""
    with pytest.raises(GameError, match=r"make 192, .* only 19 boards .* 10 distinct"):
        boards_of(FrozenLake(boards=Boards()))


def test_the_lake_in_the_docstring_has_the_boards_it_promises() -> None:
    config = FrozenLake(size=4, holes=4, turns=7, boards=Boards(train=382))
    assert "`size = 4, holes = 4, turns = 7`, which has 381." in (FrozenLake.__doc__ or "")
    with pytest.raises(GameError, match=r"381 distinct"):
        boards_of(config)


@pytest.mark.parametrize("config", GAMES)
def test_a_board_may_be_played_several_times(config: GameConfig) -> None:
    """Under names of their own, so that each game has its own draws; training draws anew anyhow."""
    often = openings_of(config.model_copy(update={"episodes": 3}))
    for split, once in openings_of(config).items():
        played = [opening.board for opening in often[split].values()]
        assert list(often[split])[: len(once)] == list(once)
        assert played == [opening.board for opening in once.values()] * (
            1 if split == "train" else 3
        )


def walk(env: Env, *actions: Action) -> list[str]:
    seen = []
    for action in actions:
        if not env.finished:
            seen.append(env.act(action).observation)
    return seen


def test_limits_come_from_the_table() -> None:
    lake = ("SFF", "FFF", "FFG")
    strict = make_env(FrozenLake(invalid_moves_allowed=0), lake)
    assert strict.act("up").ending
    short = make_env(FrozenLake(turns=4), lake)
    assert len(walk(short, "right", "left", "right", "left", "right")) == 4
    assert (short.finished, short.outcome) == (True, 0.0)
    solved = make_env(FrozenLake(turns=4), lake)
    walk(solved, "right", "right", "down", "down")
    assert solved.outcome == 1.0


@pytest.mark.parametrize("config", GAMES)
def test_rules_can_be_left_out(config: GameConfig) -> None:
    """Then only who one is and the actions are said, and the board is the same."""
    board = boards_of(config)["train"][0]
    told = make_env(config, board)
    untold = make_env(config.model_copy(update={"rules": False}), board)
    assert told.observation == untold.observation
    assert "invalid" in told.introduction
    assert untold.introduction.startswith("You are P.\n\nThe actions are")
    assert "invalid" not in untold.introduction


def test_slips_are_a_function_of_both_seeds() -> None:
    """Episodes on one board differ by their own seed; the game's seed moves them all."""
    lake = ("SFFF", "FFFF", "FFFF", "FFFG")
    path: tuple[Action, ...] = ("right", "right", "down", "down", "right", "down")

    def played(game: int, episode: int) -> tuple[str, ...]:
        config = FrozenLake(size=4, turns=9, slippery=True, seed=game, invalid_moves_allowed=9)
        return tuple(walk(make_env(config, lake, episode), *path))

    assert played(0, 0) == played(0, 0)
    assert len({played(0, episode) for episode in range(8)}) > 4
    assert len({played(game, 0) for game in range(8)}) > 4


def test_each_source_draws_boards_of_its_game() -> None:
    names = [source_of(config).name for config in GAMES]
    assert names == [
        "frozen_lake 4x4 with 4 holes and 7 turns",
        "sokoban 6x6 with 1 boxes, 2 inner walls, 5 turns",
    ]
