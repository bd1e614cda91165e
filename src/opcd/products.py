"""Products with weights, and what a low-rank adapter adds to them, with few passes over memory.

    y = x W' + b + s (x A') B'

PEFT computes the sum in four steps, each of which writes a tensor as large as `y`, and takes four
back; here the adapter's part is added to the product where it stands. On a CPU float32 products
go through oneDNN, since the BLAS behind `torch.nn.functional.linear` is slower on many of them;
weights that do not move for a while can be packed into the order in which it reads them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

Adapter = tuple[Tensor, Tensor, float]
"""`A`, `B` and `s` of a low-rank adapter."""
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PACKED = (torch.float32, torch.bfloat16)
"""Dtypes that oneDNN packs here."""


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x W' + b` where no gradient is asked for."""
    if HAS_ONEDNN and x_TI.device.type == "cpu" and x_TI.dtype == torch.float32:
        return _onednn(x_TI, weight_OI, bias_O)
    return functional.linear(x_TI, weight_OI, bias_O)


def frozen_product(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, way_back_OI: Tensor | None = None
) -> Tensor:
    """`x W' + b`, with a gradient for `x` alone.

    Args:
        x_TI: activations.
        weight_OI: the frozen weight.
        bias_O: the frozen bias.
        way_back_OI: the weight as gradients meet it; another dtype's is faster, if it is as exact.
    """
    return _Frozen.apply(x_TI, weight_OI, bias_O, weight_OI if way_back_OI is None else way_back_OI)


def can_pack(weight_OI: Tensor) -> bool:
    """Whether `pack` takes this weight: a plain one, on a CPU, in a dtype that it multiplies in."""
    is_plain = type(weight_OI) in (Tensor, Parameter) and weight_OI.device.type == "cpu"
    if not (HAS_ONEDNN and is_plain and weight_OI.dtype in PACKED):
        return False
    return weight_OI.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight_OI: Tensor, rows: int) -> Tensor:
    """The weight in oneDNN's own order, for products with about so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)


def packed_product(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x W' + b` for a weight that was packed; leading dimensions stay."""
    return _onednn(x_TI, packed, bias_O)


def adapted_product(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    adapter: Adapter,
) -> Tensor:
    """`x W' + b + s (x A') B'`, with gradients for `x`, `A` and `B`; `W` and `b` are frozen.

    Args:
        x: activations, features last.
        weight_OI: the frozen weight.
        bias_O: the frozen bias.
        adapter: `A`, `B` and `s`.
    """
    # Reshaped out here: no caller may write into a view that a function of ours returned.
    y_TO = _Adapted.apply(x.reshape(-1, x.shape[-1]), weight_OI, bias_O, *adapter)
    return y_TO.view(*x.shape[:-1], -1)


def gated_product(
    gate: Tensor,
    value: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    adapter: Adapter,
) -> Tensor:
    """`adapted_product` of `silu(gate) * value`, which is not kept but computed again.

    Args:
        gate: activations that open or close the others.
        value: the others, in the same shape and in the weight's dtype, as the gate is.
        weight_OI: the frozen weight.
        bias_O: the frozen bias.
        adapter: `A`, `B` and `s`.
    """
    sides = (side.reshape(-1, side.shape[-1]) for side in (gate, value))
    y_TO = _Gated.apply(*sides, weight_OI, bias_O, *adapter)
    return y_TO.view(*gate.shape[:-1], -1)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, way_back_OI: Tensor
    ) -> Tensor:
        ctx.save_for_backward(way_back_OI)
        ctx.dtype = x_TI.dtype
        return product(x_TI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (weight_OI,) = ctx.saved_tensors
        grad_TI = product(gradients[0].to(weight_OI.dtype), weight_OI.t())
        return grad_TI.to(ctx.dtype), None, None, None


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_OR: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.scale, ctx.dtype = scale, x_TI.dtype
        x_TI = x_TI.to(weight_OI.dtype)
        y_TO, inner_TR = _multiply(x_TI, weight_OI, bias_O, (down_RI, up_OR, scale))
        ctx.save_for_backward(x_TI, inner_TR, weight_OI, down_RI, up_OR)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        x_TI, inner_TR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        adapter = down_RI, up_OR, ctx.scale
        grad_TO = gradients[0].to(weight_OI.dtype)
        back_TR, *of_adapter = _adapter_gradients(grad_TO, x_TI, inner_TR, adapter)
        grad_TI = None
        if ctx.needs_input_grad[0]:
            grad_TI = _way_back(grad_TO, back_TR, weight_OI, down_RI).to(ctx.dtype)
        return grad_TI, None, None, *of_adapter, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, value_TI: Tensor, *layer: Any) -> Tensor:
        weight_OI, bias_O, down_RI, up_OR, scale = layer
        x_TI = functional.silu(gate_TI).mul_(value_TI)
        y_TO, inner_TR = _multiply(x_TI, weight_OI, bias_O, (down_RI, up_OR, scale))
        ctx.save_for_backward(gate_TI, value_TI, inner_TR, weight_OI, down_RI, up_OR)
        ctx.scale = scale
        return y_TO

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        gate_TI, value_TI, inner_TR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        opened_TI = functional.silu(gate_TI)
        adapter = down_RI, up_OR, ctx.scale
        grad_TO = gradients[0].to(weight_OI.dtype)
        told = grad_TO, opened_TI * value_TI, inner_TR, adapter
        back_TR, *of_adapter = _adapter_gradients(*told)
        grad_TI = _way_back(grad_TO, back_TR, weight_OI, down_RI)
        grad_value_TI = opened_TI.mul_(grad_TI)
        grad_gate_TI = torch.ops.aten.silu_backward(grad_TI.mul_(value_TI), gate_TI)
        return grad_gate_TI, grad_value_TI, None, None, *of_adapter, None


def _multiply(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, adapter: Adapter
) -> tuple[Tensor, Tensor]:
    """The product with the adapter's part, and what came between `A` and `B`."""
    down_RI, up_OR, scale = adapter
    inner_TR = functional.linear(x_TI, down_RI.to(x_TI.dtype))
    y_TO = product(x_TI, weight_OI, bias_O)
    return y_TO.addmm_(inner_TR, up_OR.to(x_TI.dtype).t(), alpha=scale), inner_TR


def _adapter_gradients(
    grad_TO: Tensor, x_TI: Tensor, inner_TR: Tensor, adapter: Adapter
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient between `A` and `B`, and those of both."""
    down_RI, up_OR, scale = adapter
    back_TR = (grad_TO @ up_OR.to(grad_TO.dtype)).mul_(scale)
    grad_up_OR = torch.mm(inner_TR.t(), grad_TO).t().mul(scale).to(up_OR.dtype)
    return back_TR, torch.mm(back_TR.t(), x_TI).to(down_RI.dtype), grad_up_OR


def _way_back(grad_TO: Tensor, back_TR: Tensor, weight_OI: Tensor, down_RI: Tensor) -> Tensor:
    return product(grad_TO, weight_OI.t()).addmm_(back_TR, down_RI.to(grad_TO.dtype))


def _onednn(x: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")
