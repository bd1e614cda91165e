"""Openings that prompts share, read once: keys and values that a whole batch attends to.

The keys and values of an opening exist once, whatever the batch. Attention over it folds the rows
behind it into the queries (one large product that reads the opening once), attention over a
row's own tokens is as usual, and the two are merged by their log-sum-exp: the softmax over both
parts is exact, nothing is approximated. Rows of one batch may stand behind different openings.

    out = w out_prefix + (1 - w) out_own,   w = 1 / (1 + exp(lse_own - lse_prefix))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from opcd.adapters import causal_model
from opcd.attention import attend_by, compute_dtype, keeping_in
from opcd.batching import Side
from opcd.models import can_be_ragged, read_as_one
from opcd.ragged import Layout, attend, lay_out

SCORES_AT_ONCE = 2**24
"""Attention scores over the prefix that exist at one time."""
PREFILL_TOKENS = 1024
"""Prefix tokens read in one forward pass."""
FUSED_TOKENS = 256
"""Own tokens of a row from which their scores take more memory than they save time."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Keys and values of a prefix, one `[heads, P, head_dim]` pair for each layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length of the prefix."""
        return len(self.ids)

    @property
    def bytes(self) -> int:
        """Memory the prefix takes."""
        return sum(t.numel() * t.element_size() for t in self.sides)

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """The keys of all layers, then their values."""
        return self.keys + self.values


@torch.no_grad()
def read_prefix(model: Any, ids: Sequence[int]) -> SharedPrefix:
    """Read a prefix with the model's weights of this moment.

    In pieces, each behind those before it, so that neither scores nor a mask of `[P, P]` exist.
    """
    decoder = causal_model(model).get_decoder()
    whole: list[Tensor] = []
    done = 0
    for part_P in torch.tensor(ids, device=next(decoder.parameters()).device).split(PREFILL_TOKENS):
        cache, part_1P = DynamicCache(config=causal_model(model).config), part_P.unsqueeze(0)
        if done:
            forward_after_prefix(model, [_prefix_of(whole, ids[:done])], part_1P, cache=cache)
        else:
            decoder(input_ids=part_1P, **keeping_in(cache, decoder))
        new = keep_prefix(model, cache, ids[done : done + len(part_P)])
        if len(ids) == new.tokens:
            return new
        whole = whole or [side_hPd.new_empty(_longer(side_hPd, len(ids))) for side_hPd in new.sides]
        for whole_hPd, new_hPd in zip(whole, new.sides, strict=True):
            whole_hPd[:, done : done + len(part_P)] = new_hPd
        done += len(part_P)
    return _prefix_of(whole, ids)


def _longer(side_hPd: Tensor, tokens: int) -> tuple[int, int, int]:
    heads, _, width = side_hPd.shape
    return heads, tokens, width


