"""What was gained and what it cost: suites of prompts under conditions, with intervals.

Suites: `task` (the graded rows of a split) and `kept` (other prompts under other system messages,
where the baked model should still answer as its base). Conditions: `base` (no context),
`in_context` (the base model with the context in its prompt), `baked` (trained, no context).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opcd.assembly import Item, Parts
from opcd.batching import collate
from opcd.config.training import Loss
from opcd.distill import answer, cut_portions
from opcd.divergence import TokenStats
from opcd.errors import TaskError
from opcd.intervals import estimate, mcnemar
from opcd.rollouts.engine import Sampling
from opcd.types import CONDITIONS, Answered, Condition, Score


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The contents of `evaluation.json`, and the answers behind them."""

    summary: dict[str, Any]
    answers: list[dict[str, Any]]
    """One row for each task: prompt, answer, and each condition's response."""


@dataclass(frozen=True, slots=True)
class Response:
    """One graded response."""

    text: str
    tokens: int
    finished: bool
    score: Score


def evaluate(parts: Parts, split: str, checkpoint: str) -> Evaluation:
    """Measure the student as it is now, beside its base, on one split.

    Raises:
        TaskError: the run has no such split.
    """
    items = rows_of(parts, split, parts.config.evaluation.test_rows)
    responses = {condition: respond(parts, items, condition) for condition in CONDITIONS}
    suites = {"task": task_suite(responses), "kept": kept_suite(parts)}
    summary = {
        "suites": suites,
        "paired": paired_tests(responses),
        "split": split,
        "checkpoint": checkpoint,
        "context_tokens": parts.context_tokens,
        "seed": parts.config.seed,
    }
    return Evaluation(summary, [_answer_row(item, responses, i) for i, item in enumerate(items)])


def validate(parts: Parts, step: int) -> dict[str, float]:
    """Grader's metrics and KL to the teacher on validation rows, without the context."""
    items = rows_of(parts, "validation", parts.config.evaluation.validation_rows)
    parts.engine.use("student", step + 1)
    answered = answer(
        parts.config, parts.engine, [item.pair for item in items], _sampling(parts, "validation")
    )
    graded = [grade(parts, item, a) for item, a in zip(items, answered, strict=True)]
    names = graded[0].score.metrics
    metrics = {name: _mean([g.score.metrics[name] for g in graded]) for name in names}
    kl_nats = [kl for _, stats in score(parts, answered, Loss()) for kl in stats.kl_T.tolist()]
    return {"step": step, "rows": len(items), **metrics, "kl_nats_per_token": _mean(kl_nats)}


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


def respond(parts: Parts, items: Sequence[Item], condition: Condition) -> list[Response]:
    """One graded response to each task under a condition."""
    parts.engine.use("student" if condition == "baked" else "base", parts.config.steps + 1)
    pairs = [item.pair for item in items]
    answered = answer(
        parts.config,
        parts.engine,
        pairs,
        _sampling(parts, condition),
        with_context=condition == "in_context",
    )
    return [grade(parts, item, a) for item, a in zip(items, answered, strict=True)]


def grade(parts: Parts, item: Item, answered: Answered) -> Response:
    """A response as text, with what the grader says of it."""
    ids = answered.rollout.response_ids
    text = parts.renderer.decode(ids)
    score = parts.grader(item.task, text) if parts.grader else Score()
    return Response(text, len(ids), answered.rollout.finished, score)


@torch.no_grad()
def score(
    parts: Parts, answered: Sequence[Answered], loss: Loss
) -> Iterator[tuple[list[Answered], TokenStats]]:
    """Statistics of each response token against its teacher, portion by portion."""
    parts.distiller.eval()
    for portion in cut_portions(answered, parts.config.batch.rows_per_forward):
        is_task = portion[0].pair.origin == "task"
        teacher = parts.teacher if is_task else parts.base
        prefix_tokens = teacher.prefix_tokens if is_task else 0
        batch = collate([a.pair for a in portion], [a.rollout for a in portion], prefix_tokens)
        batch = batch.to(parts.accelerator.device)
        yield portion, parts.distiller(batch, teacher.hidden(batch.teacher), teacher.head, loss)


