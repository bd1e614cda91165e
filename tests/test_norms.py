"""`opcd.norms`: transformers' norms, in closed form."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from opcd.norms import norm, speed_up_norms

WIDTH, EPSILON = 24, 1e-3


def weight_and_input(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight and rows of very different sizes, one of them 0."""
    generator = torch.Generator().manual_seed(0)
    sizes_T1 = torch.tensor([1e-3, 1.0, 50.0, 0.0]).unsqueeze(-1)
    x_TD = torch.randn(4, WIDTH, generator=generator) * sizes_T1
    return torch.rand(WIDTH, generator=generator).to(dtype), x_TD.to(dtype)


def layer_of(weight_D: Tensor) -> LlamaRMSNorm:
    """A norm as transformers computes it."""
    layer = LlamaRMSNorm(WIDTH, EPSILON)
    layer.weight = nn.Parameter(weight_D, requires_grad=False)
    return layer


def test_value_and_gradient_are_those_of_the_formula() -> None:
    weight_D, x_TD = weight_and_input(torch.float64)
    torch.autograd.gradcheck(lambda x: norm(x, weight_D, EPSILON), x_TD.requires_grad_())
    torch.testing.assert_close(
        norm(x_TD, weight_D, EPSILON),
        weight_D * x_TD / (x_TD.square().mean(-1, keepdim=True) + EPSILON).sqrt(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_where_transformers_rounds(dtype: torch.dtype) -> None:
    """The same bits forward; the gradient within a rounding, from an input that stays as it is."""
    weight_D, x_TD = weight_and_input(dtype)
    sides = [x_TD.clone().requires_grad_() for _ in range(2)]
    ours, theirs = norm(sides[0], weight_D, EPSILON), layer_of(weight_D)(sides[1])
    assert torch.equal(ours, theirs) and torch.equal(sides[0], x_TD)
    grad_TD = torch.linspace(-1.0, 1.0, x_TD.numel()).view_as(x_TD).to(dtype)
    ours.backward(grad_TD)
    theirs.backward(grad_TD)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(sides[0].grad, sides[1].grad, rtol=tolerance, atol=tolerance)


class Doubled(LlamaRMSNorm):
    """Has the parts of a norm and computes something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Twice the norm."""
        return 2 * super().forward(hidden_states)


class Gated(LlamaRMSNorm):
    """Is a norm as long as nothing opens or closes it, as those of Mamba-like layers."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """The norm, times a gate."""
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


def test_norms_of_other_shapes_are_left_alone() -> None:
    """One with a gate is given two things; one for each head has a weight of two dimensions."""
    gated, heads = Gated(WIDTH, EPSILON), LlamaRMSNorm(WIDTH, EPSILON)
    heads.weight = nn.Parameter(torch.rand(2, WIDTH), requires_grad=False)
    speed_up_norms(nn.ModuleList([gated, heads]))
    x_TD = torch.randn(3, WIDTH)
    torch.testing.assert_close(gated(x_TD, 2.0 + x_TD), gated(x_TD) * (2.0 + x_TD))
    assert heads(torch.randn(3, 2, WIDTH)).shape == (3, 2, WIDTH)


def test_only_norms_that_compute_this_are_replaced() -> None:
    weight_D, x_TD = weight_and_input(torch.float32)
    doubled = Doubled(WIDTH, EPSILON)
    model: Any = nn.ModuleList([layer_of(weight_D), doubled])
    before = [layer(x_TD) for layer in model]
    speed_up_norms(model)
    assert ["forward" in layer.__dict__ for layer in model] == [True, False]
    for layer, wanted in zip(model, before, strict=True):
        assert torch.equal(layer(x_TD), wanted)


def test_a_norm_in_training_gets_its_gradient() -> None:
    """Full fine-tuning trains the weight, which the closed form gives no gradient."""
    weight_D, x_TD = weight_and_input(torch.float32)
    layer = layer_of(weight_D)
    speed_up_norms(nn.ModuleList([layer]))
    layer.weight.requires_grad_(True)
    layer(x_TD).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()
