"""What was gained and what it cost: suites of prompts under conditions, with intervals.

The `task` suite is the graded rows of a split; the others are in `suites`. Conditions: `base` (no
context), `in_context` (the base model with the context in its prompt), `baked` (trained, no
context).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opcd.assembly import Parts
from opcd.config.training import Loss
from opcd.distill import agree_on_teacher
from opcd.intervals import estimate, mcnemar
from opcd.items import Item
from opcd.launch import agreed, rejoin
from opcd.responses import (
    Response,
    answer_row,
    by_metric,
    mean,
    nats_by_response,
    nats_by_row,
    respond,
    rows_of,
    score,
    score_base,
)
from opcd.suites import measure_suites
from opcd.types import CONDITIONS

TOKEN_ROWS = 24
"""Answers whose tokens are shown one by one."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The contents of `evaluation.json`, and the answers behind them."""

    summary: dict[str, Any]
    answers: list[dict[str, Any]]
    """One row for each task: prompt, answer, and each condition's response."""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """Some of the answers given with the context, with what it changes at each token."""


def evaluate(parts: Parts, split: str, checkpoint: str) -> Evaluation:
    """Measure the student as it is now, beside its base, on one split.

    Raises:
        TaskError: the run has no such split.
    """
    items = rows_of(parts, split, parts.config.evaluation.test_rows)
    responses = {condition: respond(parts, items, condition) for condition in CONDITIONS}
    others = measure_suites(parts, items, responses["in_context"])
    summary = {
        "suites": {"task": task_suite(responses, distances(parts, responses)), **others},
        "paired": paired_tests(responses),
        "split": split,
        "checkpoint": checkpoint,
        "context_tokens": parts.context_tokens,
        "seed": parts.config.seed,
    }
    answers = [
        answer_row(item, {name: rows[i] for name, rows in responses.items()})
        for i, item in enumerate(items)
    ]
    return Evaluation(summary, answers, token_kl(parts, items, responses["in_context"]))


def validate(parts: Parts, step: int) -> dict[str, float]:
    """Grader's metrics and KL to the teacher on validation rows, without the context.

    A metric that only some rows have is the mean over those, `rows_METRIC` of them. Processes share
    the rows, if there is one for each.

    Raises:
        ServerError: a server is gone.
        RolloutError: the same in one of several processes; all of them are told.
    """
    items = rows_of(parts, "validation", parts.config.evaluation.validation_rows)
    shared = len(items) >= parts.accelerator.num_processes
    own = parts.own(items) if shared else items
    responses = agreed(parts.accelerator, lambda: respond(parts, own, "baked"))
    answered = [turn for r in responses for turn in r.turns]
    nats = nats_by_response(responses, score(parts, answered, Loss()))
    agree_on_teacher(parts)
    rows = [(response, nats[place]) for place, response in enumerate(responses)]
    rows = rejoin(parts.accelerator, rows) if shared else rows
    values = by_metric([response for response, _ in rows])
    metrics = {name: mean(found) for name, found in values.items()}
    counts = {f"rows_{n}": len(found) for n, found in values.items() if len(found) < len(items)}
    kl_nats = [kl for _, row in rows for kl in row]
    scores = {**metrics, **counts, "kl_nats_per_token": mean(kl_nats)}
    return {"step": step, "rows": len(items), **scores}


def distances(parts: Parts, responses: Mapping[str, Sequence[Response]]) -> dict[str, list[float]]:
    """KL to the teacher along each model's own first answers: nats a token, mean of each one."""
    found: dict[str, list[float]] = {}
    for condition, scored in (("base", score_base), ("baked", score)):
        rows = responses[condition][: parts.config.evaluation.suite_rows]
        answered = [turn for r in rows for turn in r.turns]
        nats = nats_by_response(rows, scored(parts, answered, Loss()))
        found[condition] = [mean(row) for row in nats.values()]
    return found


def token_kl(
    parts: Parts, items: Sequence[Item], responses: Sequence[Response]
) -> list[dict[str, Any]]:
    """What the context changes at each token of the first answers that were given with it.

    Of a game, its first turn.

    KL(with the context || without it), in nats, of the base model and of the baked one: the
    first is what there is to bake in, the second what is left of it.
    """
    answered = [r.turns[0] for r in responses[:TOKEN_ROWS]]
    found: dict[str, dict[str, Any]] = {}
    for name, scored in (("base", score_base), ("baked", score)):
        scores = scored(parts, answered, Loss(direction="forward_kl"))
        for given, kl_nats in nats_by_row(scores):
            row = found.setdefault(given.pair.task_id, {"id": given.pair.task_id})
            row[f"{name}_kl_nats"] = kl_nats
    for item, given in zip(items, answered, strict=False):
        decode = parts.renderer.tokenizer.decode
        row = found[given.pair.task_id]
        row["prompt"] = item.task.messages[-1].content
        row["tokens"] = [decode([i]) for i in given.rollout.response_ids]
    return [found[given.pair.task_id] for given in answered]


def task_suite(
    responses: Mapping[str, Sequence[Response]],
    kl_nats: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Each condition's metrics, agreement with `in_context`, length and KL to the teacher.

    A metric that only some rows have, that of a class, is estimated from those rows.
    """
    suite: dict[str, Any] = {}
    reference = responses["in_context"]
    for condition, rows in responses.items():
        metrics = by_metric(rows)
        metrics["agreement"] = [
            float(r.agrees(other)) for r, other in zip(rows, reference, strict=True)
        ]
        metrics |= lengths_of(rows)
        if condition in kl_nats:
            metrics["kl_nats_per_token"] = list(kl_nats[condition])
        suite[condition] = {name: estimate(v).as_json() for name, v in metrics.items()}
    return suite


def lengths_of(responses: Sequence[Response]) -> dict[str, list[float]]:
    """How long the responses are, and which were cut; of a game, means over its turns."""
    rollouts = [[turn.rollout for turn in r.turns] for r in responses]
    return {
        "response_tokens": [mean([len(t.response_ids) for t in r]) for r in rollouts],
        "truncated": [mean([float(not t.finished) for t in r]) for r in rollouts],
    }


def paired_tests(responses: Mapping[str, Sequence[Response]]) -> list[dict[str, Any]]:
    """McNemar's exact test of the conditions against each other, on graded rows."""
    tests: list[dict[str, Any]] = []
    if "correct" not in responses["baked"][0].score.metrics:
        return tests
    for first, second in (("baked", "in_context"), ("baked", "base"), ("in_context", "base")):
        a, b = ([r.score.metrics["correct"] for r in responses[c]] for c in (first, second))
        difference = mean(a) - mean(b)
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
