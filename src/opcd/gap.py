"""Is this context worth baking? Measured before training, on validation rows.

What can be baked in is the difference that the context makes, and how much a run gains is
predicted by it (arXiv 2605.30070): where base and in_context answer alike there is nothing to
gain, and where the context does harm, baking it in does the same harm.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from opcd.assembly import Parts
from opcd.config.training import Loss
from opcd.intervals import Estimate, estimate, mcnemar
from opcd.items import Item
from opcd.remote import RemoteTeacher
from opcd.responses import (
    Response,
    answer_row,
    by_metric,
    mean,
    nats_by_response,
    respond,
    rows_of,
    score_base,
    teacher_margins,
)

MOST_ANSWERS = 12
"""With more different answers than this, they are no labels to be told apart."""


def measure_gap(parts: Parts) -> dict[str, Any]:
    """The contents of `gap.json`.

    `metrics` are base and in_context on the same rows, with paired differences; `kl_nats_per_token`
    and `kl_nats_per_response` are KL(in_context || base) along the answers given with the context;
    `margin_nats` is how far the likeliest token is ahead of the next where an answer is least
    sure, `margin_nats_lowest_tenth` the same for the row at the tenth percentile, and
    `margin_nats_by_answer` its mean over the rows of each right answer, where these are labels.
    `commonest` is the answer that the context is given most often, with its share, and the share
    of the commonest right answer; `answers` has what both say to each row.

    Raises:
        TaskError: the run has no validation split.
        ConfigError: a remote teacher does not list two tokens.
    """
    if isinstance(parts.teacher, RemoteTeacher):
        parts.teacher.check_lists(2, "opcd gap compares a teacher's two likeliest tokens")
    items = rows_of(parts, "validation", parts.config.evaluation.validation_rows)
    base, in_context = (respond(parts, items, c) for c in ("base", "in_context"))
    answered = [turn for r in in_context for turn in r.turns]
    scored = score_base(parts, answered, Loss(direction="forward_kl"))
    kl_nats = list(nats_by_response(in_context, scored).values())
    least = {a.pair.task_id: min(row) for a, row in teacher_margins(parts, answered)}
    margins = sorted(least.values())
    return {
        "split": "validation",
        "rows": len(items),
        "context_type": parts.config.context.type,
        "context_tokens": parts.context_tokens,
        "selected_by": parts.config.evaluation.select_by if parts.config.is_graded else None,
        "metrics": compare_metrics(base, in_context),
        "kl_nats_per_token": estimate([mean(row) for row in kl_nats]).as_json(),
        "kl_nats_per_response": estimate([sum(row) for row in kl_nats]).as_json(),
        "margin_nats": estimate(margins).as_json(),
        "margin_nats_lowest_tenth": margins[len(margins) // 10],
        "margin_nats_by_answer": margins_by_answer(items, least),
        "truncated": mean([float(not a.rollout.finished) for a in answered]),
        "commonest": commonest(items, in_context),
        "answers": [
            answer_row(item, {"base": without, "in_context": given})
            for item, without, given in zip(items, base, in_context, strict=True)
        ],
    }


def compare_metrics(base: Sequence[Response], in_context: Sequence[Response]) -> dict[str, Any]:
    """Each metric of the grader under both conditions, and their paired difference."""
    found: dict[str, Any] = {}
    befores, afters = by_metric(base), by_metric(in_context)
    for name, before in befores.items():
        after = afters[name]
        found[name] = {
            "base": estimate(before).as_json(),
            "in_context": estimate(after).as_json(),
            "difference": _difference(before, after).as_json(),
            "p": mcnemar(after, before),
        }
    return found


def commonest(items: Sequence[Item], given: Sequence[Response]) -> dict[str, Any] | None:
    """The answer given most often, with its share; `None` where right answers are no labels."""
    right = Counter(str(item.task.answer) for item in items if item.task.answer is not None)
    if not 1 < len(right) <= MOST_ANSWERS:
        return None
    text, count = Counter(response.text for response in given).most_common(1)[0]
    return {
        "text": text,
        "share": count / len(given),
        "right_share": right.most_common(1)[0][1] / right.total(),
    }


def margins_by_answer(items: Sequence[Item], least: Mapping[str, float]) -> dict[str, float]:
    """The mean margin of each right answer's rows; nothing where answers are no labels."""
    groups: dict[str, list[float]] = {}
    for item in items:
        if item.task.answer is not None:
            groups.setdefault(str(item.task.answer), []).append(least[item.task.id])
    labels = 1 < len(groups) <= MOST_ANSWERS and 2 * len(groups) <= len(items)
    return {answer: mean(values) for answer, values in groups.items()} if labels else {}


def _difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    return estimate([b - a for a, b in zip(before, after, strict=True)])
