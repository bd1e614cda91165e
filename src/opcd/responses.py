"""Answers to prompts under a condition: sampled, graded, scored token by token."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opcd.assembly import Parts
from opcd.chunking import stats_against
from opcd.coaching import coach_items
from opcd.config.training import Loss
from opcd.distill import batch_of, cut_portions, portions_of
from opcd.divergence import TokenStats
from opcd.drawing import answer, name_episodes, play, turns_of
from opcd.envs.episodes import Episode
from opcd.errors import TaskError
from opcd.items import Item
from opcd.remote import RemoteTeacher
from opcd.rollouts.engine import Policy, Sampling
from opcd.types import Answered, Condition, PromptPair, Score

ASKED: dict[Condition, tuple[Policy, bool]] = {
    "base": ("base", False),
    "in_context": ("base", True),
    "baked": ("student", False),
    "baked_in_context": ("student", True),
}
"""Condition -> whose weights answer, and whether they see the context."""


@dataclass(frozen=True, slots=True)
class Response:
    """One graded response: an answer, or a game that was played to its end."""

    turns: tuple[Answered, ...]
    """Every prompt with its response; one for a single answer."""
    text: str
    """The last response."""
    score: Score
    feedback: str = ""
    """What a game said at the end, and its last board."""

    @property
    def answered(self) -> Answered:
        """The last prompt with its response."""
        return self.turns[-1]

    def agrees(self, other: "Response") -> bool:
        """Whether both say the same, at every turn."""
        earlier, others = (
            [turn.rollout.response_ids for turn in one.turns[:-1]] for one in (self, other)
        )
        return self.text == other.text and earlier == others


def rows_of(parts: Parts, split: str, limit: int | None) -> list[Item]:
    """The first rows of a split; in coach mode with what was written on the base's answers.

    Raises:
        TaskError: the run has no such split.
    """
    if split not in parts.items:
        raise TaskError(
            f"the run has no {split} split, only {sorted(parts.items)}; "
            + (
                f"raise game.boards.{split}"
                if parts.config.game
                else f"add tasks.{split}, or tasks.{split}_share to take it from the train rows"
            )
        )
    items = list(parts.items[split][:limit])
    if parts.config.context.type != "coach":
        return items
    if len(parts.coached.get(split, ())) < len(items):
        parts.coached[split] = coach_items(parts, items, respond(parts, items, "base"))
    return parts.coached[split][: len(items)]


def ask(
    parts: Parts,
    pairs: Sequence[PromptPair],
    condition: Condition,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
) -> list[Answered]:
    """One response to each prompt under a condition; greedy, unless told otherwise."""
    policy, with_context = ASKED[condition]
    parts.engine.use(policy, parts.config.steps + 1)
    sampling = sampling or Sampling()
    return answer(parts.config, parts.engine, pairs, sampling, with_context, max_new_tokens)


def respond(
    parts: Parts,
    items: Sequence[Item],
    condition: Condition,
    seed: str = "",
    temperature: float | None = None,
) -> list[Response]:
    """One graded response to each task under a condition, drawn as the run says.

    Args:
        parts: the run.
        items: what to answer or to play.
        condition: whose weights answer, and whether they see the items' context.
        seed: tells repeated draws apart.
        temperature: instead of `evaluation.temperature`.
    """
    config = parts.config
    drawn = "/".join(part for part in (str(config.seed), condition, seed) if part)
    how = config.evaluation
    warmth = how.temperature if temperature is None else temperature
    sampling = Sampling(warmth, how.top_p, drawn, how.top_k)
    if config.game and all(item.game for item in items):
        return _play(parts, items, condition, sampling, f"{config.seed}/{seed}")
    answered = ask(parts, [item.pair for item in items], condition, sampling)
    return [grade(parts, item, a) for item, a in zip(items, answered, strict=True)]


def _play(
    parts: Parts, items: Sequence[Item], condition: Condition, sampling: Sampling, slips: str
) -> list[Response]:
    """A game on each item's board; on slippery ice, steps slip alike under all conditions."""
    policy, with_context = ASKED[condition]
    parts.engine.use(policy, parts.config.steps + 1)
    named = name_episodes(items)
    side = "teacher" if with_context else "student"
    played = play(parts, parts.engine, named, sampling, side, slips)
    found = {episode.id: episode for episode in (*played.episodes, *played.dropped)}
    return [_judge(parts, found[id_]) for id_ in named]


