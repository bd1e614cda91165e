"""A Llama-like model's layers, called one after the other with as few steps as a CPU needs.

A token of a few rows takes about as long to write as the weights take to be read, if little else is
done: no cache is copied for each token, and what rows have in common at their heads is read once.
What is computed is what transformers computes, rounded where it rounds; a model that has other
parts, or gives other hidden states, is left to transformers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opcd.adapters import causal_model
from opcd.attention import why_no_prefix
from opcd.batching import pad_right
from opcd.norms import plain_norm
from opcd.prefix_cache import SharedPrefix, cascade_attention, find_blocks
from opcd.ragged import FILL_STEP, find_distinct
from opcd.rollouts.packing import multiply

KNOWN = {f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
"""Kinds of layers. Others of the same parts may differ where a few tokens do not show it: far from
the beginning, or in a model that has hardly learned anything."""
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = ("q_norm", "k_norm")
"""What an attention module may have beside its projections."""
BLOCK = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ROOM_TOKENS = 32
"""Keys and values are kept with room for so many more."""
DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far hidden states may lie from those of transformers, relative to their size."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""What tokens see, `_THd`, from a layer's index, queries `_THd`, keys and values `_Thd`."""


class Layer:
    """One layer: attention, then a gated block."""

    def __init__(self, layer: Any) -> None:
        """Take it apart; its weights stay where they are."""
        self.module = layer.self_attn
        block = layer.mlp
        self._projections = [self.module.q_proj, self.module.k_proj, self.module.v_proj]
        self._gated = [block.gate_proj, block.up_proj]
        self._open, self._down, self._out = block.act_fn, block.down_proj, self.module.o_proj
        self._first, self._second = layer.input_layernorm, layer.post_attention_layernorm
        norms = [getattr(self.module, name, None) for name in HEAD_NORMS]
        self._head_norms = [norm for norm in norms if norm]
        self._width, self._groups = self.module.head_dim, self.module.num_key_value_groups

    def project(self, x_TD: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `_THd`, keys and values `_Thd` of tokens, the first two turned."""
        joint_TE = multiply(self._projections, _norm(self._first, x_TD))
        joint_TJd = joint_TE.view(len(x_TD), -1, self._width)
        heads = joint_TJd.shape[1] // (self._groups + 2)
        both_TNd, v_Thd = joint_TJd[:, :-heads], joint_TJd[:, -heads:]
        if self._head_norms:
            of_q, of_k = self._head_norms
            normed = _norm(of_q, both_TNd[:, :-heads]), _norm(of_k, both_TNd[:, -heads:])
            both_TNd = torch.cat(normed, dim=1)
        both_TNd = _turn(both_TNd, *angles)
        return both_TNd[:, :-heads], both_TNd[:, -heads:], v_Thd

    def finish(self, x_TD: Tensor, seen_THd: Tensor) -> Tensor:
        """The layer's hidden states, from those before it and what its attention found."""
        x_TD = self._out(seen_THd.flatten(1)).add_(x_TD)
        gate_TF, up_TF = multiply(self._gated, _norm(self._second, x_TD)).chunk(2, dim=-1)
        return self._down(self._open(gate_TF) * up_TF).add_(x_TD)


class Layers:
    """The layers of a model, whatever weights they have at the time."""

    def __init__(self, model: Any) -> None:
        """Note where they are; `find_layers` says whether they can be called so."""
        decoder = causal_model(model).get_decoder()
        self.all = [Layer(layer) for layer in decoder.layers]
        self.device: torch.device = next(model.parameters()).device
        self._embed, self._rotate, self._norm = (
            decoder.embed_tokens,
            decoder.rotary_emb,
            decoder.norm,
        )

    def read(
        self, ids_T: Tensor, positions_T: Tensor, attend: Attend, wanted_B: Tensor | None = None
    ) -> Tensor:
        """Hidden states of tokens, `_TD`, or `_BD` of those that are wanted.

        Args:
            ids_T: tokens of all rows.
            positions_T: how many tokens stand in front of each.
            attend: knows which tokens each of them sees.
            wanted_B: places among all T; default: all.
        """
        x_TD = self._embed(ids_T)
        cos_1Td, sin_1Td = self._rotate(x_TD[None], positions_T[None])
        angles = cos_1Td[0].unsqueeze(1), _half_negative(sin_1Td[0]).unsqueeze(1)
        for index, layer in enumerate(self.all):
            seen_THd = attend(index, *layer.project(x_TD, angles))
            if wanted_B is not None and index + 1 == len(self.all):
                x_TD, seen_THd = x_TD[wanted_B], seen_THd[wanted_B]
            x_TD = layer.finish(x_TD, seen_THd)
        return _norm(self._norm, x_TD)


class LayerRows:
    """Rows that are being answered, with their keys and values.

    Those of what a row begins with are padded on the right; those of what is written go to the same
    place in all rows, behind the padding.
    """

    def __init__(self, layers: Layers, prefixes: Sequence[SharedPrefix] = ()) -> None:
        """No tokens yet, but what each row has in front of its own, if that was read before."""
        self._layers = layers
        self._prefixes = list(prefixes)
        self._blocks = find_blocks(self._prefixes)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._lengths: list[int] = []
        self._mask_BS = torch.empty(0)
        """What is added to scores, as wide as keys and values are now."""

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read what the rows begin with; the hidden state at the last token of each, `_BD`.

        Tokens behind the same tokens have the same states, so they are read once.
        """
        self._lengths = [len(row) for row in rows]
        groups = [id(prefix) for prefix in self._prefixes] or [0] * len(rows)
        places, firsts = find_distinct(rows, groups)
        # Places without a token take another's, which nothing that counts looks at.
        firsts += [firsts[0]] * (-len(firsts) % FILL_STEP)
        row_T, column_T = torch.tensor(firsts, device=self._layers.device).unbind(-1)
        place_BS = pad_right(places).to(self._layers.device)

        def attend(index: int, q_THd: Tensor, k_Thd: Tensor, v_Thd: Tensor) -> Tensor:
            q_BHSd, k_BhSd, v_BhSd = (t[place_BS].transpose(1, 2) for t in (q_THd, k_Thd, v_Thd))
            self._keys.append(_with_room(k_BhSd))
            self._values.append(_with_room(v_BhSd))
            # Padding stands behind a row's tokens, so that being causal hides it from them.
            return self._see(index, q_BHSd, k_BhSd, v_BhSd, None)[row_T, column_T]

        ids_T = torch.tensor([rows[row][column] for row, column in firsts], device=row_T.device)
        before_B = torch.tensor(self._before(), device=row_T.device)
        wanted_B = torch.tensor([own[-1] for own in places], device=row_T.device)
        self._mask_BS = hide_padding(self._lengths, place_BS.shape[1], row_T.device)
        return self._layers.read(ids_T, before_B[row_T] + column_T, attend, wanted_B)

    def write(self, tokens_B: Tensor) -> Tensor:
        """Read one more token of each row; its hidden states, `_BD`."""
        pairs = zip(self._before(), self._lengths, strict=True)
        positions_B = torch.tensor([before + own for before, own in pairs], device=tokens_B.device)
        at = self._mask_BS.shape[1]
        self._mask_BS = functional.pad(self._mask_BS, (0, 1))
        mask_B11S = self._mask_BS[:, None, None]

        def attend(index: int, q_BHd: Tensor, k_Bhd: Tensor, v_Bhd: Tensor) -> Tensor:
            if at == self._keys[index].shape[2]:
                for sides in (self._keys, self._values):
                    sides[index] = _with_room(sides[index])
            keys, values = self._keys[index], self._values[index]
            keys[:, :, at], values[:, :, at] = k_Bhd, v_Bhd
            own = keys[:, :, : at + 1], values[:, :, : at + 1]
            return self._see(index, q_BHd.unsqueeze(2), *own, mask_B11S).squeeze(1)

        hidden_BD = self._layers.read(tokens_B, positions_B, attend)
        self._lengths = [length + 1 for length in self._lengths]
        return hidden_BD

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with some of the rows."""
        kept_B = torch.tensor(kept, device=self._layers.device)
        for sides in (self._keys, self._values):
            for index, side_BhSd in enumerate(sides):
                sides[index] = side_BhSd[kept_B]
        self._mask_BS = self._mask_BS[kept_B]
        self._lengths = [self._lengths[row] for row in kept]
        self._prefixes = [self._prefixes[row] for row in kept] if self._prefixes else []
        self._blocks = find_blocks(self._prefixes)

    def _before(self) -> list[int]:
        return [prefix.tokens for prefix in self._prefixes] or [0] * len(self._lengths)

    def _see(
        self, index: int, q_BHSd: Tensor, k_BhSd: Tensor, v_BhSd: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention, `_BSHd`: causal, or of one token to all that the mask leaves."""
        module = self._layers.all[index].module
        if self._blocks:
            own = q_BHSd, k_BhSd, v_BhSd, mask
            return cascade_attention(module, *own, module.scaling, shared_prefixes=self._blocks)[0]
        rows, heads, length, width = q_BHSd.shape
        if length > 1:
            found_BHSd = functional.scaled_dot_product_attention(
                q_BHSd, k_BhSd, v_BhSd, is_causal=True, scale=module.scaling, enable_gqa=True
            )
            return found_BHSd.transpose(1, 2)
        # Query heads that share a key head are as good as several queries of it.
        folded_BhGd = q_BHSd.reshape(rows, k_BhSd.shape[1], -1, width)
        found_BhGd = functional.scaled_dot_product_attention(
            folded_BhGd, k_BhSd, v_BhSd, mask, scale=module.scaling
        )
        return found_BhGd.reshape(rows, 1, heads, width)


def find_layers(model: Any) -> Layers | None:
    """A model's layers, if they are those that are known here; `None` for any other model.

    Known by their kind, their parts, and by what comes out with the weights of now.
    """
    plain = causal_model(model)
    weight = next(plain.parameters())
    if weight.device.type != "cpu" or weight.dtype not in DIFFERENCE or why_no_prefix(plain):
        return None
    decoder = plain.get_decoder()
    if _parts(decoder) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return None
    angles = len(getattr(decoder.rotary_emb, "inv_freq", ()))
    if not all(_is_known(layer, angles) for layer in decoder.layers):
        return None
    layers = Layers(model)
    return layers if _agrees(layers, plain, DIFFERENCE[weight.dtype]) else None


def _parts(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_known(layer: Any, angles: int) -> bool:
    """Whether a layer has the parts that `Layer` calls, and its heads turn by so many angles."""
    if type(layer).__name__ not in KNOWN or _parts(layer) != LAYER or _parts(layer.mlp) != BLOCK:
        return False
    module, norms = layer.self_attn, [layer.input_layernorm, layer.post_attention_layernorm]
    of_heads = [getattr(module, name) for name in HEAD_NORMS if hasattr(module, name)]
    if _parts(module) - set(HEAD_NORMS) != ATTENTION or len(of_heads) == 1:
        return False
    if not all(hasattr(norm, "variance_epsilon") for norm in norms + of_heads):
        return False
    if not all(hasattr(module, name) for name in ("scaling", "num_key_value_groups")):
        return False
    width = getattr(module, "head_dim", 0)
    return width == 2 * angles and all(len(norm.weight) == width for norm in of_heads)


@torch.no_grad()
def _agrees(layers: Layers, plain: Any, difference: float) -> bool:
    """Whether hidden states are those of transformers: where a row is read, and one token on."""
    rows, last_B = [(1, 2, 3, 5), (1, 2, 4)], torch.tensor([6, 6], device=layers.device)
    reader = LayerRows(layers)
    found_SD = torch.stack([reader.read(rows)[0], reader.write(last_B)[0]]).float()
    ids_1S = torch.tensor([[*rows[0], 6]], device=layers.device)
    wanted_SD = plain.get_decoder()(input_ids=ids_1S, use_cache=False).last_hidden_state[0, -2:]
    return bool((found_SD - wanted_SD.float()).norm() < difference * wanted_SD.float().norm())


def _norm(layer: Any, x: Tensor) -> Tensor:
    return plain_norm(x, layer.weight, layer.variance_epsilon)


def _turn(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Rotary positions; the sine's first half is negative, as that of `rotate_half` would be."""
    turned_THd = x_THd.roll(x_THd.shape[-1] // 2, -1)
    return turned_THd.mul_(sin_T1d).add_(x_THd * cos_T1d)


def _half_negative(sin_Td: Tensor) -> Tensor:
    first_Th, second_Th = sin_Td.chunk(2, dim=-1)
    return torch.cat([-first_Th, second_Th], dim=-1)


def _with_room(side_BhSd: Tensor) -> Tensor:
    """Keys or values with room behind them."""
    rows, heads, length, width = side_BhSd.shape
    wide_BhSd = side_BhSd.new_empty(rows, heads, length + ROOM_TOKENS, width)
    wide_BhSd[:, :, :length] = side_BhSd
    return wide_BhSd


def hide_padding(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    """What is added to the scores of rows of these lengths, `_BS`: nothing, but at padding."""
    length_B1 = torch.tensor(lengths, device=device).unsqueeze(-1)
    hidden_BS = torch.arange(width, device=device) >= length_B1
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(hidden_BS.shape, device=device).masked_fill_(hidden_BS, lowest)
