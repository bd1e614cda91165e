"""Other ways to shorten a prompt, on the same test rows as the baked model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from opcd.adapters import trainable
from opcd.assembly import Parts, end_ids
from opcd.attention import why_no_prefix
from opcd.compressing import Compress, build_compressor, check_compression, compress_context
from opcd.contexts import load_context
from opcd.errors import CostsError
from opcd.evaluation import CONDITIONS, task_suite
from opcd.items import Item
from opcd.rendering import render_pairs
from opcd.responses import Response, respond
from opcd.soft_prompt import VIRTUAL_TOKENS, respond_behind, train_soft_prompt

METRICS_LEFT_OUT = ("response_tokens",)
"""Of the task suite, since they are no measure of quality."""


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Which ones to measure."""

    soft_prompt: bool = False
    soft_prompt_steps: int | None = None
    """Default: the run's."""
    compress_rate: float | None = None
    """The share of the context's tokens that LLMLingua keeps; `None` leaves it out."""

    def check(self) -> None:
        """Refuse what cannot be measured, before anything is loaded.

        Raises:
            CostsError: steps or rate mean nothing, or a package is missing.
        """
        steps = self.soft_prompt_steps
        if steps is not None and steps < 1:
            raise CostsError(
                f"--soft-prompt-steps {steps}: it takes at least one step; give a whole number "
                "from 1 on, or leave it out for as many as the run has"
            )
        if steps is not None and not self.soft_prompt:
            raise CostsError(
                "--soft-prompt-steps is given, but no soft prompt is trained without "
                "--alternatives; add that, or leave the steps out"
            )
        if self.compress_rate is not None:
            check_compression(self.compress_rate)

    @property
    def any(self) -> bool:
        """Whether there is something to measure."""
        return self.soft_prompt or self.compress_rate is not None


def measure_alternatives(
    parts: Parts, plain: Any, items: Sequence[Item], wanted: Alternatives
) -> list[dict[str, Any]]:
    """A row for each condition and each alternative: prompt tokens, metrics, extra parameters.

    Args:
        parts: the run, its best weights in the student.
        plain: the base model without an adapter.
        items: the rows to answer.
        wanted: what to measure beside the conditions.

    Raises:
        CostsError: LLMLingua's model cannot be loaded.
    """
    # First what may fail for want of something, then what takes minutes.
    compress = None
    if wanted.compress_rate is not None:
        compress = build_compressor(wanted.compress_rate, parts.accelerator.device.type)
    without = fmean(len(item.pair.student_ids) for item in items)
    with_context = fmean(len(item.pair.teacher_ids) for item in items)
    responses = {str(condition): respond(parts, items, condition) for condition in CONDITIONS}
    tokens = {"base": without, "in_context": with_context, "baked": without}
    extra = {"baked": sum(weight.numel() for weight in trainable(parts.student).values())}
    if compress:
        shorter = compressed_items(parts, items, compress)
        responses["compressed"] = respond(parts, shorter, "in_context")
        tokens["compressed"] = fmean(len(item.pair.teacher_ids) for item in shorter)
    if wanted.soft_prompt and why_no_prefix(plain) is None:
        steps = wanted.soft_prompt_steps or parts.config.steps
        tuned = train_soft_prompt(parts, plain, steps)
        stops = end_ids(parts.student, parts.renderer.tokenizer)
        responses["soft_prompt"] = respond_behind(parts, tuned, items, stops)
        tokens["soft_prompt"] = without + VIRTUAL_TOKENS
        extra["soft_prompt"] = sum(weight.numel() for weight in trainable(tuned).values())
    return rows_of_responses(responses, tokens, extra)


def compressed_items(parts: Parts, items: Sequence[Item], compress: Compress) -> list[Item]:
    """The rows with their contexts compressed; each different text is compressed once."""
    known: dict[str, str] = {}

    def once(text: str) -> str:
        if text not in known:
            known[text] = compress(text)
        return known[text]

    tasks = [item.task for item in items]
    contexts = [compress_context(load_context(parts.config.context, t), once) for t in tasks]
    pairs = {pair.task_id: pair for pair in render_pairs(parts.renderer, tasks, contexts)[0]}
    # A compressed context is shorter than one that fitted, so no row is dropped.
    return [
        Item(task, pairs[task.id], context) for task, context in zip(tasks, contexts, strict=True)
    ]


def rows_of_responses(
    responses: Mapping[str, Sequence[Response]],
    tokens: Mapping[str, float],
    extra: Mapping[str, int],
) -> list[dict[str, Any]]:
    """The task suite, one flat row a condition, with 95 % intervals as lowest and highest."""
    rows: list[dict[str, Any]] = []
    for condition, metrics in task_suite(responses, {}).items():
        row: dict[str, Any] = {"condition": condition, "prompt_tokens": tokens[condition]}
        for name, found in metrics.items():
            if name not in METRICS_LEFT_OUT:
                low, high = found["ci95"]
                row |= {name: found["mean"], f"{name}_lowest": low, f"{name}_highest": high}
        rows.append({**row, "extra_parameters": extra.get(condition, 0)})
    return rows
