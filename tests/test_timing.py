"""`opcd.timing`: what is timed is the real answer, whichever way the prompt is read."""

from typing import Any

import pytest
import torch

from opcd.prefix_cache import read_prefix
from opcd.timing import MOST_TOKENS, Served, describe_machine, time_batch, time_conditions
from tiny import random_ids
from worlds import tiny_llama

SHARED = random_ids(40, 9)
PROMPTS = [SHARED + random_ids(count, count) for count in (5, 9, 7)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama().requires_grad_(False)


def greedy(model: Any, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """The likeliest tokens, each from a pass of its own over everything before it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_and_uncached_write_the_same_tokens(model: Any) -> None:
    """A time is worth nothing if another text was written in it."""
    whole = time_batch(Served(model, PROMPTS), 3, 6)
    cached = time_batch(Served(model, PROMPTS, read_prefix(model, SHARED)), 3, 6)
    assert whole.ids == cached.ids == [greedy(model, prompt, 6) for prompt in PROMPTS]


def test_the_first_token_comes_after_the_prompt(model: Any) -> None:
    timed = time_batch(Served(model, PROMPTS), 2, 3)
    assert 0 < timed.prefill_s < timed.first_token_s
    assert timed.decode_tokens_per_s is not None and timed.decode_tokens_per_s > 0


def test_an_answer_of_one_token_has_no_decoding(model: Any) -> None:
    (row,) = time_conditions({"baked": Served(model, PROMPTS)}, [1], tokens=1, repetitions=1)
    assert row["decode_tokens_per_s"] is None
    assert row["first_token_wall_s"] > 0


def test_prompts_are_taken_over_again_for_a_larger_batch(model: Any) -> None:
    served = Served(model, PROMPTS, read_prefix(model, SHARED))
    assert [len(row) for row in served.batch(5)] == [5, 9, 7, 5, 9]


def test_each_condition_is_measured_at_each_batch_size(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditions take turns, the first round is thrown away, and answers are cut."""
    seen: list[tuple[int, int, int]] = []

    def spy(served: Served, rows: int, tokens: int) -> Any:
        seen.append((len(served.prompts), rows, tokens))
        return time_batch(served, rows, 2)

    monkeypatch.setattr("opcd.timing.time_batch", spy)
    served = {"in_context": Served(model, PROMPTS), "baked": Served(model, PROMPTS[:1])}
    rows = time_conditions(served, [1, 2], tokens=500, repetitions=2)
    assert [(r["batch_size"], r["condition"]) for r in rows] == [
        (size, condition) for size in (1, 2) for condition in served
    ]
    assert seen == [(n, size, MOST_TOKENS) for size in (1, 2) for _ in range(3) for n in (3, 1)]
    for row in rows:
        for name in ("prefill_wall_s", "first_token_wall_s", "decode_tokens_per_s"):
            assert row[f"{name}_lowest"] <= row[name] <= row[f"{name}_highest"]
    assert rows[0]["prompt_tokens_read"] == 45


def test_the_machine_is_said_to_be_this_one(model: Any) -> None:
    assert describe_machine(model).startswith("this machine's CPU, 1 threads, float32")
