"""Traces: the model solves problems without any experience, for others to learn from.

Which problem stands where is a function of the run's seed alone, and solving does not depend on
the experience, so all accumulations are solved side by side.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opcd.assembly import Parts
from opcd.config.experience import Experience
from opcd.drawing import play
from opcd.envs.episodes import Episode
from opcd.errors import TraceError
from opcd.graders import feedback_on
from opcd.items import Item
from opcd.responses import Response, respond
from opcd.rollouts.engine import Sampling
from opcd.traces import Trace, Turn, append_traces, read_traces
from opcd.types import Task


@dataclass(frozen=True, slots=True)
class Place:
    """Where a trace belongs: in which round, which accumulation, and as which of its traces."""

    round: int
    seed: int
    step: int
    """From 1 on."""

    @property
    def id(self) -> str:
        """The id of its trace."""
        return f"round-{self.round}/seed-{self.seed}/step-{self.step}"


def solve(
    parts: Parts,
    experience: Experience,
    store: Path,
    number: int = 1,
    say: Callable[[str], object] = lambda _: None,
) -> list[list[Trace]]:
    """One trace for every step of every accumulation; those in the store are not made again.

    They are saved `rollout.batch_rows` at a time: that many are decoded together anyway.

    Args:
        parts: the run, whose `extraction` items are the problems.
        experience: how many, and what is told of them.
        store: where they are appended.
        number: the round.
        say: is told how far it is.

    Returns:
        The traces of each accumulation, in the order of its steps.

    Raises:
        TraceError: a trace in the store is not the one that belongs there.
    """
    plan = list(places(parts, experience, number))
    known = {trace.id: trace for trace in read_traces(store)}
    check_stored(store, known, plan, parts.config.model.path)
    missing = [(place, item) for place, item in plan if place.id not in known]
    rows = parts.config.rollout.batch_rows
    for start in range(0, len(missing), rows):
        made = attempt(parts, experience, missing[start : start + rows])
        append_traces(store, made)
        known.update({trace.id: trace for trace in made})
        say(f"solved {start + len(made)} of {len(missing)} problems")
    traces: list[list[Trace]] = [[] for _ in range(experience.seeds)]
    for place, _ in plan:
        traces[place.seed].append(known[place.id])
    return traces


def check_stored(
    store: Path, known: Mapping[str, Trace], plan: Sequence[tuple[Place, Item]], model: str
) -> None:
    """Refuse traces of another problem, or of another model, than belong in their places.

    Raises:
        TraceError: naming the first one.
    """
    for place, item in plan:
        found = known.get(place.id)
        if found and (found.problem, found.model) != (item.task.id, model):
            raise TraceError(
                f"{store}: trace {place.id!r} is {found.model!r} on {found.problem!r}, but this "
                f"run has {model!r} on {item.task.id!r} there: the store is another run's, or "
                "problems, model, seed or experience.steps changed since; name another "
                "experience.store, or give name=... another value"
            )


def places(parts: Parts, experience: Experience, number: int) -> Iterator[tuple[Place, Item]]:
    """Which problem is solved where: none comes again before all have been, over all rounds."""
    items, steps = parts.items["extraction"], experience.steps
    for seed in range(experience.seeds):
        order: list[Item] = []
        while len(order) < number * steps:
            name = f"{parts.config.seed}/{seed}/{len(order)}"
            order += random.Random(name).sample(items, len(items))
        for step, item in enumerate(order[(number - 1) * steps : number * steps], start=1):
            yield Place(number, seed, step), item


def attempt(
    parts: Parts, experience: Experience, planned: Sequence[tuple[Place, Item]]
) -> list[Trace]:
    """The base model's traces, at the temperature of the run's rollouts."""
    named = [_rename(item, place.id) for place, item in planned]
    if parts.config.game:
        found = _play(parts, experience, named)
    else:
        found = _answer(parts, experience, named)
    return [
        replace(
            trace,
            problem=item.task.id,
            model=parts.config.model.path,
            round=place.round,
            seed=place.seed,
            step=place.step,
        )
        for trace, (place, item) in zip(found, planned, strict=True)
    ]


def _rename(item: Item, id_: str) -> Item:
    # The id seeds the response, and one problem may be solved in several places.
    return replace(item, task=replace(item.task, id=id_), pair=replace(item.pair, task_id=id_))


def _answer(parts: Parts, experience: Experience, items: Sequence[Item]) -> list[Trace]:
    asked = parts if experience.feedback != "none" else replace(parts, grader=None)
    temperature = parts.config.rollout.temperature
    responses = respond(asked, items, "base", "solve", temperature)
    return [
        _trace_of_answer(item.task, response, experience.feedback)
        for item, response in zip(items, responses, strict=True)
    ]


def _trace_of_answer(task: Task, response: Response, kind: str) -> Trace:
    outcome = response.score.metrics.get("correct")
    told = feedback_on(task, outcome, kind)
    cut = not response.answered.rollout.finished
    return Trace(task.id, task.messages, response.text, outcome=outcome, feedback=told, cut=cut)


def _play(parts: Parts, experience: Experience, items: Sequence[Item]) -> list[Trace]:
    # Not through `respond`, whose turns are token ids: a trace is what was said.
    rollout = parts.config.rollout
    sampling = Sampling(rollout.temperature, rollout.top_p, f"{parts.config.seed}/solve")
    parts.engine.use("base", 0)
    played = play(parts, parts.engine, {i.task.id: i for i in items}, sampling, "student")
    found = {episode.id: episode for episode in (*played.episodes, *played.dropped)}
    return [_trace_of_game(found[item.task.id], experience.feedback) for item in items]


def _trace_of_game(episode: Episode, kind: str) -> Trace:
    turns = tuple(Turn(turn.task.messages, turn.reply) for turn in episode.turns)
    told = episode.feedback if kind != "none" else ""
    last = turns[-1]
    cut = not all(turn.rollout.finished for turn in episode.turns)
    return Trace(episode.id, last.prompt, last.response, "", turns, episode.outcome, told, cut=cut)
