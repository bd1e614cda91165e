"""Linear layers of the copy that answers, with weights in the order in which a CPU reads them.

Writing a token, a few rows meet all weights: what counts is how fast those can be read, and how
often a product has to be begun. A weight that is packed exists once, in that order; neighbours
that are given the same input are packed as one weight and multiplied at once. A GPU's weight, or
one that the student shares, stays as it is.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from inspect import getsource
from typing import Any

import torch
from torch import Tensor, nn

from opcd.products import can_pack, pack, packed_product

USUAL_ROWS = 16
"""Rows to pack for; other counts are as fast, but for a single one."""
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Neighbours that are usually given the same input. Where they are not, each is computed apart:
the names decide how fast it is, never what comes out."""


class _Stack:
    """Weights of neighbours, one below the other, and their product with the last input."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._widths = [layer.out_features for layer in layers]
        self._inputs, self._dtype = layers[0].in_features, layers[0].weight.dtype
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers)), "either all of them have a bias, or none has"
        self._bias_O = torch.cat(biases).detach() if biases else None
        self._packed: Tensor | None = None
        self._coming_OI: Tensor | None = None
        """A new weight of which parts are still missing."""
        self._missing: set[int] = set()
        self._product: tuple[Tensor, int, Sequence[Tensor]] | None = None
        """An input, how often it had been written to, and what each layer makes of it."""
        self._asked = 0

    def biases(self) -> Sequence[Tensor | None]:
        """Of each layer: a part of what is added."""
        if self._bias_O is None:
            return [None] * len(self._widths)
        return self._bias_O.split(self._widths)

    def load(self, place: int, weight_OI: Tensor | None) -> None:
        """Take one layer's weight; the last of them to come puts all of them to use."""
        if weight_OI is None or self._coming_OI is None:
            # The old weights go before the new ones come, so that there are never both.
            self._packed = self._coming_OI = self._product = None
            if weight_OI is None:
                return
            self._coming_OI = torch.empty(sum(self._widths), self._inputs, dtype=self._dtype)
            self._missing = set(range(len(self._widths)))
        self._coming_OI.split(self._widths)[place].copy_(weight_OI)
        self._missing.discard(place)
        if not self._missing:
            self._packed, self._coming_OI = pack(self._coming_OI, USUAL_ROWS), None

    def holds(self, layers: Sequence[Any]) -> bool:
        """Whether these layers are its own, all of them, in their order."""
        own = [layer._place for layer in layers if getattr(layer, "_stack", None) is self]
        return own == list(range(len(self._widths))) and len(own) == len(layers)

    def multiply_all(self, x: Tensor) -> Tensor:
        """`x W' + b` of all layers side by side."""
        assert self._packed is not None, "a packed layer is given its weight before it answers"
        return packed_product(x, self._packed, self._bias_O)

    def multiply(self, place: int, x: Tensor) -> Tensor:
        """`x W' + b` of one layer. Those of its neighbours are kept until they are asked for."""
        if len(self._widths) == 1:
            return self.multiply_all(x)
        known = self._product
        if known is None or known[0] is not x or known[1] != x._version:
            products = self.multiply_all(x).split(self._widths, dim=-1)
            known, self._asked = (x, x._version, products), 0
        self._asked += 1
        self._product = known if self._asked < len(self._widths) else None
        return known[2][place]


class PackedLinear(nn.Module):
    """A linear layer whose weight is given anew when it has moved."""

    def __init__(self, stack: _Stack, place: int, bias_O: Tensor | None) -> None:
        """Take the place of a layer; its bias stays a parameter, its weight is none any more."""
        super().__init__()
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self._stack, self._place = stack, place

    def load(self, weight_OI: Tensor | None) -> None:
        """Compute with this weight from now on; `None` lets go of the one that was.

        Neighbours that are packed with it are given theirs too, before any of them answers.
        """
        self._stack.load(self._place, weight_OI)

    def forward(self, x: Tensor) -> Tensor:
        """`x W' + b`."""
        return self._stack.multiply(self._place, x)


def multiply(layers: Sequence[Any], x: Tensor) -> Tensor:
    """What layers make of one input, side by side; of whatever kind they are."""
    stack = getattr(layers[0], "_stack", None)
    if stack and stack.holds(layers):
        return stack.multiply_all(x)
    return torch.cat([layer(x) for layer in layers], dim=-1)


def pack_linears(model: Any, kept: set[int]) -> dict[str, PackedLinear]:
    """Put packed layers in place of a model's linear ones; they have no weights yet.

    Args:
        model: answers, and is never trained.
        kept: addresses of weights that are somebody else's too.

    Returns:
        The layers by the names that their weights had.
    """
    found: dict[str, PackedLinear] = {}
    for name, owner in list(model.named_modules()):
        own = {
            leaf: layer
            for leaf, layer in owner.named_children()
            if _can_move(layer, kept) and f".{leaf}.weight" not in _source(type(owner))
        }
        for leaves in _neighbours(own):
            stack = _Stack([own[leaf] for leaf in leaves])
            for place, bias_O in enumerate(stack.biases()):
                packed = PackedLinear(stack, place, bias_O)
                setattr(owner, leaves[place], packed)
                found[f"{name}.{leaves[place]}.weight".removeprefix(".")] = packed
    return found


def _can_move(layer: nn.Module, kept: set[int]) -> bool:
    """Whether a layer's weight can be packed, and is nobody else's."""
    if type(layer) is not nn.Linear or layer.weight.data_ptr() in kept:
        return False
    return can_pack(layer.weight)


@cache
def _source(kind: type) -> str:
    """What a module's class says: some look at a layer's weight beside calling the layer."""
    try:
        return getsource(kind)
    except (OSError, TypeError):  # made without a file
        return ""


def _neighbours(layers: dict[str, Any]) -> Iterator[list[str]]:
    """Names of one module's layers, those together that are packed as one."""
    alone = dict(layers)
    for names in TOGETHER:
        group = [name for name in names if name in layers]
        kinds = {
            (layers[n].in_features, layers[n].bias is None, layers[n].weight.dtype) for n in group
        }
        if len(kinds) == 1:
            yield group
            for name in group:
                del alone[name]
    yield from ([name] for name in alone)


@torch.no_grad()
def load_weights(model: Any, packed: dict[str, PackedLinear], weights: Any) -> None:
    """Give a model the weights that have moved.

    Args:
        model: the one that answers.
        packed: its packed layers.
        weights: names with values, those of all packed layers among them; those that the model
            shares are left alone.
    """
    own = dict(model.named_parameters())
    for name, weight in weights:
        if name in packed:
            packed[name].load(weight)
        elif own[name].data_ptr() != weight.data_ptr():
            own[name].copy_(weight)
