"""`opcd.rollouts.packing`: a model whose packed layers answer like its plain ones."""

from typing import Any

import pytest
import torch
from torch import nn

from opcd.products import HAS_ONEDNN
from opcd.rollouts.packing import PackedLinear, load_weights, pack_linears
from tiny import logits
from worlds import tiny_llama

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")


def packed_model(seed: int, kept: set[int] | None = None) -> tuple[Any, dict[str, PackedLinear]]:
    model = tiny_llama(seed=seed).requires_grad_(False)
    return model, pack_linears(model, kept or set())


def test_a_packed_model_answers_with_the_weights_it_was_given() -> None:
    """Not with those it was made with; and given others, with those."""
    model, packed = packed_model(seed=1)
    assert not any(type(layer) is nn.Linear for layer in model.modules())
    for seed in (2, 3):
        source = tiny_llama(seed=seed)
        load_weights(model, packed, source.named_parameters())
        torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-4)


def test_weights_of_others_stay_plain() -> None:
    """What the student has too is neither packed nor written to."""
    source = tiny_llama(seed=1).requires_grad_(False)
    shared = source.model.layers[0].mlp.up_proj
    model = tiny_llama(seed=2).requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight = shared.weight
    before = shared.weight.clone()
    packed = pack_linears(model, {shared.weight.data_ptr()})
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert "model.layers.0.mlp.up_proj.weight" not in packed
    load_weights(model, packed, source.named_parameters())
    assert torch.equal(shared.weight, before)
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-4)


def test_a_dtype_that_cannot_be_packed_stays_plain() -> None:
    model = tiny_llama(seed=1).to(torch.float64)
    assert pack_linears(model, set()) == {}
