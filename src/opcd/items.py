"""A run's tasks with their prompts: rows or boards, each with the context that its teacher sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

from opcd.config import Run
from opcd.config.inputs import ContextConfig
from opcd.contexts import load_context, pool_of
from opcd.envs.games import Opening, openings_of
from opcd.errors import OverLongError
from opcd.rendering import Renderer, check_some_fit, render_pairs
from opcd.tasks import load_splits
from opcd.types import Context, PromptPair, Task

MARGIN_TOKENS = 256
"""More than a chat template puts around a context: a prompt this far from the limit fits."""


Row = tuple[Task, Opening | None]
"""A task, and its board where it is played."""


@dataclass(frozen=True, slots=True)
class Item:
    """A task and its two prompts: a single answer, or the first turn of a game."""

    task: Task
    pair: PromptPair
    context: Context = field(default_factory=Context)
    """What its teacher sees besides."""
    game: Opening | None = None
    """The board that an episode is played on; `None` where one answer is all."""


@dataclass(frozen=True)
class Pool(Sequence[Item]):
    """Every row with every context, rendered when asked for: all of them may be many gigabytes."""

    renderer: Renderer
    rows: Sequence[Row]
    contexts: Sequence[Context]
    apart: tuple[int, ...] = (0,)
    """Rows whose own prompts have the least in common: what theirs share behind a context, all
    share."""

    def __len__(self) -> int:
        return len(self.rows) * len(self.contexts)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        row, number = divmod(places, len(self.contexts))
        (task, game), context = self.rows[row], self.contexts[number]
        named = replace(task, id=f"{task.id}/lessons-{number}")
        return Item(named, self.renderer.pair(named, context), context, game)

    @property
    def examples(self) -> list[Item]:
        """The rows that have least in common, with every context: enough to see who shares what."""
        count = len(self.contexts)
        return [item for row in self.apart for item in self[row * count : (row + 1) * count]]


def render_splits(config: Run, renderer: Renderer) -> tuple[dict[str, Sequence[Item]], list[str]]:
    """All tasks of a run with their prompts, and a note for each source or split that lost rows.

    Raises:
        InputError: a row, a context or a prompt is wrong.
    """
    items: dict[str, Sequence[Item]] = {}
    notes: list[str] = []
    for split, rows in load_rows(config, notes).items():
        contexts = pool_of(config.context) if split == "train" else []
        if contexts:
            items[split], dropped = render_pool(renderer, rows, contexts)
        else:
            items[split], dropped = render_rows(config.context, renderer, rows)
        if dropped:
            notes.append(
                f"{split}: {len(dropped)} of {len(rows)} rows dropped, longer than "
                f"{renderer.max_prompt_tokens} tokens: {', '.join(dropped[:5])} ..."
            )
    return items, notes


def render_rows(
    config: ContextConfig, renderer: Renderer, rows: Sequence[Row]
) -> tuple[list[Item], list[str]]:
    """Each row with its context, and the ids of those that were dropped for their length."""
    contexts = [load_context(config, task) for task, _ in rows]
    pairs, dropped = render_pairs(renderer, [task for task, _ in rows], contexts)
    known = {row[0].id: (*row, c) for row, c in zip(rows, contexts, strict=True)}
    found = [
        Item(task, pair, context, game)
        for pair in pairs
        for task, game, context in [known[pair.task_id]]
    ]
    return found, dropped


def render_pool(
    renderer: Renderer, rows: Sequence[Row], contexts: Sequence[Context]
) -> tuple[Pool, list[str]]:
    """The rows that fit with every context, as a pool, and the ids of the others.

    Only those near the limit are rendered for it.

    Raises:
        OverLongError: a row does not fit and `rendering.over_long` is `error`, or none fits.
    """
    most = max(len(renderer.encode(c.system + c.user_template)) for c in contexts)
    kept: list[Row] = []
    dropped: list[str] = []
    own: list[tuple[int, ...]] = []
    for task, game in rows:
        bare = renderer.encode(renderer.text(task.messages, renderer.config.student_thinking))
        is_near = len(bare) + most + MARGIN_TOKENS > renderer.max_prompt_tokens
        try:
            for context in contexts if is_near else ():
                renderer.pair(task, context)
            kept.append((task, game))
            own.append(bare)
        except OverLongError:
            if renderer.config.over_long == "error":
                raise
            dropped.append(task.id)
    check_some_fit(renderer, len(kept), len(dropped))
    places = range(len(own))
    apart = {min(places, key=own.__getitem__), max(places, key=own.__getitem__)}
    return Pool(renderer, kept, contexts, tuple(sorted(apart))), dropped


def pairs_of(items: Mapping[str, Sequence[Item]]) -> list[PromptPair]:
    """The prompts of all splits; of a pool, its examples."""
    return [item.pair for item in examples_of(items)]


def examples_of(items: Mapping[str, Sequence[Item]]) -> list[Item]:
    """The items of all splits; of a pool, its examples."""
    known = [split.examples if isinstance(split, Pool) else split for split in items.values()]
    return [item for split in known for item in split]


def weights_of(items: Mapping[str, Sequence[Item]]) -> list[float]:
    """How many prompts each of `pairs_of` stands for."""
    found: list[float] = []
    for split in items.values():
        examples = split.examples if isinstance(split, Pool) else split
        found += [len(split) / len(examples)] * len(examples)
    return found


def load_rows(config: Run, notes: list[str]) -> dict[str, list[Row]]:
    """What is asked in each split: the rows of files, or the boards of a game."""
    if config.game:
        return {
            split: [(opening.task(id_), opening) for id_, opening in openings.items()]
            for split, openings in openings_of(config.game).items()
        }
    assert config.tasks, "a run has tasks or a game"
    problems = config.experience.problems if config.experience else ()
    splits = load_splits(config.tasks, config.seed, notes, problems)
    return {split: [(task, None) for task in tasks] for split, tasks in splits.items()}


def check_last_turn(config: Run, renderer: Renderer, item: Item) -> list[str]:
    """A note where a game's prompts outgrow the model before its turns are over.

    Raises:
        OverLongError: the same, where `rendering.over_long` is `error`.
    """
    if not config.game or not item.game:
        return []
    try:
        last_turn(config.game.turns, renderer, item)
    except OverLongError as error:
        if renderer.config.over_long == "error":
            raise
        return [f"episodes that go on so long are dropped from training: {error}"]
    return []


def last_turn(turns: int, renderer: Renderer, item: Item) -> PromptPair:
    """The prompts of the last turn on a board, warnings not counted.

    Raises:
        OverLongError: they do not fit.
    """
    assert item.game, "asked of boards alone"
    last = item.game.task(f"{item.task.id}/turn-{turns}", turns - 1)
    return renderer.pair(last, item.context)


def with_context(renderer: Renderer, items: Sequence[Item], context: Context) -> list[Item]:
    """The same tasks with another context.

    Raises:
        OverLongError: a prompt does not fit; none is dropped, so that contexts can be compared.
    """
    return [
        Item(item.task, renderer.pair(item.task, context), context, item.game) for item in items
    ]