def task_suite(responses: Mapping[str, Sequence[Response]]) -> dict[str, Any]:
    """Each condition's metrics, agreement with `in_context` and length."""
    suite: dict[str, Any] = {}
    reference = responses["in_context"]
    for condition, rows in responses.items():
        metrics = {name: [r.score.metrics[name] for r in rows] for name in rows[0].score.metrics}
        metrics["agreement"] = [
            float(r.text == other.text) for r, other in zip(rows, reference, strict=True)
        ]
        metrics["response_tokens"] = [float(r.tokens) for r in rows]
        metrics["truncated"] = [float(not r.finished) for r in rows]
        suite[condition] = {name: estimate(v).as_json() for name, v in metrics.items()}
    return suite


def kept_suite(parts: Parts) -> dict[str, Any]:
    """How far the baked model is from its base on other prompts under other system messages.

    `kl_nats_per_token` is KL(base || baked) along the base model's own greedy answers;
    `greedy_agreement` the share of an answer's tokens that both models write, each by itself.
    """
    pairs = parts.render_anchors(parts.kept.draw(parts.config.evaluation.kept_rows, "kept"))
    parts.engine.use("base", 0)
    base = answer(parts.config, parts.engine, pairs, Sampling())
    parts.engine.use("student", parts.config.steps + 1)
    baked = answer(parts.config, parts.engine, pairs, Sampling())
    kl_nats = [
        kl
        for portion, stats in score(parts, base, Loss(direction="forward_kl"))
        for kl in _means_by_row(stats.divergence_T, portion)
    ]
    agreement = [_agreement(a, b) for a, b in zip(base, baked, strict=True)]
    return {
        "baked": {
            "kl_nats_per_token": estimate(kl_nats).as_json(),
            "greedy_agreement": estimate(agreement).as_json(),
        }
    }


def paired_tests(responses: Mapping[str, Sequence[Response]]) -> list[dict[str, Any]]:
    """McNemar's exact test of the conditions against each other, on graded rows."""
    tests: list[dict[str, Any]] = []
    if "correct" not in responses["baked"][0].score.metrics:
        return tests
    for first, second in (("baked", "in_context"), ("baked", "base"), ("in_context", "base")):
        a, b = ([r.score.metrics["correct"] for r in responses[c]] for c in (first, second))
        difference = _mean(a) - _mean(b)
        tests.append(
            {
                "suite": "task",
                "metric": "correct",
                "first": first,
                "second": second,
                "difference": difference,
                "p": mcnemar(a, b),
                "test": "McNemar, exact",
            }
        )
    return tests


def _sampling(parts: Parts, seed: str) -> Sampling:
    config = parts.config
    temperature = config.evaluation.temperature
    return Sampling(temperature, config.rollout.top_p, f"{config.seed}/{seed}")


def _answer_row(
    item: Item, responses: Mapping[str, Sequence[Response]], index: int
) -> dict[str, Any]:
    row = {"id": item.task.id, "prompt": item.task.messages[-1].content, "answer": item.task.answer}
    for condition, rows in responses.items():
        found = rows[index]
        row[condition] = {"text": found.text, "note": found.score.note, **found.score.metrics}
    return row


def _means_by_row(values_T: torch.Tensor, portion: Sequence[Answered]) -> list[float]:
    parts_T = values_T.split([len(a.rollout.response_ids) for a in portion])
    return [part_T.mean().item() for part_T in parts_T]


def _agreement(first: Answered, second: Answered) -> float:
    ours, theirs = first.rollout.response_ids, second.rollout.response_ids
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    return same / max(len(ours), len(theirs))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
