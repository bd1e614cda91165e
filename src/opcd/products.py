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
    """Whether `pack` takes this weight: a plain one, on a CPU, in one of two dtypes."""
    is_plain = type(weight_OI) in (Tensor, Parameter) and weight_OI.device.type == "cpu"
    return HAS_ONEDNN and is_plain and weight_OI.dtype in PACKED


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
    adapter: tuple[Tensor, Tensor, float],
) -> Tensor:
    """`x W' + b + s (x A') B'`, with gradients for `x`, `A` and `B`; `W` and `b` are frozen.

    Args:
        x: activations, features last.
        weight_OI: the frozen weight.
        bias_O: the frozen bias.
        adapter: `A`, `B` and `s`.
    """
    return _Adapted.apply(x, weight_OI, bias_O, *adapter)


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
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_OR: Tensor,
        scale: float,
    ) -> Tensor:
        dtype = weight_OI.dtype
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        inner_TR = functional.linear(x_TI, down_RI.to(dtype))
        y_TO = product(x_TI, weight_OI, bias_O)
        y_TO.addmm_(inner_TR, up_OR.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x_TI, inner_TR, weight_OI, down_RI, up_OR)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        x_TI, inner_TR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        dtype = weight_OI.dtype
        grad_TO = gradients[0].reshape(-1, weight_OI.shape[0]).to(dtype)
        back_TR = (grad_TO @ up_OR.to(dtype)).mul_(ctx.scale)
        grad_up_OR = torch.mm(inner_TR.t(), grad_TO).t().mul(ctx.scale).to(up_OR.dtype)
        grad_down_RI = torch.mm(back_TR.t(), x_TI).to(down_RI.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_TI = product(grad_TO, weight_OI.t())
            grad_TI.addmm_(back_TR, down_RI.to(dtype))
            grad_x = grad_TI.view(ctx.shape).to(ctx.dtype)
        return grad_x, None, None, grad_down_RI, grad_up_OR, None


def _onednn(x: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")
