"""A step's prompts: which they are, and who answers them.

They are drawn by the run's seed and the step alone. The student answers without the context, and
a share is answered by their teachers with it (off-policy). In the run of a game a task is a board:
it is played to its end, and each turn is a prompt of its own with its response.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from opcd.assembly import AHEAD_STEPS, Parts
from opcd.config import Run
from opcd.envs.episodes import Episode, Played, Player, play_episodes
from opcd.errors import OverLongError, RolloutError
from opcd.items import Item
from opcd.rollouts.engine import Prompt, RolloutEngine, Sampling
from opcd.tasks import draw
from opcd.types import Answered, PromptPair


@dataclass(frozen=True, slots=True)
class Rollouts:
    """This process's prompts of a step with their responses, and the games they come from."""

    answered: list[Answered]
    played: Played = field(default_factory=lambda: Played(()))
    """Of the tasks; empty where these are single answers."""
    returned: Played = field(default_factory=lambda: Played(()))
    """Boards that were given with the context (`anchor.context_return`)."""


def roll_out(parts: Parts, step: int) -> Rollouts:
    """Draw this process's tasks and anchors of a step, and have them answered.

    The first `teacher_fraction` of each is answered by their teachers (off-policy), the rest by
    the student.
    """
    answered = list(answer_as_teacher(parts, step))
    _, asked = draw_pairs(parts, step)
    config = parts.config
    if asked or parts.in_shards:
        parts.engine.use("student", step)
        answered += answer(config, parts.engine, asked, sampling_of(config, step))
    if config.game is None:
        return Rollouts(answered)
    played, returned = play_tasks(parts, step), play_returned(parts, step)
    held = [_with_context_on_both_sides(turn) for turn in turns_of(returned.episodes)]
    return Rollouts([*turns_of(played.episodes), *held, *answered], played, returned)


def _with_context_on_both_sides(turn: Answered) -> Answered:
    """The base's turn with the context: the student, given it too, is to answer alike."""
    ids = turn.pair.teacher_ids
    return replace(turn, pair=replace(turn.pair, student_ids=ids, origin="context_return"))


def sampling_of(config: Run, step: int) -> Sampling:
    """How the responses of a step are drawn."""
    return Sampling(config.rollout.temperature, config.rollout.top_p, f"{config.seed}/{step}")


def draw_tasks(parts: Parts, step: int) -> list[Item]:
    """The tasks of a step, of all processes."""
    config = parts.config
    return draw(parts.items["train"], config.tasks_per_step, step, config.seed)


def draw_pairs(parts: Parts, step: int) -> tuple[list[PromptPair], list[PromptPair]]:
    """This process's prompts of a step: those that their teachers answer, and the student's.

    A game's prompts come up as it is played, so only anchors are among them.
    """
    config, fraction = parts.config, teacher_fraction_at(parts.config, step)
    tasks, returned = draw_tasks(parts, step), draw_returned(parts, step)
    if config.game:
        tasks, returned = [], []
    bare = config.bare_anchors_per_step
    anchors = parts.anchors.draw(config.anchors_per_step, f"{config.seed}/{step}", bare)
    # What the base says with the context is what is to be kept, so it gives the answers as well.
    # Dealt out one after the other, so that no process gets a row more than another of all.
    cut, anchor_cut = round(len(tasks) * fraction), round(len(anchors) * fraction)
    dealt = len(tasks) + len(anchors)
    taught = [with_context_on_both_sides(i.pair) for i in parts.own(returned, dealt)]
    taught += [item.pair for item in parts.own(tasks[:cut])]
    taught += parts.render_anchors(parts.own(anchors[:anchor_cut], len(tasks)))
    asked = [item.pair for item in parts.own(tasks[cut:], cut)]
    asked += parts.render_anchors(parts.own(anchors[anchor_cut:], len(tasks) + anchor_cut))
    return taught, asked


def draw_returned(parts: Parts, step: int) -> list[Item]:
    """The tasks of a step that are given with the context, of all processes."""
    config = parts.config
    turn, waits = divmod(step, config.anchor.return_every_steps)
    if waits:
        return []
    count = config.returns_per_step * config.anchor.return_every_steps
    return draw(parts.items["train"], count, turn, config.seed + 1)


def with_context_on_both_sides(pair: PromptPair) -> PromptPair:
    """A task whose student sees the context too, and should answer as its base would."""
    ids = pair.teacher_ids
    return PromptPair(f"{pair.task_id}/context_return", ids, ids, "context_return")


def play_tasks(parts: Parts, step: int) -> Played:
    """This process's boards of a step: some played by the teacher with the context.

    The others are played by the student without it.
    """
    boards = list(name_episodes(draw_tasks(parts, step)).items())
    cut = round(len(boards) * teacher_fraction_at(parts.config, step))
    taught, asked = dict(parts.own(boards[:cut])), dict(parts.own(boards[cut:], cut))
    sampling = sampling_of(parts.config, step)
    found: list[Played] = []
    if taught or (cut and parts.in_shards):
        parts.teacher_engine.use("base", 0)
        found.append(play(parts, parts.teacher_engine, taught, sampling, "teacher"))
    if asked or (cut < len(boards) and parts.in_shards):
        parts.engine.use("student", step)
        found.append(play(parts, parts.engine, asked, sampling, "student"))
    return Played(
        tuple(episode for played in found for episode in played.episodes),
        tuple(episode for played in found for episode in played.dropped),
    )


