"""`opcd.products`: the plain formulas, and their gradients, whatever library multiplies."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional

from opcd.products import (
    adapted_product,
    can_pack,
    frozen_product,
    gated_product,
    pack,
    packed_product,
    product,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bias", [None, numbers(24)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_that_of_a_linear_layer(dtype: torch.dtype, bias: Tensor | None) -> None:
    """Also behind a transposed weight, as gradients meet it."""
    x, weight = numbers(2, 5, 16, dtype=dtype), numbers(24, 16, dtype=dtype)
    bias = None if bias is None else bias.to(dtype)
    wanted = functional.linear(x, weight, bias)
    torch.testing.assert_close(product(x, weight, bias), wanted)
    turned = numbers(16, 24, dtype=dtype).t()
    torch.testing.assert_close(product(x, turned), functional.linear(x, turned))


@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_serves_any_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    weight, bias = numbers(48, 32, dtype=dtype), numbers(48, dtype=dtype)
    if not can_pack(weight):
        pytest.skip("this build of torch has no oneDNN")
    x = numbers(rows, 2, 32, dtype=dtype)
    found = packed_product(x, pack(weight, 16), bias)
    torch.testing.assert_close(found, functional.linear(x, weight, bias))
    assert found.shape == (rows, 2, 48)


def test_only_a_cpus_floats_are_packed() -> None:
    assert not can_pack(numbers(4, 4))
    assert not can_pack(torch.empty(4, 4, device="meta"))


def test_gradients_of_the_adapter_and_of_what_comes_in() -> None:
    """By finite differences, in float64; the frozen weight has none."""
    weight, bias = numbers(6, 5), numbers(6)
    parts = [numbers(2, 3, 5), numbers(2, 5, seed=1), numbers(6, 2, seed=2)]
    x, down, up = (part.requires_grad_() for part in parts)

    def run(x: Any, down: Any, up: Any) -> Any:
        return adapted_product(x, weight, bias, (down, up, 0.7))

    assert gradcheck(run, (x, down, up))
    wanted = functional.linear(x, weight, bias) + 0.7 * x @ down.t() @ up.t()
    torch.testing.assert_close(run(x, down, up), wanted)


def test_what_comes_out_may_be_written_into() -> None:
    """As OLMo does, which clamps its queries where they stand."""
    x, down, up = numbers(2, 3, 5), numbers(2, 5).requires_grad_(), numbers(6, 2).requires_grad_()
    adapted_product(x, numbers(6, 5), None, (down, up, 1.0)).clamp_(-1.0, 1.0).sum().backward()
    found, down.grad = down.grad, None
    wanted = functional.linear(x, numbers(6, 5)) + x @ down.t() @ up.t()
    wanted.clamp(-1.0, 1.0).sum().backward()
    torch.testing.assert_close(found, down.grad)


def test_what_needs_no_gradient_gets_none() -> None:
    """The first layer's input: its product with the weight would be for nothing."""
    x, down, up = numbers(3, 5), numbers(2, 5).requires_grad_(), numbers(6, 2).requires_grad_()
    adapted_product(x, numbers(6, 5), None, (down, up, 1.0)).sum().backward()
    assert x.grad is None
    assert down.grad is not None
    assert up.grad is not None


def test_an_adapter_in_float32_on_weights_in_bfloat16() -> None:
    """Gradients arrive in the adapter's own dtype; the sum is rounded to bfloat16 once more."""
    x, weight = (numbers(4, 16, dtype=torch.bfloat16), numbers(8, 16, dtype=torch.bfloat16))
    down, up = (numbers(*s, dtype=torch.float32).requires_grad_() for s in ((2, 16), (8, 2)))
    found = adapted_product(x.requires_grad_(), weight, None, (down, up, 2.0))
    assert found.dtype == torch.bfloat16
    exact = x.float() @ weight.float().t() + 2.0 * x.float() @ down.t() @ up.t()
    torch.testing.assert_close(found.float(), exact, rtol=3e-2, atol=0.3)
    found.sum().backward()
    for tensor, dtype in ((x, torch.bfloat16), (down, torch.float32), (up, torch.float32)):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype


def test_a_frozen_product_has_the_gradient_of_a_linear_layer() -> None:
    weight, bias = numbers(6, 5), numbers(6)
    x = numbers(3, 5).requires_grad_()
    assert gradcheck(lambda x: frozen_product(x, weight, bias), (x,))


def test_gradients_may_meet_the_weight_in_another_dtype() -> None:
    """As a head's in float32, whose weight is stored in bfloat16; none is lost on the way."""
    stored = numbers(40, 8, dtype=torch.bfloat16)
    x, gradient = numbers(3, 8, dtype=torch.float32).requires_grad_(), numbers(3, 40).float()
    (found,) = torch.autograd.grad(frozen_product(x, stored.float(), None, stored), x, gradient)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gradient @ stored.float(), rtol=2e-2, atol=1e-1)


def test_what_a_gate_lets_through_is_computed_again() -> None:
    """The same value and gradients as without the shortcut, by finite differences too."""
    weight, bias = numbers(4, 6), numbers(4)
    parts = [numbers(3, 6), numbers(3, 6, seed=1), numbers(2, 6, seed=2), numbers(4, 2, seed=3)]
    gate, value, down, up = (part.requires_grad_() for part in parts)

    def run(gate: Any, value: Any, down: Any, up: Any) -> Any:
        return gated_product(gate, value, weight, bias, (down, up, 0.7))

    assert gradcheck(run, (gate, value, down, up))
    opened = functional.silu(gate) * value
    torch.testing.assert_close(
        run(gate, value, down, up), adapted_product(opened, weight, bias, (down, up, 0.7))
    )
