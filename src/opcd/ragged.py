"""Rows of different lengths, one after the other in one sequence: products see no padding.

    [ opening | row 0 | row 1 | ... | fill ]

What all rows open with stands at the head, is computed once, and gets its gradient from all of
them. Only attention puts the rows side by side again. It keeps queries, keys and values alone: the
scores are computed anew in the backward pass, in float32 at least.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

FILL_STEP = 32
"""Sequences differ in length by this much, since a CPU keeps a compiled product for every shape."""


@dataclass(frozen=True)
class Layout:
    """Where rows stand in the one sequence, and side by side."""

    lengths: tuple[int, ...]
    """Of the rows, without the opening."""
    opening: int
    """Tokens that all rows stand behind."""
    device: torch.device

    @property
    def used(self) -> int:
        """Tokens without the fill."""
        return self.opening + sum(self.lengths)

    @property
    def tokens(self) -> int:
        """The length of the sequence; some fill is always there."""
        return (self.used // FILL_STEP + 1) * FILL_STEP

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each row begins."""
        return tuple(accumulate(self.lengths[:-1], initial=self.opening))

    @cached_property
    def place_BS(self) -> Tensor:
        """Where tokens stand in the sequence, put side by side.

        The opening is a row of its own, before the others. Padding stands in the fill.
        """
        starts, lengths = self.starts, self.lengths
        if self.opening:
            starts, lengths = (0, *starts), (self.opening, *lengths)
        column_S = torch.arange(max(lengths), device=self.device)
        start_B1, length_B1 = (
            torch.tensor(side, device=self.device).unsqueeze(-1) for side in (starts, lengths)
        )
        return torch.where(column_S < length_B1, start_B1 + column_S, self.used)

    @cached_property
    def side_N(self) -> Tensor:
        """Where each token of the sequence, up to the fill, stands among the `B S` places."""
        return (self.place_BS.flatten() < self.used).nonzero().squeeze(-1)

    @cached_property
    def mask_BSK(self) -> Tensor:
        """What is added to the scores of the opening's tokens and of a row's own."""
        rows, length = self.place_BS.shape
        column_K = torch.arange(-self.opening, length, device=self.device)
        later_SK = column_K > torch.arange(length, device=self.device).unsqueeze(-1)
        blocked_BSK = later_SK.repeat(rows, 1, 1)
        if self.opening:
            blocked_BSK[0, :, : self.opening] = True
        return torch.zeros(blocked_BSK.shape, device=self.device).masked_fill(
            blocked_BSK, -torch.inf
        )

    def places(self, row_N: Tensor, column_N: Tensor) -> Tensor:
        """Where rows' tokens stand in the sequence, `_N`; columns are those behind the opening."""
        return torch.tensor(self.starts, device=self.device)[row_N] + column_N

    def join(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of whole rows as the one sequence, `_1T`."""
        ids = [*rows[0][: self.opening], *(t for row in rows for t in row[self.opening :])]
        return torch.tensor([ids + [0] * (self.tokens - self.used)], device=self.device)

    def positions(self, before: Sequence[int] = ()) -> Tensor:
        """Position of each token, `_1T`.

        Args:
            before: how many tokens each row has in front of all that stands here.
        """
        found: list[int] = list(range(self.opening))
        for length, first in zip(self.lengths, before or [0] * len(self.lengths), strict=True):
            found += range(first + self.opening, first + self.opening + length)
        return torch.tensor([found + [0] * (self.tokens - self.used)], device=self.device)


def attend(
    query_THd: Tensor, key_Thd: Tensor, value_Thd: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Causal attention of each row to the opening and to itself.

    Args:
        query_THd: scaled queries of `H` heads.
        key_Thd: keys of `h` heads, each shared by `H / h` queries.
        value_Thd: their values.
        layout: where rows stand.

    Returns:
        `out_THd`, 0 in the fill, and the log-sum-exp of the scores, `_TH`, which has no gradient.
    """
    # Autocast would turn every product's sides to bfloat16 again.
    with torch.autocast(query_THd.device.type, enabled=False):
        return _Attention.apply(query_THd, key_Thd, value_Thd, layout)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_THd: Tensor, key_Thd: Tensor, value_Thd: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(query_THd, key_Thd, value_Thd)
        ctx.layout = layout
        heads, key_heads = query_THd.shape[1], key_Thd.shape[1]
        queries, keys = _fold(query_THd, layout, key_heads), _keys(key_Thd, layout)
        scores = _scores(queries, keys, layout)
        weights = scores.softmax(-1)
        # The largest weight is exp(top - lse).
        lse = (scores.amax(-1) - weights.amax(-1).log()).unsqueeze(-1)
        lse_TH = _unfold(lse, layout, heads).squeeze(-1)
        ctx.mark_non_differentiable(lse_TH)
        return _unfold(weights @ _keys(value_Thd, layout), layout, heads), lse_TH

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        query_THd, key_Thd, value_Thd = ctx.saved_tensors
        layout, heads, key_heads = ctx.layout, query_THd.shape[1], key_Thd.shape[1]
        queries, keys = _fold(query_THd, layout, key_heads), _keys(key_Thd, layout)
        weights = _scores(queries, keys, layout).softmax(-1)
        # 0 in the fill, hence where rows are padded.
        grad_out = _fold(gradients[0], layout, key_heads)
        grad_values = weights.transpose(1, 2) @ grad_out
        grad_weights = grad_out @ _keys(value_Thd, layout).transpose(1, 2)
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype
        )
        grad_query_THd = _unfold(grad_scores @ keys, layout, heads)
        grad_key_Thd = _unfold_keys(grad_scores.transpose(1, 2) @ queries, layout, key_heads)
        grad_value_Thd = _unfold_keys(grad_values, layout, key_heads)
        found = (grad_query_THd, grad_key_Thd, grad_value_Thd)
        sides = zip(found, (query_THd, key_Thd, value_Thd), strict=True)
        return *(grad.to(side.dtype) for grad, side in sides), None


