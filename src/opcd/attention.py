"""What a model's attention computes, and another function in its place where that is the same.

A prefix that is read once, and rows in one sequence, need an attention of their own. Families that
add something to it (windows, caps, sinks, angles by length) are known by their configuration, and
the rest by what comes out; they are left to transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from opcd.adapters import at_rest, causal_model, in_shards
from opcd.ragged import Layout, attend, lay_out

ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Rotary positions whose angles depend on the longest row that is read: the angles of a prefix
would be those of its own length, and those of a row another's."""
PRECISE = (torch.float32, torch.float64)


def why_no_prefix(model: Any) -> str | None:
    """The reason why a model cannot go on from tokens read before; `None` if it can."""
    model = causal_model(model)
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    listed = getattr(config, "layer_types", None)
    kinds = set(listed or (["sliding_attention"] if window else ["full_attention"]))
    if window and kinds != {"full_attention"}:
        return f"it attends to a window of {window} tokens, which the context may not fit into"
    if kinds != {"full_attention"} or getattr(config, "attn_logit_softcapping", None):
        return "its layers are not plain full attention"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not let its attention be replaced"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ROPE_BY_LENGTH:
        return f"its positions turn by the longest row's length (rope_type {rope['rope_type']})"
    return _why_other_attention(model)


_OTHER_ATTENTION: WeakKeyDictionary = WeakKeyDictionary()


def _why_other_attention(model: Any) -> str | None:
    """Why a model's attention is not what stands in for it here; `None` if it is.

    Known by what comes out. Looked at once, with whole weights: only their values move.
    """
    if model not in _OTHER_ATTENTION:
        if in_shards(model) or next(model.parameters()).is_meta:
            return None
        try:
            with at_rest(model):
                is_same = _attends_alike(model)
        # It hands on less than its decoder is told, or heads of other shapes.
        except (TypeError, RuntimeError, AttributeError, LookupError, ValueError):
            is_same = False
        reason = f"{type(model).__name__} adds something of its own to attention"
        _OTHER_ATTENTION[model] = None if is_same else reason
    return _OTHER_ATTENTION[model]


@torch.no_grad()
def _attends_alike(model: Any) -> bool:
    """Whether rows in one sequence have the states that each has alone, with what a cache keeps."""
    decoder, rows = model.get_decoder(), [(1, 2, 3, 5), (1, 2, 4)]
    layout, kept = lay_out(rows, model.device), DynamicCache(config=model.config)
    seen: list[tuple[int, Tensor, Tensor]] = []
    told = {**keeping_in(kept, decoder), "layout": layout, "seen": seen}
    with attend_by(model, "opcd_ragged"):
        read = decoder(input_ids=layout.ids_1T, position_ids=layout.positions(), **told)
    layers: list[Any] = list(kept.layers)
    if [index for index, _, _ in seen] != list(range(len(layers))):
        return False
    for layer, (_, key, value) in zip(layers, seen, strict=True):
        sides = (layer.keys, key), (layer.values, value)
        if key.shape != value.shape or not all(torch.equal(*side) for side in sides):
            return False
    limit = rounding_of(model)
    for row, ids in enumerate(rows):
        ids_1S = torch.tensor([ids], device=model.device)
        wanted_SD = decoder(input_ids=ids_1S, use_cache=False).last_hidden_state[0]
        found_SD = read.last_hidden_state[0, layout.key_BK[row + layout.opening, : len(ids)]]
        if not (found_SD - wanted_SD).norm() <= limit * wanted_SD.norm():
            return False
    return True


def keeping_in(kept: DynamicCache | None, decoder: Any) -> dict[str, Any]:
    """What a decoder is told so that it keeps keys and values there, or nowhere."""
    return {_cache_name(type(decoder)): kept, "use_cache": kept is not None}


@cache
def _cache_name(kind: type[Any]) -> str:
    """What decoders of this kind call it: from 5.24 on, transformers has another name."""
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


def compute_dtype(model: Any) -> torch.dtype:
    """What a model multiplies in: its weights' dtype, or that of autocast."""
    weight = next(model.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def rounding_of(model: Any) -> float:
    """How far hidden states of the same tokens may lie apart, relative to their size."""
    return 1e-3 if compute_dtype(model) in PRECISE else 0.1


@contextmanager
def attend_by(model: Any, name: str) -> Iterator[None]:
    """Within it, the model computes its attention by another of transformers' functions."""
    config = causal_model(model).get_decoder().config
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def ragged_attention(
    module: Any,
    query_1HTd: Tensor,
    key_1hTd: Tensor,
    value_1hTd: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: Layout,
    **named: Any,
) -> tuple[Tensor, None]:
    """Attention of rows that stand one after the other; `H` query heads share `h` key heads.

    Registered with transformers as `opcd_ragged`; returns `[1, T, H, d]`. A list
    `seen` is given the layer's index, keys and values.
    """
    if "seen" in named:
        named["seen"].append((module.layer_idx, key_1hTd, value_1hTd))
    sides = (side[0].transpose(0, 1) for side in (query_1HTd * scaling, key_1hTd, value_1hTd))
    query_THd, key_Thd, value_Thd = sides
    out_THd = attend(query_THd, key_Thd, value_Thd, layout)[0]
    return out_THd.unsqueeze(0).to(value_1hTd.dtype), None


AttentionInterface.register("opcd_ragged", ragged_attention)
