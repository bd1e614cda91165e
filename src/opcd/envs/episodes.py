"""Episodes of several turns, played through a rollout engine, many at the same time.

At each turn every episode that goes on is asked once, all of them in one call of the engine. The
prompt is a single user message with all observations and actions so far. What the model reasoned
is not in it, so that each turn is a sample that stands by itself: a task and its rollout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from opcd.envs.env import Action, Ending, Env, StepResult, history_text, parse_action
from opcd.errors import OverLongError
from opcd.rendering import Renderer
from opcd.rollouts.engine import Prompt, RolloutEngine, Sampling
from opcd.types import Context, Message, PromptPair, Rollout, Task


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt, the reply to it, and what its action led to."""

    task: Task
    pair: PromptPair
    rollout: Rollout
    reply: str
    action: Action | None
    result: StepResult


@dataclass(frozen=True, slots=True)
class Episode:
    """A game that was played to its end, or as far as its prompts fitted."""

    id: str
    turns: tuple[Turn, ...]
    ending: Ending
    outcome: float

    @property
    def invalid_moves(self) -> int:
        """Replies whose action could not be taken, or that had none."""
        return sum(not turn.result.valid for turn in self.turns)

    @property
    def feedback(self) -> str:
        """What the player was told at the end, and the last board."""
        return self.turns[-1].result.observation if self.turns else self.ending.feedback


@dataclass(frozen=True, slots=True)
class Player:
    """Who plays: an engine that was told which policy to use, and how it is asked."""

    engine: RolloutEngine
    renderer: Renderer
    sampling: Sampling
    max_new_tokens: int
    contexts: Mapping[str, Context] = field(default_factory=dict)
    """What the teacher's prompts of an episode hold besides, by its id."""
    side: Literal["student", "teacher"] = "student"
    """Whose prompts are answered: without the context, or with it."""


@dataclass(frozen=True, slots=True)
class Played:
    """All episodes, in the order they were given; those that could not go on are apart."""

    episodes: tuple[Episode, ...]
    dropped: tuple[Episode, ...] = ()
    """A prompt of theirs did not fit, and `rendering.over_long` is `drop_row`."""


@dataclass
class _Open:
    """An episode that is being played."""

    id: str
    env: Env
    observations: list[str]
    turns: list[Turn] = field(default_factory=list)

    def task(self) -> Task:
        actions: list[Action | None] = [turn.action for turn in self.turns]
        text = history_text(self.env.introduction, self.observations, actions)
        return Task(f"{self.id}/turn-{len(self.turns) + 1}", (Message("user", text),))


def play_episodes(
    envs: Mapping[str, Env], player: Player, watch: Callable[[Turn], object] | None = None
) -> Played:
    """Play every environment to its end.

    The same environments, weights and sampling seed give the same episodes, however many are
    played beside each other.

    Args:
        envs: by episode id; prompts are named `ID/turn-1` and so on.
        player: who plays.
        watch: is told of each turn when its action has been taken.

    Raises:
        OverLongError: a prompt does not fit and `rendering.over_long` is `error`.
    """
    played = {id_: _Open(id_, env, [env.observation]) for id_, env in envs.items()}
    active, dropped = list(played.values()), dict[str, Ending]()
    while active := [game for game in active if not game.env.finished and game.id not in dropped]:
        asked = _render(active, player, dropped)
        prompts = [
            Prompt(task.id, _ids(pair, player), player.max_new_tokens) for _, task, pair in asked
        ]
        rollouts = player.engine.generate(prompts, player.sampling) if prompts else []
        for (game, task, pair), rollout in zip(asked, rollouts, strict=True):
            turn = _take(game, task, pair, rollout, player.renderer)
            if watch:
                watch(turn)
    episodes = [_close(game) for game in played.values() if game.id not in dropped]
    cut = [_close(game, dropped[game.id]) for game in played.values() if game.id in dropped]
    return Played(tuple(episodes), tuple(cut))


def _render(
    active: Sequence[_Open], player: Player, dropped: dict[str, Ending]
) -> list[tuple[_Open, Task, PromptPair]]:
    found: list[tuple[_Open, Task, PromptPair]] = []
    for game in active:
        task = game.task()
        try:
            context = player.contexts.get(game.id, Context())
            found.append((game, task, player.renderer.pair(task, context)))
        except OverLongError as error:
            if player.renderer.config.over_long == "error":
                raise
            dropped[game.id] = Ending("over_long", str(error))
    return found


def _ids(pair: PromptPair, player: Player) -> tuple[int, ...]:
    return pair.student_ids if player.side == "student" else pair.teacher_ids


def _take(game: _Open, task: Task, pair: PromptPair, rollout: Rollout, renderer: Renderer) -> Turn:
    reply = renderer.decode(rollout.response_ids)
    action = parse_action(reply)
    result = game.env.act(action)
    turn = Turn(task, pair, rollout, reply, action, result)
    game.turns.append(turn)
    game.observations.append(result.observation)
    return turn


def _close(game: _Open, ending: Ending | None = None) -> Episode:
    if ending is None and game.turns:
        ending = game.turns[-1].result.ending
    assert ending, f"episode {game.id!r} was over before its first turn, or has no ending"
    return Episode(game.id, tuple(game.turns), ending, game.env.outcome)
