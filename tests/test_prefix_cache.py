"""`opcd.prefix_cache`: a context read once gives what a context read every time gives."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from allocated import peak_bytes
from opcd import models, prefix_cache
from opcd.attention import why_no_prefix
from opcd.batching import collate
from opcd.models import hidden_states, output_head
from opcd.prefix_cache import (
    SharedPrefix,
    forward_after_prefix,
    read_prefix,
    states_after_prefix,
    token_bytes,
)
from tiny import SHAPE, build, pair_of, random_ids, rollout_of

PREFIX = 70
ARCHITECTURES = {
    "llama, grouped heads": LlamaConfig(**SHAPE),
    "llama, a key for each head": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "llama, one key for all": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "qwen2, biased projections": Qwen2Config(**SHAPE),
    "qwen3, normalised queries": Qwen3Config(**SHAPE),
    "mistral, no window": MistralConfig(**SHAPE, sliding_window=None),
}
PAIRS = [
    pair_of("a", 5, PREFIX + 12, seed=1, shared=PREFIX),
    pair_of("b", 5, PREFIX + 1, seed=2, shared=PREFIX),
    pair_of("c", 5, PREFIX + 30, seed=3, shared=PREFIX),
]
ROLLOUTS = [rollout_of("a", 9, 1), rollout_of("b", 2, 2), rollout_of("c", 6, 3)]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest) -> Any:
    return build(ARCHITECTURES[request.param], seed=5)


@pytest.fixture(scope="module")
def llama() -> Any:
    return build(ARCHITECTURES["llama, grouped heads"], seed=5)


@torch.no_grad()
def difference(model: Any) -> float:
    """The largest difference in log-probability between the cached and the uncached pass."""
    whole = collate(PAIRS, ROLLOUTS).teacher
    cut, _ = whole.part([0, 1, 2], [PREFIX] * 3)
    prefix = read_prefix(model, PAIRS[0].teacher_ids[:PREFIX])
    cached_TD = cut.take(forward_after_prefix(model, [prefix] * 3, cut.ids_BS))
    sides = (hidden_states(model, whole), cached_TD)
    uncached_TV, cached_TV = (output_head(model)(side).log_softmax(-1) for side in sides)
    return (uncached_TV - cached_TV).abs().max().item()


def test_cached_equals_uncached_on_ragged_batches(model: Any) -> None:
    assert why_no_prefix(model) is None
    assert difference(model) < 1e-4


@torch.no_grad()
def test_rows_one_after_the_other_stand_each_behind_its_own_prefix(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As side by side, and as read in full; two rows of one prefix, and one of another."""
    whole = collate(PAIRS, ROLLOUTS).teacher
    cuts = [PREFIX, PREFIX - 40, PREFIX]
    own, place_T = whole.part([0, 2, 1], [cuts[0], cuts[2], cuts[1]])
    long, short = (read_prefix(model, PAIRS[0].teacher_ids[:cut]) for cut in cuts[:2])
    behind = [long, long, short]
    found_TD = states_after_prefix(model, behind, own)
    torch.testing.assert_close(
        found_TD[place_T.argsort()], hidden_states(model, whole), rtol=1e-4, atol=1e-4
    )
    monkeypatch.setattr(models, "PLAIN_ATTENTION_TOKENS", 0)
    side_by_side_TD = states_after_prefix(model, behind, own)
    torch.testing.assert_close(found_TD, side_by_side_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [1, 10**6], ids=["by the fused kernel", "by plain products"])
