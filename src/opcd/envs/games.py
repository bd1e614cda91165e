"""A game's table becomes boards for each split, and environments to play them."""

from dataclasses import dataclass
from random import Random

from opcd.config.games import FrozenLake, GameConfig
from opcd.envs.boards import BoardSource, Picture, Split, split_boards
from opcd.envs.env import Action, BoardEnv, Env, Limits, history_text, introduce
from opcd.envs.frozen_lake import LakeWorld, lake_rules, lake_source
from opcd.envs.sokoban import SokobanWorld, sokoban_rules, sokoban_source
from opcd.types import Message, Task


@dataclass(frozen=True, slots=True)
class Opening:
    """A board before the first move; each episode on it is played in an environment of its own."""

    game: GameConfig
    board: Picture

    def start(self, seed: int | str = 0) -> Env:
        """A new episode; on slippery ice the seed decides where its steps go."""
        return make_env(self.game, self.board, seed)

    def task(self, id_: str, moves: int = 0) -> Task:
        """Its first turn, or a later one: as if so many moves had left the board as it is."""
        env = self.start()
        done: list[Action | None] = ["right"] * moves
        text = history_text(env.introduction, [env.observation] * (moves + 1), done)
        return Task(id_, (Message("user", text),))


def openings_of(config: GameConfig) -> dict[Split, dict[str, Opening]]:
    """The boards of each split by name, without the splits that have none.

    Raises:
        GameError: there are fewer distinct boards than asked for.
    """
    return {
        split: {f"{split}-{n:05d}": Opening(config, board) for n, board in enumerate(boards)}
        for split, boards in boards_of(config).items()
        if boards
    }


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


def make_env(config: GameConfig, board: Picture, seed: int | str = 0) -> Env:
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
