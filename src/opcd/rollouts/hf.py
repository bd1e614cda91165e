"""Batched sampling with transformers, from a merged copy of the student or from its base.

The copy is plain (adapters merged into it) and in the run's dtype; weights that training leaves
alone are the student's own. What prompts share is read once for all of them (each context of a
pool for itself); rows that have finished leave the batch. Which tokens are drawn depends on the
sampling seed and the task id, not on the batch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.initialization import no_init_weights

from opcd.adapters import (
    adapter_off,
    at_rest,
    causal_model,
    in_shards,
    merged_weights,
    share_frozen,
    writes_to,
)
from opcd.attention import keeping_in, why_no_prefix
from opcd.batching import padded_width
from opcd.models import output_head
from opcd.openings import Ids, find_openings, in_passes
from opcd.prefix_cache import (
    PREFILL_TOKENS,
    SharedPrefix,
    forward_after_prefix,
    read_prefix,
)
from opcd.prefix_store import PrefixStore
from opcd.rollouts.engine import Policy, Prompt, Sampling
from opcd.rollouts.layers import LayerRows, Layers, find_layers
from opcd.rollouts.packing import PackedLinear, load_weights, pack_linears
from opcd.sharding import whole
from opcd.types import Rollout

PASS_TOKENS = 64
"""Reading so many tokens takes about as long as one more pass for the next token of a few rows."""


class HFEngine:
    """Generates with transformers on the device of the model it copies."""

    def __init__(
        self,
        student: Any,
        base: Any,
        dtype: torch.dtype,
        end_ids: frozenset[int],
        batch_rows: int,
        prefixes: PrefixStore | None = None,
    ) -> None:
        """Note the models; a copy of the student is made when it is first asked.

        Args:
            student: the model in training; `use` copies what has moved, adapters merged.
            base: the model it started from (the same object, if only an adapter is trained);
                it answers itself, its adapter off.
            dtype: of the copy.
            end_ids: tokens that end a response.
            batch_rows: sequences decoded together.
            prefixes: what the base has read of shared openings, if its teacher keeps them too.
        """
        self._student = student
        self._base = base
        self._dtype = dtype
        self._end_ids = end_ids
        self._batch_rows = batch_rows
        self._policy: Policy | None = None
        self._copy: Any = None
        self._packed: dict[str, PackedLinear] = {}
        self._layers: dict[int, Layers | None] = {}
        """By the id of a model that has answered: its layers, if they can be called one by one."""
        self._copied: tuple[Policy, int, int] | None = None
        """Whose weights the copy has: the version, and how often they were written to. Training
        gives each step a version, but weights may also be loaded in between."""
        self._prefixes: dict[Policy, PrefixStore] = {
            "base": prefixes or PrefixStore(base, self._read_base)
        }

    @torch.no_grad()
    def use(self, policy: Policy, version: int) -> None:
        """Answer as the student of this version, or as the base model.

        Where weights are in shards, every process has to ask for the same at the same time.
        """
        self._policy = policy
        if policy == "base" and not in_shards(self._base):
            return
        moved = writes_to(self._student)
        copied = ("student", version, moved) if policy == "student" else ("base", 0, 0)
        if self._copied == copied:
            return
        if self._copy is None:
            self._copy = self._make_copy()
            read, most_bytes = partial(read_prefix, self._copy), self._prefixes["base"].most_bytes
            self._prefixes["student"] = PrefixStore(self._copy, read, most_bytes)
            if in_shards(self._base):
                self._prefixes["base"] = PrefixStore(self._copy, read, most_bytes)
        source = self._student if policy == "student" else self._base
        weights = ((name, whole(weight)) for name, weight in merged_weights(source, policy))
        load_weights(self._copy, self._packed, weights)
        self._copied = copied
        if policy == "student":
            self._prefixes["student"].clear()

    def rest(self) -> None:
        """Let go of the weights that the next version will bring anew."""
        if self._packed:
            self._copied = None
            self._prefixes["student"].clear()
        for layer in self._packed.values():
            layer.load(None)

    def _make_copy(self) -> Any:
        plain = causal_model(self._student)
        # `use` gives it all of its weights, so it draws none: that would take 4 s.
        with no_init_weights():
            copy: Any = AutoModelForCausalLM.from_config(plain.config, dtype=self._dtype)
        copy.to(plain.device).eval().requires_grad_(False)
        share_frozen(self._student, copy)
        shared = {weight.data_ptr() for weight in plain.parameters()}
        head = copy.get_output_embeddings()
        self._packed = pack_linears(copy, {*shared, head.weight.data_ptr()})
        return copy

    @property
    def _model(self) -> Any:
        """What answers: for the base, a wrapper whose adapter has to be off.

        A base whose weights are in shards cannot answer; the copy has its weights then.
        """
        return self._base if self._policy == "base" and not in_shards(self._base) else self._copy

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """One response for each prompt, in their order."""
        assert self._policy, "use() says with which weights to answer"
        if not prompts:
            return []
        rollouts: dict[int, Rollout] = {}
        for part, prefixes in self._batches(prompts):
            cuts = [prefix.tokens for prefix in prefixes] or [0] * len(part)
            rows = [
                replace(prompts[index], ids=prompts[index].ids[cut:])
                for index, cut in zip(part, cuts, strict=True)
            ]
            with self._answering():
                told = self._model, rows, sampling, self._end_ids, prefixes
                answers = decode(*told, self._find_layers())
            rollouts |= zip(part, answers, strict=True)
        return [rollouts[index] for index in range(len(prompts))]

    def _find_layers(self) -> Layers | None:
        """Those of what answers now; looked at once, since only their weights move."""
        model = self._model
        if id(model) not in self._layers:
            self._layers[id(model)] = find_layers(model)
        return self._layers[id(model)]

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], list[SharedPrefix]]]:
        """Which prompts are answered together, and what of each was read apart, if anything."""
        assert self._policy, "use() says with which weights to answer"
        store, full = self._prefixes[self._policy], [prompt.ids for prompt in prompts]
        cuts = [0] * len(full) if why_no_prefix(self._model) else cut_prompts(prompts)
        openings = [ids[:cut] for ids, cut in zip(full, cuts, strict=True)]
        order = sorted(range(len(full)), key=lambda i: (openings[i], len(full[i]) - cuts[i]))
        ordered, uses = [openings[index] for index in order], Counter(openings)
        most_rows = self._batch_rows
        for part in in_passes(ordered, most_rows, store.most_tokens, most_rows):
            read = {
                ids: store.get(ids, keep=uses[ids] > 1)
                for ids in dict.fromkeys(ordered[place] for place in part)
                if ids
            }
            behind = [read[ordered[place]] for place in part] if read else []
            yield [order[place] for place in part], behind

    @torch.no_grad()
    def _read_base(self, ids: Ids) -> SharedPrefix:
        with self._answering():
            return read_prefix(self._base, ids)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        off = adapter_off(self._model) if self._policy == "base" else nullcontext()
        with at_rest(self._model), off:
            yield


def cut_prompts(prompts: Sequence[Prompt]) -> list[int]:
    """How many tokens of each prompt are read apart: those of its group's opening.

    Long prompts in no group are read apart too, in pieces: in a batch they would have a mask of
    `[S, S]` for each row.
    """
    whole = [prompt.ids for prompt in prompts]
    cuts = find_openings(whole)
    openings = Counter(ids[:cut] for ids, cut in zip(whole, cuts, strict=True) if cut)
    saved = sum((count - 1) * len(ids) for ids, count in openings.items())
    passes = max((prompt.max_new_tokens for prompt in prompts), default=0)
    if 0 in cuts and saved < PASS_TOKENS * passes:
        # Prompts that are cut and prompts that are not are answered apart.
        cuts = [0] * len(whole)
    long = [len(ids) > PREFILL_TOKENS for ids in whole]
    return [cut or (len(whole[i]) - 1) * long[i] for i, cut in enumerate(cuts)]


class CachedRows:
    """Rows that are being answered, as transformers reads any model, with its own cache."""

    def __init__(self, model: Any, prefixes: Sequence[SharedPrefix] = ()) -> None:
        """No tokens yet, but what each row has in front of its own, if that was read before."""
        self._model = model
        self._prefixes = list(prefixes)
        plain = causal_model(model)
        self._device, self._cache = plain.device, DynamicCache(config=plain.config)
        self._mask_BS = torch.empty(0)

    def read(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Read what the rows begin with; the hidden state at the last token of each, `_BD`."""
        ids_BS, self._mask_BS = pad_left(rows, self._device)
        return self._advance(ids_BS)

    def write(self, tokens_B: Tensor) -> Tensor:
        """Read one more token of each row; its hidden states, `_BD`."""
        ids_B1 = tokens_B.unsqueeze(-1)
        self._mask_BS = torch.cat([self._mask_BS, torch.ones_like(ids_B1)], dim=-1)
        return self._advance(ids_B1)

    def keep(self, kept: Sequence[int]) -> None:
        """Go on with some of the rows."""
        kept_B: Any = torch.tensor(kept, device=self._device)
        # Beam search's way, since the other forgets the states of linear attention.
        self._cache.reorder_cache(kept_B)
        self._mask_BS = self._mask_BS[kept_B]
        self._prefixes = [self._prefixes[row] for row in kept] if self._prefixes else []

    def _advance(self, ids_BS: Tensor) -> Tensor:
        """Hidden states at the last of some more tokens of each row, `_BD`."""
        model, mask_BS, cache = self._model, self._mask_BS, self._cache
        if self._prefixes:
            return forward_after_prefix(model, self._prefixes, ids_BS, mask_BS, cache)[:, -1]
        positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
        decoder = causal_model(model).get_decoder()
        return decoder(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=positions_BS,
            **keeping_in(cache, decoder),
        ).last_hidden_state[:, -1]


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    end_ids: frozenset[int],
    prefixes: Sequence[SharedPrefix] = (),
    layers: Layers | None = None,
) -> list[Rollout]:
    """Answer one batch; rows that have ended leave it.

    Args:
        model: whose weights answer.
        prompts: what each row has after its prefix.
        sampling: how tokens are drawn.
        end_ids: tokens that end a response.
        prefixes: what each row has in front of it, if that was read before.
        layers: the model's own, if they can be called one by one.
    """
    head = output_head(model)
    reader = LayerRows(layers, prefixes) if layers else CachedRows(model, prefixes)
    most = max(prompt.max_new_tokens for prompt in prompts)
    uniforms_BT = torch.stack([sampling.uniforms(prompt, most) for prompt in prompts])
    responses: list[list[int]] = [[] for _ in prompts]
    states: list[list[Tensor]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    hidden_BD = reader.read([prompt.ids for prompt in prompts])
    for step in range(most):
        tokens_B = choose(head(hidden_BD), uniforms_BT[active, step], sampling)
        tokens = tokens_B.tolist()
        for row, token, hidden_D in zip(active, tokens, hidden_BD, strict=True):
            responses[row].append(token)
            if prompts[row].keep_hidden:
                states[row].append(hidden_D.clone())
        keep = [
            i
            for i, (row, token) in enumerate(zip(active, tokens, strict=True))
            if token not in end_ids and step + 1 < prompts[row].max_new_tokens
        ]
        if not keep:
            break
        if len(keep) < len(active):
            reader.keep(keep)
            tokens_B, active = tokens_B[keep], [active[i] for i in keep]
        hidden_BD = reader.write(tokens_B)
    return [
        Rollout(
            prompt.task_id,
            tuple(response),
            finished=response[-1] in end_ids,
            hidden_TD=torch.stack(kept) if kept else None,
        )
        for prompt, response, kept in zip(prompts, responses, states, strict=True)
    ]


def choose(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row: the likeliest, or the one that the uniform number falls on.

    The inverse of the cumulative distribution, summed in float64 where the device has it, so that a
    draw is a function of its number alone.
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1)
    precise = torch.float32 if logits_BV.device.type == "mps" else torch.float64
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    probs_BV = logits_BV.softmax(-1)
    if sampling.top_k or sampling.top_p < 1.0:
        probs_BV = likeliest(probs_BV, sampling, precise)
    cumulative_BV = probs_BV.cumsum(-1, dtype=precise)
    target_B1 = uniforms_B.to(cumulative_BV).unsqueeze(-1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)


def likeliest(probs_BV: Tensor, sampling: Sampling, precise: torch.dtype) -> Tensor:
    """The probabilities of the first `top_k` tokens, of those the first `top_p`, of others 0."""
    sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1.0:
        before_BV = sorted_BV.cumsum(-1, dtype=precise) - sorted_BV
        mass_B1 = sorted_BV.sum(-1, keepdim=True, dtype=precise)
        # A token stays while the mass of those before it is below top_p: the first always does.
        sorted_BV = sorted_BV.masked_fill(before_BV >= sampling.top_p * mass_B1, 0.0)
    return probs_BV.scatter(-1, order_BV, sorted_BV)


def pad_left(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids as one batch that ends where each row ends, and its mask: `_BS` both."""
    width = padded_width(rows)
    ids = [(0,) * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
