"""What a text game is: one object is one episode, which is acted on until it has an ending.

Any object with the shape of `Env` can be played. The games of this package are worlds (`World`:
how a board changes) inside a `BoardEnv` (whose turn it is, what is forgiven, when it is over).
Knows nothing of models or tokens; reads a reply only for the action in it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Action = Literal["up", "down", "left", "right"]
EndingKind = Literal["solved", "failed", "invalid_moves", "out_of_turns", "over_long"]
"""The last: not by the game, but since the model cannot hold what was said so far."""

WRITTEN: dict[str, Action] = {
    "up": "up",
    "down": "down",
    "left": "left",
    "right": "right",
    "w": "up",
    "s": "down",
    "a": "left",
    "d": "right",
}
"""What may stand in the brackets, and what it means."""
BRACKETED = re.compile(rf"\[\s*({'|'.join(WRITTEN)})\s*\]", re.IGNORECASE)
STEPS: dict[Action, tuple[int, int]] = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
}
"""Rows and columns that each action moves by."""
Cell = tuple[int, int]
"""Row and column, from the top left."""
NO_ACTION = (
    "No action was found in your reply. End it with one of [up], [down], [left], [right], in "
    "brackets."
)


@dataclass(frozen=True, slots=True)
class Ending:
    """How an episode ended, and what the player is told about it."""

    kind: EndingKind
    feedback: str

    @property
    def outcome(self) -> float:
        """1 if the game was solved, else 0."""
        return float(self.kind == "solved")


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one action led to."""

    observation: str
    """What the player sees next: a warning if there is one, and the board."""
    valid: bool
    """Whether the action could be taken; if not, nothing has moved."""
    ending: Ending | None = None


class Env(Protocol):
    """One episode of a game; used once."""

    @property
    def introduction(self) -> str:
        """What the player is told before the first board, at every turn."""
        ...

    @property
    def observation(self) -> str:
        """What the player sees now."""
        ...

    @property
    def finished(self) -> bool:
        """Whether it is over; it must be at some time, whatever the actions."""
        ...

    @property
    def outcome(self) -> float:
        """1 once it is solved, else 0."""
        ...

    def act(self, action: Action | None) -> StepResult:
        """Take an action; `None` where the reply had none. Not after the end."""
        ...


@dataclass(frozen=True, slots=True)
class Effect:
    """What a move did to a world."""

    text: str = ""
    """For the player: why the move was not possible, or how it decided the game."""
    valid: bool = True
    verdict: Literal["solved", "failed"] | None = None


class World(Protocol):
    """How a board changes; knows nothing of turns and warnings."""

    @property
    def text(self) -> str:
        """The board as it is now."""
        ...

    def move(self, action: Action) -> Effect:
        """Move, if that is possible."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """When an episode is over without a verdict."""

    turns: int = 5
    invalid_moves_allowed: int = 1
    """Over the whole episode; each costs a turn."""


class BoardEnv:
    """A world with limits: an `Env`."""

    def __init__(self, world: World, introduction: str, limits: Limits) -> None:
        """Start the episode; nothing else may move the world."""
        self._world = world
        self._introduction = introduction
        self._limits = limits
        self._turns = 0
        self._invalid_moves = 0
        self._ending: Ending | None = None
        self._observation = world.text

    @property
    def introduction(self) -> str:
        """What the player is told before the first board."""
        return self._introduction

    @property
    def observation(self) -> str:
        """What the player sees now."""
        return self._observation

    @property
    def finished(self) -> bool:
        """Whether the episode has an ending."""
        return self._ending is not None

    @property
    def outcome(self) -> float:
        """1 once it is solved, else 0."""
        return self._ending.outcome if self._ending else 0.0

    def act(self, action: Action | None) -> StepResult:
        """Take an action; `None`, where the reply had none, is an invalid move."""
        assert self._ending is None, "the episode is over; make a new environment for another"
        effect = self._world.move(action) if action else Effect(NO_ACTION, valid=False)
        self._turns += 1
        self._invalid_moves += not effect.valid
        self._ending = self._judge(effect)
        told = self._ending.feedback if self._ending else self._warning(effect)
        self._observation = "\n".join(part for part in (told, self._world.text) if part)
        return StepResult(self._observation, effect.valid, self._ending)

    def _judge(self, effect: Effect) -> Ending | None:
        allowed = self._limits.invalid_moves_allowed
        if effect.verdict:
            return Ending(effect.verdict, effect.text)
        if self._invalid_moves > allowed:
            text = f"{effect.text} The game is over: {self._invalid_moves} invalid"
            return Ending("invalid_moves", f"{text} {_moves(self._invalid_moves)}.")
        if self._turns >= self._limits.turns:
            text = f"The limit of {self._limits.turns} turns is reached without a solution."
            return Ending("out_of_turns", f"{effect.text} {text}".strip())
        return None

    def _warning(self, effect: Effect) -> str:
        if effect.valid:
            return effect.text
        left = self._limits.invalid_moves_allowed - self._invalid_moves
        after = f"After {left} more, the" if left else "The"
        return f"{effect.text} {after} next invalid move ends the game."


def beside(cell: Cell, action: Action) -> Cell:
    """The next cell that way."""
    down, right = STEPS[action]
    return cell[0] + down, cell[1] + right


def waves(start: Cell, cells: Iterable[Cell]) -> Iterator[set[Cell]]:
    """The cells that are 0, 1, 2 and more steps from the start, as far as they can be reached."""
    left = set(cells)
    wave = {start} & left
    while wave:
        yield wave
        left -= wave
        wave = {beside(cell, action) for cell in wave for action in STEPS} & left


def parse_action(reply: str) -> Action | None:
    """The last action in brackets of a reply, `[up]` or `[w]` for instance; `None` without one."""
    found = BRACKETED.findall(reply)
    return WRITTEN[found[-1].lower()] if found else None


def history_text(
    introduction: str, observations: Sequence[str], actions: Sequence[Action | None]
) -> str:
    """The user message of a turn: what was seen and done so far, the present board last."""
    parts = [introduction, observations[0]]
    for action, observation in zip(actions, observations[1:], strict=True):
        done = f"Your action: [{action}]" if action else "Your reply had no action."
        parts += [done, observation]
    return "\n\n".join(parts)


def introduce(player: str, rules: str, limits: Limits) -> str:
    """Who the player is, which actions there are, and the rules if these are not empty."""
    told = f"{rules}\n{_limits_text(limits)}\n\n" if rules else ""
    return (
        f"You are {player}.\n\n{told}The actions are [up], [down], [left] and [right], which can "
        "also be written [w], [s], [a] and [d]. Pick one."
    )


def _limits_text(limits: Limits) -> str:
    allowed = limits.invalid_moves_allowed
    forgiven = f"{allowed} invalid {_moves(allowed)}" if allowed else "No invalid move"
    verb = "is" if allowed <= 1 else "are"
    return (
        f"You have {limits.turns} turns, with one action in each. A move that is not possible and "
        f"a reply without an action are invalid and cost a turn. {forgiven} {verb} forgiven, the "
        "next one ends the game."
    )


def _moves(count: int) -> str:
    return "move" if count == 1 else "moves"
