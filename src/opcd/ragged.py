"""Rows of different lengths in one sequence: no product sees padding, or the same token twice.

    rows                      sequence
    a b c d                   a b c d e f g  fill
    a b e f
    a b e g

Tokens that stand behind the same tokens have the same states, so they are computed once, and get
their gradient from all rows that they stand in: a chat template's opening, a game's earlier turns.
Only attention puts rows side by side again. It keeps queries, keys and values alone: the scores are
computed anew in the backward pass, in float32 at least.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd.rendering import common_prefix

FILL_STEP = 32
"""Sequences differ in length by this much, since a CPU keeps a compiled product for every shape."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where rows stand in the one sequence of T tokens, and how they attend side by side."""

    ids_1T: Tensor
    row_T: Tensor
    """In which row each token stands first."""
    column_T: Tensor
    """In which column of it."""
    query_BS: Tensor
    """Places of the tokens that are first in each row, which are the last ones of a row, or none.
    What pads a row stands in the fill."""
    key_BK: Tensor
    """Places of all tokens of each row, padded in the same way."""
    mask_BSK: Tensor
    """What is added to their scores."""
    side_N: Tensor
    """Where the `N` tokens of the sequence that are no fill stand among the `B S` queries."""
    opening: int
    """1 if there is a row of its own for what all rows open with, before the others."""

    @property
    def tokens(self) -> int:
        """The length of the sequence, with the fill."""
        return self.ids_1T.shape[1]

    def places(self, row_N: Tensor, column_N: Tensor) -> Tensor:
        """Where tokens of the rows stand in the sequence, `_N`."""
        return self.key_BK[row_N + self.opening, column_N]

    def positions(self, before: Sequence[int] = ()) -> Tensor:
        """Position of each token, `_1T`.

        Args:
            before: how many tokens each row has in front of all that stands here; default: none.
        """
        if not before:
            return self.column_T.unsqueeze(0)
        before_B = torch.tensor([*before[: self.opening], *before], device=self.row_T.device)
        return (self.column_T + before_B[self.row_T]).unsqueeze(0)


