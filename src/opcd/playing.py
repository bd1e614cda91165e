"""`opcd play`: one episode of a text game, played by a person or by a model.

A person is told what a model is told, and what counts for a model counts for a person.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from opcd.config.games import FrozenLake, GameConfig, Sokoban
from opcd.envs.env import Env, parse_action
from opcd.envs.games import make_env, source_of
from opcd.errors import GameError

if TYPE_CHECKING:
    from opcd.envs.episodes import Turn

GAMES: dict[str, type[FrozenLake] | type[Sokoban]] = {"frozen-lake": FrozenLake, "sokoban": Sokoban}
MODEL_REPLY_TOKENS = 256

Say = Callable[[str], object]


def read_game(name: str, options: Mapping[str, Any]) -> GameConfig:
    """A game by its name and those of its options that are not `None`.

    Without `turns`, there are five, or one more than a lake of this size takes.

    Raises:
        GameError: there is no such game, an option is not its own, or has no meaning.
    """
    if name not in GAMES:
        raise GameError(f"{name!r} is no game; play {' or '.join(GAMES)}")
    given = {key: value for key, value in options.items() if value is not None}
    size = given.get("size", GAMES[name].model_fields["size"].default)
    try:
        return GAMES[name].model_validate({"turns": max(5, 2 * size - 1), **given})
    except ValidationError as error:
        raise GameError("; ".join(_explain(name, item) for item in error.errors())) from error


def play_person(config: GameConfig, read: Callable[[], str], say: Say) -> Env:
    """Play until the end, or until the person stops: `q`, the end of the input, or Ctrl-C.

    Args:
        config: the game; its seed decides the board.
        read: the person's next line.
        say: shows a text.

    Raises:
        GameError: the game cannot be made.
    """
    env = _new_game(config)
    say(f"{env.introduction}\n\n{env.observation}")
    while not env.finished:
        try:
            typed = read().strip()
        except (EOFError, KeyboardInterrupt):
            typed = "q"
            say("")
        if typed.lower() in ("q", "quit"):
            say("stopped")
            break
        if typed:
            # A person may leave the brackets out.
            say(env.act(parse_action(typed) or parse_action(f"[{typed}]")).observation)
    return env


def play_model(config: GameConfig, path: str, device: str, say: Say) -> Env:
    """Let a model play, with its most likely replies, and show every turn; Ctrl-C stops.

    Raises:
        InputError: the game cannot be made, the model not loaded, or a prompt does not fit.
    """
    env = _new_game(config)
    from opcd.authoring import load_answering
    from opcd.envs.episodes import Player, play_episodes
    from opcd.rollouts.engine import Sampling

    engine, renderer = load_answering(path, device)
    engine.use("base", 0)
    room = renderer.max_prompt_tokens - MODEL_REPLY_TOKENS
    renderer = replace(renderer, max_prompt_tokens=room)
    player = Player(engine, renderer, Sampling(), MODEL_REPLY_TOKENS)
    say(f"{env.introduction}\n\n{env.observation}")
    try:
        play_episodes({"play": env}, player, lambda turn: say(_turn_text(turn)))
    except KeyboardInterrupt:
        say("\nstopped")
    return env


def _new_game(config: GameConfig) -> Env:
    board = source_of(config).draw(Random(config.seed))
    return make_env(config, board)


def _turn_text(turn: "Turn") -> str:
    cut = "" if turn.rollout.finished else f" (cut off after {MODEL_REPLY_TOKENS} tokens)"
    action = f"[{turn.action}]" if turn.action else "none"
    number = turn.task.id.rpartition("-")[2]
    return f"\nturn {number}, reply{cut}: {turn.reply}\naction: {action}\n{turn.result.observation}"


def _explain(name: str, item: Any) -> str:
    option = "--" + "-".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{option} is no option of {name}; leave it out, or play another game"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{option} {item['input']}: {message}" if item["loc"] else message