def _judge(parts: Parts, episode: Episode) -> Response:
    """An episode as a response; one whose prompts did not fit any longer is not solved."""
    turns = tuple(turns_of([episode]))
    counts = {"turns": float(len(turns)), "invalid_moves": float(episode.invalid_moves)}
    return Response(
        turns,
        parts.renderer.decode(turns[-1].rollout.response_ids),
        Score({"correct": episode.outcome, **counts}, note=episode.ending.kind),
        episode.feedback,
    )


def grade(parts: Parts, item: Item, answered: Answered) -> Response:
    """A response as text, with what the grader says of it."""
    text = parts.renderer.decode(answered.rollout.response_ids)
    score = parts.grader(item.task, text) if parts.grader else Score()
    return Response((answered,), text, score)


@torch.no_grad()
def score(
    parts: Parts, answered: Sequence[Answered], loss: Loss
) -> Iterator[tuple[list[Answered], TokenStats]]:
    """Statistics of each response token against its teacher, portion by portion."""
    parts.distiller.eval()
    for portion in portions_of(parts, answered):
        teacher, batch = batch_of(parts, portion.answered, portion.origin)
        stats = parts.distiller(batch, teacher.score(batch), loss)
        if portion.counts:
            yield portion.answered, stats


@torch.no_grad()
def score_base(
    parts: Parts, answered: Sequence[Answered], loss: Loss
) -> Iterator[tuple[list[Answered], TokenStats]]:
    """The same for the base model in the student's place: what the context alone changes."""
    for portion in cut_portions(answered, parts.config.batch.rows_per_forward):
        teacher, batch = batch_of(parts, portion)
        sides = parts.base.hidden(batch.student), parts.base.head, teacher.score(batch)
        yield portion, stats_against(*sides, batch.response_T, loss)


@torch.no_grad()
def teacher_margins(
    parts: Parts, answered: Sequence[Answered]
) -> Iterator[tuple[Answered, list[float]]]:
    """How far the teacher's likeliest token is ahead of the next, in nats, at each token."""
    for portion in cut_portions(answered, parts.config.batch.rows_per_forward):
        teacher, batch = batch_of(parts, portion)
        if isinstance(teacher, RemoteTeacher):
            first_two_T2 = teacher.listed(batch, 2).log_probs_TK
        else:
            chunks = teacher.hidden(batch.teacher).split(parts.config.loss.chunk_tokens)
            first_two_T2 = torch.cat([teacher.head(chunk).topk(2).values for chunk in chunks])
        apart_T = first_two_T2[:, 0] - first_two_T2[:, 1]
        yield from zip(portion, by_row(apart_T, portion), strict=True)


def by_metric(responses: Sequence[Response]) -> dict[str, list[float]]:
    """Each metric's values, of the rows that have it: that of a class is of its rows alone."""
    values: dict[str, list[float]] = {}
    for response in responses:
        for name, value in response.score.metrics.items():
            values.setdefault(name, []).append(value)
    return values


def answer_row(item: Item, responses: Mapping[str, Response]) -> dict[str, Any]:
    """What a row was answered under each condition, for people to read."""
    row = {"id": item.task.id, "prompt": item.task.messages[-1].content, "answer": item.task.answer}
    for condition, found in responses.items():
        row[condition] = {"text": found.text, "note": found.score.note, **found.score.metrics}
        if item.game:
            row[condition]["feedback"] = found.feedback
    return row


def nats_by_row(
    scored: Iterable[tuple[list[Answered], TokenStats]],
) -> Iterator[tuple[Answered, list[float]]]:
    """Each response of `score` or `score_base`, with the divergence at each of its tokens."""
    for portion, stats in scored:
        yield from zip(portion, by_row(stats.divergence_T, portion), strict=True)


def nats_by_response(
    responses: Sequence[Response], scored: Iterable[tuple[list[Answered], TokenStats]]
) -> dict[int, list[float]]:
    """The divergence at each token of each response, by its place; a game's turns are joined."""
    places = {turn.pair.task_id: i for i, one in enumerate(responses) for turn in one.turns}
    found: dict[int, list[float]] = {}
    for answered, nats in nats_by_row(scored):
        found.setdefault(places[answered.pair.task_id], []).extend(nats)
    return found


def by_row(values_T: torch.Tensor, portion: Sequence[Answered]) -> list[list[float]]:
    """Values of flattened tokens, one list for each response."""
    parts_T = values_T.split([len(a.rollout.response_ids) for a in portion])
    return [part_T.tolist() for part_T in parts_T]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
