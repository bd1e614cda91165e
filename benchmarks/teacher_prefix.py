"""Time of a teacher's scoring pass: shared context read once, and read with every prompt.

    python benchmarks/teacher_prefix.py [--model smollm2-135m] [--contexts 250 1000 4000]

8 responses of 64 tokens behind an 8-token prompt, float32. Both ways take turns; medians of their
repetitions are printed. Reading the context once is timed apart: a run does it one time.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from opcd.batching import Batch, Side, collate
from opcd.openings import Openings
from opcd.teachers import LocalTeacher
from opcd.types import PromptPair, Rollout
from opcd.weights import load_model

ROWS, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 8, 64


def build(context_tokens: int, vocabulary: int) -> tuple[list[PromptPair], list[Rollout]]:
    """Random prompts behind one context, and responses to them."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(100, vocabulary, (count,), generator=generator).tolist())

    context = ids(context_tokens)
    own = [ids(PROMPT_TOKENS) for _ in range(ROWS)]
    pairs = [PromptPair(str(row), prompt, context + prompt) for row, prompt in enumerate(own)]
    return pairs, [Rollout(str(row), ids(RESPONSE_TOKENS), True) for row in range(ROWS)]


def timed(score: Callable[[], Tensor]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    score()
    return time.perf_counter() - started


@torch.no_grad()
def read_whole(model: Any, side: Side) -> Tensor:
    """The same hidden states from transformers alone: every row reads the context."""
    decoder = model.get_decoder()
    return side.take(decoder(input_ids=side.ids_BS, use_cache=False).last_hidden_state)


def compare(model: Any, context_tokens: int, repetitions: int) -> dict[str, float]:
    """Both ways of scoring one batch, in turn."""
    pairs, rollouts = build(context_tokens, model.config.vocab_size)
    sharing = LocalTeacher(model, nullcontext, nullcontext)
    started = time.perf_counter()
    reason = sharing.share(Openings([p.teacher_ids for p in pairs]), pairs[0].teacher_ids)
    assert reason is None, reason
    read_s = time.perf_counter() - started
    whole: Batch = collate(pairs, rollouts)
    times: dict[str, list[float]] = {"whole_s": [], "shared_s": []}
    for _ in range(repetitions):
        times["shared_s"].append(timed(lambda: sharing.hidden(whole.teacher)))
        times["whole_s"].append(timed(lambda: read_whole(model, whole.teacher)))
    whole_TV, own_TV = (
        sharing.head(hidden_TD).log_softmax(-1)
        for hidden_TD in (read_whole(model, whole.teacher), sharing.hidden(whole.teacher))
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    error = (whole_TV - own_TV).abs().max().item()
    return {**medians, "read_and_check_s": read_s, "largest_difference_nats": error}


def main() -> None:
    """Measure all context lengths and print both curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contexts", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    model = load_model(arguments.model, torch.float32)
    print(f"{ROWS} x {RESPONSE_TOKENS} response tokens, {arguments.model}, float32")
    print("context   read every time   read once   faster   largest difference")
    found = {}
    for tokens in arguments.contexts:
        found[tokens] = row = compare(model, tokens, arguments.repetitions)
        print(
            f"{tokens:7,}   {row['whole_s']:13.2f} s   {row['shared_s']:7.2f} s   "
            f"{row['whole_s'] / row['shared_s']:4.1f} x   "
            f"{row['largest_difference_nats']:.1e} nats"
        )
    first, last = found[arguments.contexts[0]], found[arguments.contexts[-1]]
    print(
        f"from {arguments.contexts[0]:,} to {arguments.contexts[-1]:,} tokens: "
        f"{last['whole_s'] / first['whole_s']:.1f} x every time, "
        f"{last['shared_s'] / first['shared_s']:.1f} x once"
    )


if __name__ == "__main__":
    main()
