"""How long requests take on this machine: the prompt, the first token, the tokens after it."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from opcd.models import output_head
from opcd.prefix_cache import SharedPrefix
from opcd.rollouts.hf import CachedRows

REPETITIONS = 5
"""Measured ones; one more before them is thrown away."""
MOST_TOKENS = 32
"""Tokens of an answer that are measured."""


@dataclass(frozen=True, slots=True)
class Served:
    """A condition as a server holds it: weights, prompts, and what it has read before."""

    model: Any
    prompts: Sequence[tuple[int, ...]]
    prefix: SharedPrefix | None = None

    def batch(self, rows: int) -> list[tuple[int, ...]]:
        """So many prompts, without what was read before; over again where there are too few."""
        cut = self.prefix.tokens if self.prefix else 0
        return [prompt[cut:] for prompt in islice(cycle(self.prompts), rows)]


@dataclass(frozen=True, slots=True)
class Timed:
    """One batch of requests, answered at once and greedily."""

    prefill_s: float
    first_token_s: float
    """From the request on: the prompt's reading included."""
    decode_tokens_per_s: float | None
    """Of all rows together, after the first token; `None` for answers of one token."""
    ids: list[list[int]]
    """What was written; nothing ends it early."""


def time_conditions(
    served: Mapping[str, Served],
    batch_sizes: Sequence[int],
    tokens: int,
    repetitions: int = REPETITIONS,
) -> list[dict[str, Any]]:
    """Medians, lowest and highest of some repetitions for each batch size and condition.

    Conditions take turns, so that a machine that slows down does so for all of them.

    Args:
        served: what to measure, by the name of the condition.
        batch_sizes: requests answered together.
        tokens: length of the answers; at most `MOST_TOKENS` are written.
        repetitions: how often each is measured.
    """
    rows: list[dict[str, Any]] = []
    for size in batch_sizes:
        found: dict[str, list[Timed]] = {condition: [] for condition in served}
        for _ in range(repetitions + 1):
            for condition, one in served.items():
                found[condition].append(time_batch(one, size, min(tokens, MOST_TOKENS)))
        rows += [
            {
                "batch_size": size,
                "condition": condition,
                "prompt_tokens_read": statistics.fmean(map(len, served[condition].batch(size))),
                **_spread("prefill_wall_s", [t.prefill_s for t in timed[1:]]),
                **_spread("first_token_wall_s", [t.first_token_s for t in timed[1:]]),
                **_spread("decode_tokens_per_s", [t.decode_tokens_per_s for t in timed[1:]]),
            }
            for condition, timed in found.items()
        ]
    return rows


@torch.no_grad()
def time_batch(served: Served, rows: int, tokens: int) -> Timed:
    """Have one batch answered with exactly so many tokens a row, and take the times."""
    model, prefixes = served.model, [served.prefix] * rows if served.prefix else ()
    reader, head, prompts = CachedRows(model, prefixes), output_head(model), served.batch(rows)
    started = _now()
    hidden_BD = reader.read(prompts)
    read = _now()
    written = [head(hidden_BD).argmax(-1)]
    first = _now()
    for _ in range(tokens - 1):
        written.append(head(reader.write(written[-1])).argmax(-1))
    last = _now()
    return Timed(
        prefill_s=read - started,
        first_token_s=first - started,
        decode_tokens_per_s=rows * (tokens - 1) / (last - first) if tokens > 1 else None,
        ids=torch.stack(written, dim=-1).tolist(),
    )


def describe_machine(model: Any) -> str:
    """What times were measured on, as far as they hang on it."""
    weight = next(model.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.device.type == "cpu":
        return f"this machine's CPU, {torch.get_num_threads()} threads, {dtype}"
    if weight.device.type == "cuda":
        return f"this machine's {torch.cuda.get_device_name(weight.device)}, {dtype}"
    return f"this machine's {weight.device.type} device, {dtype}"


def _now() -> float:
    """Seconds, once the device has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {name: None, f"{name}_lowest": None, f"{name}_highest": None}
    return {
        name: statistics.median(known),
        f"{name}_lowest": min(known),
        f"{name}_highest": max(known),
    }