def lay_out(
    rows: Sequence[tuple[int, ...]], device: torch.device, groups: Sequence[int] = ()
) -> Layout:
    """Put rows into one sequence.

    Args:
        rows: token ids of each.
        device: where the layout's tensors are.
        groups: rows of different groups stand behind something different; neighbours belong
            together. Default: all are of one.
    """
    groups = groups or [0] * len(rows)
    shared = common_prefix(rows) if len(set(groups)) == 1 and len(rows) > 1 else 0
    if shared:
        rows, groups = [rows[0][:shared], *rows], [groups[0], *groups]
    places, firsts = find_distinct(rows, groups)
    used = len(firsts)
    tokens = (used // FILL_STEP + 1) * FILL_STEP
    row_T, column_T = torch.tensor(firsts + [(0, 0)] * (tokens - used), device=device).unbind(-1)
    new = Counter(row for row, _ in firsts)
    cuts = [len(own) - new[row] for row, own in enumerate(places)]
    key_BK = _side_by_side(places, used, device)
    ends = [own[cut:] for own, cut in zip(places, cuts, strict=True)]
    query_BS = _side_by_side(ends, used, device)
    column_K = torch.arange(key_BK.shape[1], device=device)
    column_S1 = torch.arange(query_BS.shape[1], device=device).unsqueeze(-1)
    column_BS1 = torch.tensor(cuts, device=device).view(-1, 1, 1) + column_S1
    mask_BSK = torch.zeros(*query_BS.shape, len(column_K), device=device)
    mask_BSK.masked_fill_(column_K > column_BS1, -torch.inf)
    ids = [rows[row][column] for row, column in firsts] + [0] * (tokens - used)
    return Layout(
        torch.tensor([ids], device=device),
        row_T,
        column_T,
        query_BS,
        key_BK,
        mask_BSK,
        side_N=(query_BS.flatten() < used).nonzero().squeeze(-1),
        opening=bool(shared),
    )


def find_distinct(
    rows: Sequence[Sequence[int]], groups: Sequence[int]
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Which tokens of rows are the same behind the same, so that they need to be read once.

    Args:
        rows: token ids.
        groups: rows of different groups stand behind something different.

    Returns:
        For each token of each row its place among the distinct ones, and the row and the column
        where each of those comes first.
    """
    known: dict[tuple[int, int, int], int] = {}
    places: list[list[int]] = []
    firsts: list[tuple[int, int]] = []
    for row, (ids, group) in enumerate(zip(rows, groups, strict=True)):
        place, own = -1, []
        for column, token in enumerate(ids):
            place = known.setdefault((group, place, token), len(firsts))
            if place == len(firsts):
                firsts.append((row, column))
            own.append(place)
        places.append(own)
    return places, firsts


def attend(
    query_THd: Tensor, key_Thd: Tensor, value_Thd: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Causal attention of each token to its row.

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
        heads = query_THd.shape[1]
        queries, keys, values = _fold_all(query_THd, key_Thd, value_Thd, layout)
        scores = _scores(queries, keys, layout)
        weights = scores.softmax(-1)
        # The largest weight is exp(top - lse).
        lse = (scores.amax(-1) - weights.amax(-1).log()).unsqueeze(-1)
        lse_TH = _unfold(lse, layout, heads).squeeze(-1)
        ctx.mark_non_differentiable(lse_TH)
        return _unfold(weights @ values, layout, heads), lse_TH

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        query_THd, key_Thd, value_Thd = ctx.saved_tensors
        layout, heads, key_heads = ctx.layout, query_THd.shape[1], key_Thd.shape[1]
        queries, keys, values = _fold_all(query_THd, key_Thd, value_Thd, layout)
        weights = _scores(queries, keys, layout).softmax(-1)
        # 0 in the fill, hence where rows are padded.
        grad_out = _fold(gradients[0], layout.query_BS, key_heads)
        grad_values = weights.transpose(1, 2) @ grad_out
        grad_weights = grad_out @ values.transpose(1, 2)
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype
        )
        grad_keys = grad_scores.transpose(1, 2) @ queries
        found = (
            _unfold(grad_scores @ keys, layout, heads),
            _add_up(grad_keys, layout, key_heads),
            _add_up(grad_values, layout, key_heads),
        )
        sides = zip(found, (query_THd, key_Thd, value_Thd), strict=True)
        return *(grad.to(side.dtype) for grad, side in sides), None


def _side_by_side(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def _scores(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """`[B h, G S, K]`: blind to what comes later."""
    mask_BSK = layout.mask_BSK.to(queries.dtype)
    rows, length, width = mask_BSK.shape
    shape = rows, len(queries) // rows, queries.shape[1] // length, length, width
    mask = mask_BSK[:, None, None].expand(shape).reshape(len(queries), -1, width)
    return torch.baddbmm(mask, queries, keys.transpose(1, 2))


def _fold_all(query_THd: Tensor, key_Thd: Tensor, value_Thd: Tensor, layout: Layout) -> Any:
    key_heads = key_Thd.shape[1]
    keys, values = (_fold(side, layout.key_BK, key_heads) for side in (key_Thd, value_Thd))
    return _fold(query_THd, layout.query_BS, key_heads), keys, values


def _fold(side_THd: Tensor, place_BS: Tensor, key_heads: int) -> Tensor:
    """`[B h, G S, d]`: rows side by side, the queries of one key below each other."""
    (rows, length), width = place_BS.shape, side_THd.shape[-1]
    wide = side_THd.index_select(0, place_BS.flatten())
    split = wide.view(rows, length, key_heads, -1, width).permute(0, 2, 3, 1, 4)
    dtype = torch.promote_types(wide.dtype, torch.float32)
    folded = torch.empty(split.shape, dtype=dtype, device=wide.device).copy_(split)
    return folded.view(rows * key_heads, -1, width)


def _unfold(folded: Tensor, layout: Layout, heads: int) -> Tensor:
    """`[T, H, d]` of queries, 0 in the fill."""
    rows, length = layout.query_BS.shape
    side_NHd = folded.view(rows, heads, length, -1).transpose(1, 2).flatten(0, 1)
    found_THd = side_NHd.new_empty(layout.tokens, heads, side_NHd.shape[-1])
    used = len(layout.side_N)
    found_THd[used:] = 0.0
    torch.index_select(side_NHd, 0, layout.side_N, out=found_THd[:used])
    return found_THd


def _add_up(folded: Tensor, layout: Layout, key_heads: int) -> Tensor:
    """`[T, h, d]` of keys or values: the sum over all rows that a token stands in."""
    rows, length = layout.key_BK.shape
    side_NHd = folded.view(rows, key_heads, length, -1).transpose(1, 2).flatten(0, 1)
    found_Thd = side_NHd.new_zeros(layout.tokens, key_heads, side_NHd.shape[-1])
    return found_Thd.index_add_(0, layout.key_BK.flatten(), side_NHd)
