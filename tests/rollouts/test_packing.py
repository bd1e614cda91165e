"""`opcd.rollouts.packing`: a model whose packed layers answer like its plain ones."""

from typing import Any

import pytest
import torch
from torch import nn

from opcd.products import HAS_ONEDNN
from opcd.rollouts.packing import PackedLinear, load_weights, multiply, pack_linears
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


class Router(nn.Module):
    """Looks at its layer's weight, as some mixtures of experts do."""

    def __init__(self) -> None:
        """Two layers, one of which is only called."""
        super().__init__()
        self.gate, self.out = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In the precision that the weight has."""
        return self.out(self.gate(x.to(self.gate.weight.dtype)))


def test_a_weight_that_is_looked_at_stays_where_it_is() -> None:
    router = Router().requires_grad_(False)
    assert pack_linears(router, set()).keys() == {"out.weight"}


@torch.no_grad()
def test_neighbours_are_multiplied_at_once_only_with_the_same_input() -> None:
    """Another input, or the same tensor written to since, has its own products."""
    source = tiny_llama(seed=1)
    model, packed = packed_model(seed=2)
    load_weights(model, packed, source.named_parameters())
    ours, theirs = model.model.layers[0].mlp, source.model.layers[0].mlp
    x_TD, other_TD = torch.randn(2, 3, theirs.up_proj.in_features).unbind()
    for inputs in ((x_TD, x_TD), (x_TD, other_TD), (other_TD, x_TD), (x_TD, x_TD)):
        torch.testing.assert_close(ours.gate_proj(inputs[0]), theirs.gate_proj(inputs[0]))
        torch.testing.assert_close(ours.up_proj(inputs[1]), theirs.up_proj(inputs[1]))
        joint = multiply([ours.gate_proj, ours.up_proj], inputs[0])
        alone = torch.cat([theirs.gate_proj(inputs[0]), theirs.up_proj(inputs[0])], dim=-1)
        torch.testing.assert_close(joint, alone)
    moving_TD = x_TD.clone()
    ours.gate_proj(moving_TD)
    moving_TD.mul_(2)
    torch.testing.assert_close(ours.up_proj(moving_TD), theirs.up_proj(moving_TD))


@torch.no_grad()
@pytest.mark.parametrize("shared", ["q_proj", "k_proj", "v_proj"])
def test_a_neighbour_that_is_shared_stays_plain(shared: str) -> None:
    """The others are packed with each other, and side by side they stand in the order asked for."""
    source = tiny_llama(seed=1).requires_grad_(False)
    model = tiny_llama(seed=2).requires_grad_(False)
    kept = getattr(source.model.layers[0].self_attn, shared).weight
    getattr(model.model.layers[0].self_attn, shared).weight = kept
    packed = pack_linears(model, {kept.data_ptr()})
    load_weights(model, packed, source.named_parameters())
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-4)
    x_TD = torch.randn(2, source.config.hidden_size)
    ours, theirs = (one.model.layers[0].self_attn for one in (model, source))
    joint = multiply([ours.q_proj, ours.k_proj, ours.v_proj], x_TD)
    alone = [theirs.q_proj(x_TD), theirs.k_proj(x_TD), theirs.v_proj(x_TD)]
    torch.testing.assert_close(joint, torch.cat(alone, dim=-1))


def test_no_weights_are_held_when_let_go() -> None:
    """Neither packed nor on the way."""
    model, packed = packed_model(seed=2)
    load_weights(model, packed, tiny_llama(seed=1).named_parameters())
    for layer in packed.values():
        layer.load(None)
    with pytest.raises(AssertionError, match="given its weight"):
        logits(model)


def test_a_dtype_that_cannot_be_packed_stays_plain() -> None:
    model = tiny_llama(seed=1).to(torch.float64)
    assert pack_linears(model, set()) == {}