def _prefix_of(sides: Sequence[Tensor], ids: Sequence[int]) -> SharedPrefix:
    """Keys and values of all layers as a prefix that has only its first tokens yet."""
    own = tuple(side_hPd[:, : len(ids)] for side_hPd in sides)
    return SharedPrefix(own[: len(own) // 2], own[len(own) // 2 :], tuple(ids))


def keep_prefix(model: Any, cache: DynamicCache, ids: Sequence[int]) -> SharedPrefix:
    """The keys and values that a model left in the cache of one row, in the dtype to attend in."""
    read = cast(Any, cache.layers)
    dtype = kept_dtype(model)
    layers = [(layer.keys[0].to(dtype), layer.values[0].to(dtype)) for layer in read]
    return SharedPrefix(*(tuple(part) for part in zip(*layers, strict=True)), ids=tuple(ids))


def kept_dtype(model: Any) -> torch.dtype:
    """The dtype of a prefix's keys and values."""
    # Under autocast the cache keeps float32, which attention would turn into bfloat16 every time. A
    # CPU's fused kernel, though, takes half as long again in bfloat16.
    dtype, device = compute_dtype(model), next(model.parameters()).device
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


def token_bytes(model: Any) -> int:
    """Memory that the keys and values of one token of a prefix take."""
    config = causal_model(model).config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * width * kept_dtype(model).itemsize


def forward_after_prefix(
    model: Any,
    prefixes: Sequence[SharedPrefix],
    ids_BS: Tensor,
    mask_BS: Tensor | None = None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """Hidden states `_BSD` of tokens that come after prefixes that were read before.

    Args:
        model: the model that read the prefixes, with the same weights.
        prefixes: each row's; neighbours with the same one attend to it together.
        ids_BS: each row's own tokens. With `cache`, those after what is in it.
        mask_BS: 1 at real tokens, over the cached and the new ones; needed with left padding.
        cache: holds the rows' own keys and values, and grows.
    """
    decoder = causal_model(model).get_decoder()
    old = cache.get_seq_length() if cache is not None else 0
    # A piece of a prefix attends to itself by the CPU's fused kernel: no scores, no mask.
    is_piece = mask_BS is None and not old and ids_BS.shape[1] >= FUSED_TOKENS
    is_fused = is_piece and ids_BS.device.type == "cpu"
    if mask_BS is None:
        mask_BS = torch.ones(len(ids_BS), old + ids_BS.shape[1], device=ids_BS.device)
    before_B1 = torch.tensor([prefix.tokens for prefix in prefixes], device=ids_BS.device)[:, None]
    positions_BS = (mask_BS.long().cumsum(-1) - 1).clamp(min=0)[:, old:] + before_B1
    with attend_by(model, "opcd_cascade"):
        return decoder(
            input_ids=ids_BS,
            attention_mask=None if is_fused else _own_mask(mask_BS, ids_BS.shape[1]),
            position_ids=positions_BS,
            **keeping_in(cache, decoder),
            shared_prefixes=find_blocks(prefixes),
        ).last_hidden_state


def states_after_prefix(model: Any, prefixes: Sequence[SharedPrefix], side: Side) -> Tensor:
    """The hidden states that predict the response tokens, `hidden_TD`, of rows behind prefixes.

    Args:
        model: the model that read the prefixes, with the same weights.
        prefixes: each row's; neighbours with the same one attend to it together.
        side: each row's own tokens.
    """
    if not can_be_ragged(model, side.ids_BS):
        return side.take(forward_after_prefix(model, prefixes, side.ids_BS))
    layout = lay_out(side.rows(), side.ids_BS.device, [id(prefix) for prefix in prefixes])
    told = {"behind": (layout, _tokens_behind(prefixes, layout))}
    before = [prefix.tokens for prefix in prefixes]
    return read_as_one(model, side, layout, ("opcd_ragged_cascade", told), before)


def _tokens_behind(
    prefixes: Sequence[SharedPrefix], layout: Layout
) -> list[tuple[slice, SharedPrefix]]:
    """Which tokens of the sequence stand behind each prefix."""
    rows = [*prefixes[: layout.opening], *prefixes]
    firsts = layout.row_T[: len(layout.side_N)].tolist()
    return find_blocks([rows[row] for row in firsts])


def find_blocks(prefixes: Sequence[SharedPrefix]) -> list[tuple[slice, SharedPrefix]]:
    """Neighbouring rows with the same prefix."""
    found: list[tuple[slice, SharedPrefix]] = []
    for row, prefix in enumerate(prefixes):
        if found and found[-1][1] is prefix:
            found[-1] = slice(found[-1][0].start, row + 1), prefix
        else:
            found.append((slice(row, row + 1), prefix))
    return found


def cascade_attention(
    module: Any,
    query_BHSd: Tensor,
    key_BhSd: Tensor,
    value_BhSd: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    shared_prefixes: Sequence[tuple[slice, SharedPrefix]],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over shared prefixes and over each row's own tokens, merged exactly.

    `H` query heads share `h` key heads; `d` is the width of a head. Registered with transformers
    as `opcd_cascade`; returns `[B, S, H, d]` as its attention functions do.
    """
    batch, heads, length, width = query_BHSd.shape
    key_heads = key_BhSd.shape[1]
    # Under autocast rotary embeddings leave queries and keys in float32 beside bfloat16 values.
    dtype = value_BhSd.dtype
    query_BhGd = query_BHSd.to(dtype).reshape(batch, key_heads, -1, width) * scaling
    own_BhGd, own_lse_BhG = _attend_own(query_BhGd, key_BhSd.to(dtype), value_BhSd, attention_mask)
    merged = []
    for rows, prefix in shared_prefixes:
        keys, values = (side[module.layer_idx] for side in (prefix.keys, prefix.values))
        folded_hNd = query_BhGd[rows].transpose(0, 1).reshape(key_heads, -1, width)
        out_hNd, lse_hN = _attend_prefix(folded_hNd.to(keys.dtype), keys, values)
        count = rows.stop - rows.start
        out_BhGd = out_hNd.to(dtype).view(key_heads, count, -1, width).transpose(0, 1)
        lse_BhG = lse_hN.view(key_heads, count, -1).transpose(0, 1)
        weight_BhG1 = torch.sigmoid(lse_BhG - own_lse_BhG[rows]).unsqueeze(-1).to(dtype)
        merged.append(torch.lerp(own_BhGd[rows], out_BhGd, weight_BhG1))
    merged_BhGd = merged[0] if len(merged) == 1 else torch.cat(merged)
    return merged_BhGd.reshape(batch, heads, length, width).transpose(1, 2), None


def ragged_cascade(
    module: Any,
    query_1HTd: Tensor,
    key_1hTd: Tensor,
    value_1hTd: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    behind: tuple[Layout, Sequence[tuple[slice, SharedPrefix]]],
    **_: Any,
) -> tuple[Tensor, None]:
    """The same for rows that stand one after the other, whose tokens share prefixes.

    Registered as `opcd_ragged_cascade`; returns `[1, T, H, d]`.
    """
    layout, shared_prefixes = behind
    sides = (side[0].transpose(0, 1) for side in (query_1HTd * scaling, key_1hTd, value_1hTd))
    query_THd, key_Thd, value_Thd = sides
    out_THd, lse_TH = attend(query_THd, key_Thd, value_Thd, layout)
    for tokens, prefix in shared_prefixes:
        keys, values = (side[module.layer_idx] for side in (prefix.keys, prefix.values))
        query_nhGd = query_THd[tokens].to(keys.dtype).unflatten(1, (len(keys), -1))
        folded_hNd = query_nhGd.permute(1, 2, 0, 3).flatten(1, 2)
        found_hNd, lse_hN = _attend_prefix(folded_hNd, keys, values)
        split = (-1, tokens.stop - tokens.start)
        found_nHd = found_hNd.unflatten(1, split).flatten(0, 1).transpose(0, 1)
        found_lse_nH = lse_hN.unflatten(1, split).flatten(0, 1).transpose(0, 1)
        weight_nH1 = torch.sigmoid(found_lse_nH - lse_TH[tokens]).unsqueeze(-1)
        out_THd[tokens] = torch.lerp(out_THd[tokens], found_nHd.to(out_THd.dtype), weight_nH1)
    return out_THd.unsqueeze(0).to(value_1hTd.dtype), None


def _attend_prefix(query_hNd: Tensor, key_hPd: Tensor, value_hPd: Tensor) -> tuple[Tensor, Tensor]:
    if query_hNd.device.type == "cpu":
        # The CPU's fused kernel is the only one that returns the log-sum-exp too; it passes over
        # the scores once and keeps none of them.
        out_1hNd, lse_1hN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_hNd[None], key_hPd[None], value_hPd[None], scale=1.0
        )
        return out_1hNd[0], lse_1hN[0]
    rows = max(1, SCORES_AT_ONCE // (key_hPd.shape[0] * key_hPd.shape[1]))
    parts = []
    for part_hNd in query_hNd.split(rows, dim=1):
        scores_hNP = (part_hNd @ key_hPd.transpose(1, 2)).float()
        lse_hN = scores_hNP.logsumexp(-1)
        weights_hNP = scores_hNP.sub_(lse_hN.unsqueeze(-1)).exp_().to(value_hPd.dtype)
        parts.append((weights_hNP @ value_hPd, lse_hN))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def _attend_own(
    query_BhGd: Tensor, key_BhSd: Tensor, value_BhSd: Tensor, mask_B1qS: Tensor | None
) -> tuple[Tensor, Tensor]:
    if mask_B1qS is None:
        return _attend_own_fused(query_BhGd, key_BhSd, value_BhSd)
    scores_BhGS = (query_BhGd @ key_BhSd.transpose(2, 3)).float()
    groups = query_BhGd.shape[2] // mask_B1qS.shape[2]
    scores_BhGS += mask_B1qS.repeat(1, 1, groups, 1)
    # Not through exp: on a CPU it takes 30 x as long for the masked scores, whose softmax is 0.
    weights_BhGS = scores_BhGS.softmax(-1)
    lse_BhG = scores_BhGS.amax(-1) - weights_BhGS.amax(-1).log()
    return weights_BhGS.to(value_BhSd.dtype) @ value_BhSd, lse_BhG


def _attend_own_fused(
    query_BhGd: Tensor, key_BhSd: Tensor, value_BhSd: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for rows without padding and without a cache, of which only causality is asked."""
    batch, key_heads, length, width = key_BhSd.shape
    query_BHSd = query_BhGd.reshape(batch, -1, length, width)
    groups = query_BHSd.shape[1] // key_heads
    key_BHSd, value_BHSd = (s.repeat_interleave(groups, 1) for s in (key_BhSd, value_BhSd))
    out_BHSd, lse_BHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_BHSd, key_BHSd, value_BHSd, is_causal=True, scale=1.0
    )
    return out_BHSd.reshape(query_BhGd.shape), lse_BHS.reshape(query_BhGd.shape[:-1])


def _own_mask(mask_BS: Tensor, queries: int) -> Tensor:
    """Additive `[B, 1, q, S]`: causal among a row's own tokens, and blind to padding.

    Padding tokens attend to themselves, so that their unused rows stay finite.
    """
    length = mask_BS.shape[1]
    position_S = torch.arange(length, device=mask_BS.device)
    query_q1 = position_S[length - queries :].unsqueeze(-1)
    allowed_BqS = (position_S <= query_q1) & mask_BS.bool().unsqueeze(1)
    allowed_BqS = allowed_BqS | (position_S == query_q1)
    blocked_BqS = torch.zeros(allowed_BqS.shape, device=mask_BS.device).masked_fill(
        ~allowed_BqS, torch.finfo(torch.float32).min
    )
    return blocked_BqS.unsqueeze(1)


AttentionInterface.register("opcd_cascade", cascade_attention)
AttentionInterface.register("opcd_ragged_cascade", ragged_cascade)