def test_the_prefix_may_be_read_in_parts(
    model: Any, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix longer than PREFILL_TOKENS takes several passes, the last one short."""
    whole = read_prefix(model, PAIRS[0].teacher_ids[:PREFIX])
    monkeypatch.setattr(prefix_cache, "PREFILL_TOKENS", 32)
    monkeypatch.setattr(prefix_cache, "FUSED_TOKENS", fused)
    parts = read_prefix(model, PAIRS[0].teacher_ids[:PREFIX])
    for ours, wanted in zip(parts.keys + parts.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    assert difference(model) < 1e-4


@pytest.mark.parametrize("scores", [1, 2 * PREFIX * 7])
def test_scores_may_be_computed_in_parts(
    llama: Any, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query at a time, and a number of queries that does not divide them."""
    monkeypatch.setattr(prefix_cache, "SCORES_AT_ONCE", scores)
    assert difference(llama) < 1e-4


def test_the_prefix_matters(llama: Any) -> None:
    """Tests the tests above: without the prefix, or with another one, the values differ."""
    own_BS = torch.tensor([random_ids(6, 1)])
    hidden = [
        forward_after_prefix(llama, [read_prefix(llama, random_ids(PREFIX, seed))], own_BS)
        for seed in (77, 78)
    ]
    assert (hidden[0] - hidden[1]).abs().max() > 0.1


@torch.no_grad()
def stepwise(
    model: Any, prefixes: list[SharedPrefix], rows: list[tuple[int, ...]], new: Tensor
) -> Tensor:
    """Left-padded rows, then one token at a time into a cache; the last hidden state, `_BD`."""
    width = max(len(row) for row in rows)
    ids_BS = torch.tensor([(0,) * (width - len(row)) + row for row in rows])
    mask_BS = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    cache = DynamicCache(config=model.config)
    hidden_BSD = forward_after_prefix(model, prefixes, ids_BS, mask_BS, cache)
    for token_B1 in new.split(1, dim=1):
        mask_BS = torch.cat([mask_BS, torch.ones_like(token_B1)], dim=1)
        hidden_BSD = forward_after_prefix(model, prefixes, token_B1, mask_BS, cache)
    assert cache.get_seq_length() == width + new.shape[1]
    return hidden_BSD[:, -1]


@pytest.mark.parametrize(
    "openings",
    [
        [random_ids(PREFIX, 77)] * 3,
        [random_ids(PREFIX, 77), random_ids(33, 78), random_ids(33, 78)],
        [random_ids(9, 79), random_ids(PREFIX, 77), random_ids(9, 79)],
    ],
    ids=["one prefix", "two prefixes", "neighbours behind different ones"],
)
def test_left_padding_with_a_growing_cache_equals_full_prompts(
    model: Any, openings: list[tuple[int, ...]]
) -> None:
    """What the rollout engine does: ragged prompts on the left, then token by token."""
    read = {ids: read_prefix(model, ids) for ids in openings}
    rows = [random_ids(count, 40 + count) for count in (1, 8, 5)]
    new_B4 = torch.tensor([random_ids(4, 60 + row) for row in range(3)])
    found_BD = stepwise(model, [read[ids] for ids in openings], rows, new_B4)
    for row, own in enumerate(rows):
        whole = torch.tensor([[*openings[row], *own, *new_B4[row].tolist()]])
        with torch.no_grad():
            wanted_D = model.get_decoder()(input_ids=whole).last_hidden_state[0, -1]
        ours, wanted = (output_head(model)(h).log_softmax(-1) for h in (found_BD[row], wanted_D))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SHAPE, sliding_window=32), "window of 32 tokens"),
        (Gemma2Config(**SHAPE, sliding_window=256), "window of 256 tokens"),
    ],
)
def test_windows_and_soft_caps_are_refused_with_a_reason(config: Any, reason: str) -> None:
    found = why_no_prefix(build(config))
    assert found is not None and reason in found


@pytest.mark.parametrize("window", [32, 64, 80])
def test_a_window_in_every_layer_is_refused_too(window: int) -> None:
    """Mistral lists no layer types; 80 holds the prefix but not what comes after it."""
    model = build(MistralConfig(**SHAPE, sliding_window=window))
    assert why_no_prefix(model) is not None


def test_the_attention_of_the_model_is_put_back(llama: Any) -> None:
    usual = llama.config._attn_implementation
    prefix = read_prefix(llama, random_ids(PREFIX, 77))
    forward_after_prefix(llama, [prefix], torch.tensor([random_ids(4, 1)]))
    assert llama.config._attn_implementation == usual
    with pytest.raises(IndexError):
        forward_after_prefix(llama, [prefix], torch.tensor([[10**6]]))
    assert llama.config._attn_implementation == usual


def test_the_prefix_knows_its_size(llama: Any) -> None:
    """Two layers of two key heads, eight wide, four bytes: keys and values of each token."""
    prefix = read_prefix(llama, random_ids(PREFIX, 77))
    assert prefix.tokens == PREFIX
    assert prefix.bytes == 2 * 2 * 2 * 8 * 4 * PREFIX == token_bytes(llama) * PREFIX
    assert {tuple(side.shape) for side in prefix.keys + prefix.values} == {(2, PREFIX, 8)}


LONG = 16 * 1024
"""Tokens of a context that no batch may multiply."""


@pytest.fixture(scope="module")
def long_prefix() -> tuple[Any, SharedPrefix, int]:
    """A model, a long prefix that it has read, and the most bytes that reading took at a time."""
    model = build(LlamaConfig(**{**SHAPE, "max_position_embeddings": 2 * LONG}), seed=5)
    read: list[SharedPrefix] = []
    peak = peak_bytes(lambda: read.append(read_prefix(model, random_ids(LONG, 3))))
    return model, read[0], peak


def test_reading_a_long_prefix_has_no_scores_of_all_with_all(
    long_prefix: tuple[Any, SharedPrefix, int],
) -> None:
    """Even one byte for each pair of its tokens would be 256 MiB, for a piece and all 16 MiB."""
    _, prefix, peak = long_prefix
    assert prefix.tokens == LONG and prefix.bytes == 4 * 2**20
    assert peak < prefix.bytes + 8 * 2**20


@torch.no_grad()
def test_memory_grows_by_the_rows_own_tokens_alone(
    long_prefix: tuple[Any, SharedPrefix, int],
) -> None:
    """Scoring 32 rows in place of 4 behind 16k tokens: not one row makes a copy, or a mask."""
    model, prefix, _ = long_prefix
    ids_BS = torch.tensor([random_ids(64, row) for row in range(32)])

    def peak(behind: SharedPrefix, rows: int) -> int:
        return peak_bytes(lambda: forward_after_prefix(model, [behind] * rows, ids_BS[:rows]))

    assert peak(prefix, 32) < 2 * prefix.bytes, "32 copies would be 128 MiB"
    short = peak(read_prefix(model, random_ids(64, 3)), 32)
    assert peak(prefix, 32) - short < prefix.bytes / 64, "a long prefix takes what a short one does"
