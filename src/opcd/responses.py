"""Answers to prompts under a condition: sampled, graded, scored token by token."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from opcd.assembly import Item, Parts
from opcd.chunking import chunked_stats
from opcd.config.training import Loss
from opcd.distill import answer, batch_of, cut_portions
from opcd.divergence import TokenStats
from opcd.errors import TaskError
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
    """One graded response."""

    answered: Answered
    text: str
    score: Score


def rows_of(parts: Parts, split: str, limit: int | None) -> list[Item]:
    """The first rows of a split.

    Raises:
        TaskError: the run has no such split.
    """
    if split not in parts.items:
        raise TaskError(
            f"the run has no {split} split, only {sorted(parts.items)}; add tasks.{split}, or "
            f"tasks.{split}_share to take it from the train rows"
        )
    return parts.items[split][:limit]


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


def respond(parts: Parts, items: Sequence[Item], condition: Condition) -> list[Response]:
    """One graded response to each task under a condition, drawn as the run says."""
    config = parts.config
    how = config.evaluation
    sampling = Sampling(how.temperature, how.top_p, f"{config.seed}/{condition}", how.top_k)
    answered = ask(parts, [item.pair for item in items], condition, sampling)
    return [grade(parts, item, a) for item, a in zip(items, answered, strict=True)]


def grade(parts: Parts, item: Item, answered: Answered) -> Response:
    """A response as text, with what the grader says of it."""
    text = parts.renderer.decode(answered.rollout.response_ids)
    score = parts.grader(item.task, text) if parts.grader else Score()
    return Response(answered, text, score)


@torch.no_grad()
def score(
    parts: Parts, answered: Sequence[Answered], loss: Loss
) -> Iterator[tuple[list[Answered], TokenStats]]:
    """Statistics of each response token against its teacher, portion by portion."""
    parts.distiller.eval()
    for portion in cut_portions(answered, parts.config.batch.rows_per_forward):
        teacher, batch = batch_of(parts, portion)
        yield portion, parts.distiller(batch, teacher.hidden(batch.teacher), teacher.head, loss)


@torch.no_grad()
def score_base(
    parts: Parts, answered: Sequence[Answered], loss: Loss
) -> Iterator[tuple[list[Answered], TokenStats]]:
    """The same for the base model in the student's place: what the context alone changes."""
    for portion in cut_portions(answered, parts.config.batch.rows_per_forward):
        teacher, batch = batch_of(parts, portion)
        teacher_TD, base_TD = teacher.hidden(batch.teacher), parts.base.hidden(batch.student)
        sides = base_TD, parts.base.head, teacher_TD, teacher.head
        yield portion, chunked_stats(*sides, batch.response_T, loss)


@torch.no_grad()
def teacher_margins(
    parts: Parts, answered: Sequence[Answered]
) -> Iterator[tuple[Answered, list[float]]]:
    """How far the teacher's likeliest token is ahead of the next, in nats, at each token."""
    for portion in cut_portions(answered, parts.config.batch.rows_per_forward):
        teacher, batch = batch_of(parts, portion)
        chunks = teacher.hidden(batch.teacher).split(parts.config.loss.chunk_tokens)
        first_two_T2 = torch.cat([teacher.head(chunk_CD).topk(2).values for chunk_CD in chunks])
        apart_T = first_two_T2[:, 0] - first_two_T2[:, 1]
        yield from zip(portion, by_row(apart_T, portion), strict=True)


def by_metric(responses: Sequence[Response]) -> dict[str, list[float]]:
    """Each metric's values, of the rows that have it: that of a class is of its rows alone."""
    values: dict[str, list[float]] = {}
    for response in responses:
        for name, value in response.score.metrics.items():
            values.setdefault(name, []).append(value)
    return values


def nats_by_row(
    scored: Iterable[tuple[list[Answered], TokenStats]],
) -> Iterator[tuple[Answered, list[float]]]:
    """Each response of `score` or `score_base`, with the divergence at each of its tokens."""
    for portion, stats in scored:
        yield from zip(portion, by_row(stats.divergence_T, portion), strict=True)


def by_row(values_T: torch.Tensor, portion: Sequence[Answered]) -> list[list[float]]:
    """Values of flattened tokens, one list for each response."""
    parts_T = values_T.split([len(a.rollout.response_ids) for a in portion])
    return [part_T.tolist() for part_T in parts_T]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
