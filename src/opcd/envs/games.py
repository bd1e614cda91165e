"""A game's table becomes boards for each split, and environments to play them."""

from random import Random

from opcd.config.games import FrozenLake, GameConfig
from opcd.envs.boards import BoardSource, Picture, Split, split_boards
from opcd.envs.env import BoardEnv, Env, Limits, introduce
from opcd.envs.frozen_lake import LakeWorld, lake_rules, lake_source
from opcd.envs.sokoban import SokobanWorld, sokoban_rules, sokoban_source


def boards_of(config: GameConfig) -> dict[Split, tuple[Picture, ...]]:
    """The boards of each split; none of one is in another, in any orientation.

    Raises:
        GameError: there are fewer distinct boards than asked for.
    """
    counts: dict[Split, int] = {
        "train": config.boards.train,
        "extraction": config.boards.extraction,
        "validation": config.boards.validation,
        "test": config.boards.test,
    }
    return split_boards(source_of(config), counts, config.seed)


def source_of(config: GameConfig) -> BoardSource:
    """Where the game's boards come from."""
    return lake_source(config) if isinstance(config, FrozenLake) else sokoban_source(config)


def make_env(config: GameConfig, board: Picture, seed: int = 0) -> Env:
    """One episode on this board.

    Args:
        config: the game.
        board: one of its boards.
        seed: with the game's own seed, decides where steps on slippery ice go: give each
            episode on one board its own.

    Raises:
        GameError: the board is none of this game, or its package is not installed.
    """
    limits = Limits(config.turns, config.invalid_moves_allowed)
    if isinstance(config, FrozenLake):
        slips = Random(f"{config.seed}/{seed}").getrandbits(32)
        world, rules = LakeWorld(board, config, slips), lake_rules(config)
    else:
        world, rules = SokobanWorld(board, config), sokoban_rules(config)
    text = introduce(config.symbols.player, rules if config.rules else "", limits)
    return BoardEnv(world, text, limits)
