"""Linear layers of the copy that answers, with weights in the order in which a CPU reads them.

Writing a token, a few rows meet all weights: what counts is how fast those can be read. A weight
that is packed exists once, in that order; a GPU's, or one that the student shares, stays as it is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from opcd.products import can_pack, pack, packed_product

USUAL_ROWS = 16
"""Rows to pack for; other counts are as fast, but for a single one."""


class PackedLinear(nn.Module):
    """A linear layer whose weight is given anew when it has moved."""

    def __init__(self, plain: nn.Linear) -> None:
        """Take the place of a layer; its bias stays a parameter, its weight is none any more."""
        super().__init__()
        self.bias = plain.bias
        self._dtype = plain.weight.dtype
        self._packed: Tensor | None = None

    def load(self, weight_OI: Tensor | None) -> None:
        """Compute with this weight from now on; `None` lets go of the one that was."""
        if weight_OI is not None:
            weight_OI = pack(weight_OI.to(self._dtype).contiguous(), USUAL_ROWS)
        self._packed = weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """`x W' + b`."""
        assert self._packed is not None, "a packed layer is given its weight before it answers"
        return packed_product(x, self._packed, self.bias)


def pack_linears(model: Any, kept: set[int]) -> dict[str, PackedLinear]:
    """Put packed layers in place of a model's linear ones; they have no weights yet.

    Args:
        model: answers, and is never trained.
        kept: addresses of weights that are somebody else's too.

    Returns:
        The layers by the names that their weights had.
    """
    found: dict[str, PackedLinear] = {}
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer.weight.data_ptr() in kept:
            continue
        if not can_pack(layer.weight):
            continue
        owner, _, leaf = name.rpartition(".")
        found[f"{name}.weight"] = PackedLinear(layer)
        setattr(model.get_submodule(owner), leaf, found[f"{name}.weight"])
    return found


@torch.no_grad()
def load_weights(model: Any, packed: dict[str, PackedLinear], weights: Any) -> None:
    """Give a model the weights that have moved.

    Args:
        model: the one that answers.
        packed: its packed layers.
        weights: names with values; those that the model shares are left alone.
    """
    own = dict(model.named_parameters())
    for name, weight in weights:
        if name in packed:
            packed[name].load(weight)
        elif own[name].data_ptr() != weight.data_ptr():
            own[name].copy_(weight)