def play_returned(parts: Parts, step: int) -> Played:
    """This process's boards of a step that the base plays with the context."""
    named = name_episodes(draw_returned(parts, step), "/context_return")
    own = dict(parts.own(list(named.items()), len(draw_tasks(parts, step))))
    if not named or (not own and not parts.in_shards):
        return Played(())
    parts.engine.use("base", 0)
    return play(parts, parts.engine, own, sampling_of(parts.config, step), "teacher")


def play(
    parts: Parts,
    engine: RolloutEngine,
    items: Mapping[str, Item],
    sampling: Sampling,
    side: Literal["student", "teacher"],
    slips: str | None = None,
) -> Played:
    """One episode on each item's board.

    Args:
        parts: the run.
        engine: plays, with the weights that it was told to use.
        items: by episode id, which seeds the episode.
        sampling: how replies are drawn.
        side: whose prompts are answered: the teacher's have the item's context.
        slips: seeds where steps on slippery ice go; default: the sampling's seed.

    Raises:
        RolloutError: a prompt does not fit and `rendering.over_long` is `error`.
    """
    slips = sampling.seed if slips is None else slips
    envs = {id_: item.game.start(f"{slips}/{id_}") for id_, item in items.items() if item.game}
    contexts = {id_: item.context for id_, item in items.items()}
    most = parts.config.rollout.max_new_tokens
    try:
        return play_episodes(envs, Player(engine, parts.renderer, sampling, most, contexts, side))
    except OverLongError as error:
        raise RolloutError(f"a game went on until its prompt did not fit: {error}") from error


def name_episodes(items: Iterable[Item], suffix: str = "") -> dict[str, Item]:
    """Each item under an id of its own: a board that is drawn twice is played twice."""
    seen: Counter[str] = Counter()
    found: dict[str, Item] = {}
    for item in items:
        seen[item.task.id] += 1
        again = f"/{seen[item.task.id]}" if seen[item.task.id] > 1 else ""
        found[f"{item.task.id}{again}{suffix}"] = item
    return found


def turns_of(episodes: Iterable[Episode]) -> list[Answered]:
    """Every turn as a prompt with its response."""
    return [Answered(turn.pair, turn.rollout) for one in episodes for turn in one.turns]


def answer_as_teacher(parts: Parts, step: int) -> list[Answered]:
    """The prompts of a step that their teachers answer, with the responses.

    Those teachers stand still, so they answer the prompts of `AHEAD_STEPS` steps at a time: many
    rows cost little more than few. Where the windows begin does not depend on where a run was
    resumed.
    """
    config = parts.config
    if not config.most_teacher_answers and not config.returns_per_step:
        return []
    if step not in parts.ahead:
        start = step - step % AHEAD_STEPS
        steps = range(start, min(start + AHEAD_STEPS, config.steps))
        parts.ahead = {s: [] for s in steps}
        taught = [(s, pair) for s in steps for pair in draw_pairs(parts, s)[0]]
        sampling = Sampling(config.rollout.temperature, config.rollout.top_p, str(config.seed))
        engines = [parts.teacher_engine, parts.engine]
        which = {"task": 0} if engines[0] is not engines[1] else {}
        # Anchors apart: all other prompts begin with a context, behind which they are short.
        groups: dict[tuple[int, bool], list[tuple[int, PromptPair]]] = {
            (engine, of_anchors): [] for engine in (0, 1) for of_anchors in (False, True)
        }
        for s, pair in taught:
            groups[which.get(pair.origin, 1), pair.origin == "anchor"].append((s, pair))
        for (number, _), mine in groups.items():
            if not mine and not parts.in_shards:
                continue
            engine = engines[number]
            engine.use("base", 0)
            prompts = [
                replace(prompt_of(config, pair, True, f"/{s}"), keep_hidden=parts.keeps_hidden)
                for s, pair in mine
            ]
            for (s, pair), rollout in zip(mine, engine.generate(prompts, sampling), strict=True):
                parts.ahead[s].append(Answered(pair, rollout))
    return parts.ahead[step]


def answer(
    config: Run,
    engine: RolloutEngine,
    pairs: Sequence[PromptPair],
    sampling: Sampling,
    with_context: bool = False,
    max_new_tokens: int | None = None,
) -> list[Answered]:
    """Each pair with a response to its student prompt, or to its teacher prompt.

    As long as the run lets it be, unless `max_new_tokens` says otherwise.
    """
    prompts = [prompt_of(config, pair, with_context) for pair in pairs]
    if max_new_tokens:
        prompts = [replace(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    rollouts = engine.generate(prompts, sampling)
    return [Answered(pair, rollout) for pair, rollout in zip(pairs, rollouts, strict=True)]


def prompt_of(config: Run, pair: PromptPair, with_context: bool, draw: str = "") -> Prompt:
    """What an engine is asked: one side of a pair, and how long the response may be."""
    of_anchors = pair.origin == "anchor"
    most = config.anchor.max_new_tokens if of_anchors else config.rollout.max_new_tokens
    ids = pair.teacher_ids if with_context else pair.student_ids
    return Prompt(pair.task_id, ids, most, draw)


def teacher_fraction_at(config: Run, step: int) -> float:
    """The share of a step's prompts that their teachers answer."""
    warmup = config.loss.warmup
    if warmup is None or step >= warmup.steps or warmup.teacher_fraction is None:
        return config.rollout.teacher_fraction
    return warmup.teacher_fraction