def _scores(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """`[B h, G S, P + S]`: behind an opening of P tokens, blind to what comes later."""
    mask_BSK = layout.mask_BSK.to(queries.dtype)
    rows, length, width = mask_BSK.shape
    shape = rows, len(queries) // rows, queries.shape[1] // length, length, width
    mask = mask_BSK[:, None, None].expand(shape).reshape(len(queries), -1, width)
    return torch.baddbmm(mask, queries, keys.transpose(1, 2))


def _fold(side_THd: Tensor, layout: Layout, key_heads: int) -> Tensor:
    """`[B h, G S, d]`: rows side by side, the queries of one key below each other."""
    (rows, length), width = layout.place_BS.shape, side_THd.shape[-1]
    wide = side_THd.index_select(0, layout.place_BS.flatten())
    split = wide.view(rows, length, key_heads, -1, width).permute(0, 2, 3, 1, 4)
    dtype = torch.promote_types(wide.dtype, torch.float32)
    folded = torch.empty(split.shape, dtype=dtype, device=wide.device).copy_(split)
    return folded.view(rows * key_heads, -1, width)


def _unfold(folded: Tensor, layout: Layout, heads: int) -> Tensor:
    """`[T, H, d]`, 0 in the fill."""
    rows, length = layout.place_BS.shape
    side_NHd = folded.view(rows, heads, length, -1).transpose(1, 2).flatten(0, 1)
    found_THd = side_NHd.new_empty(layout.tokens, heads, side_NHd.shape[-1])
    found_THd[layout.used :] = 0.0
    torch.index_select(side_NHd, 0, layout.side_N, out=found_THd[: layout.used])
    return found_THd


def _keys(side_Thd: Tensor, layout: Layout) -> Tensor:
    """`[B h, P + S, d]`: what each row attends to."""
    own = _fold(side_Thd, layout, side_Thd.shape[1])
    if not layout.opening:
        return own
    shared_hPd = side_Thd[: layout.opening].transpose(0, 1).to(own.dtype)
    return torch.cat([shared_hPd.repeat(len(layout.place_BS), 1, 1), own], dim=1)


def _unfold_keys(grad: Tensor, layout: Layout, key_heads: int) -> Tensor:
    """What all rows tell of the opening's keys or values, and each of its own: `[T, h, d]`."""
    opening = layout.opening
    grad_Thd = _unfold(grad[:, opening:].contiguous(), layout, key_heads)
    of_rows = grad[:, :opening].unflatten(0, (-1, key_heads))
    grad_Thd[:opening] += of_rows.sum(0).transpose(0, 1)
    return grad_Thd
