"""The models of the lab: small Llamas that have read nothing but the documents of the lab.

They are trained from scratch once, from a fixed seed, and kept in the user's cache. Reading facts
takes a network long to find out by itself, so it is begun with what it would find: heads that look
one, two, three tokens back, and heads that look for where the present token was seen before and
what came after it (Olsson et al. 2022 call them induction heads). All weights are trained.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from opcd.config.games import Boards, FrozenLake
from opcd.envs.games import boards_of
from opcd.lab import documents
from opcd.lab import language as words
from opcd.lab.documents import IGNORED, Document
from opcd.lab.lakes import Lake, lake_of
from opcd.weights import auto_dtype, cache_folder, flushed_denormals

LAKE = FrozenLake(
    size=4,
    holes=4,
    turns=words.TURNS,
    rules=False,
    boards=Boards(train=210, extraction=10, validation=40, test=120),
)
"""The game of the lab; models read documents about its train boards only."""
MIX = {"book": 4, "rules": 14, "lake": 48, "lesson": 9}
"""Documents of each kind in a step."""
WEIGHT = {"book": 1.0, "rules": 1.0, "lake": 2.0, "lesson": 1.0}
ROLE_WEIGHT = 0.5
"""Of the labels that say what each cell of a board is."""
THETA = 1000.0
EMBEDDING_SCALE = 0.2
MATCH_SCALE = 1.7
OFFSET_LOGITS = 30.0

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Mind:
    """A size, and how long it is trained."""

    name: str
    width: int
    layers: int
    heads: int
    steps: int
    lr: float
    seed: int = 0


LARGE = Mind("large", width=96, layers=4, heads=3, steps=540, lr=3e-3)
MIDDLE = Mind("middle", width=72, layers=3, heads=3, steps=400, lr=3e-3)
SMALL = Mind("small", width=48, layers=2, heads=3, steps=400, lr=3e-3)
MINDS = {mind.name: mind for mind in (LARGE, MIDDLE, SMALL)}
"""A teacher, which is a student of its own too, and two sizes of student below it."""


def mind_folder(mind: Mind, say: Say = lambda _: None) -> Path:
    """The folder of a trained model; trains it first if it is not in the cache."""
    folder = cache_folder() / f"lab-{mind.name}-{_digest(mind)}"
    if not folder.is_dir():
        say(f"training the {mind.name} model of the lab; this happens once")
        model = train(mind, say)
        draft = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(draft, ignore_errors=True)
        model.save_pretrained(draft)
        words.build_tokenizer().save_pretrained(draft)
        try:
            draft.replace(folder)
        except OSError:
            # Another process may have trained the same mind meanwhile: that one is as good.
            shutil.rmtree(draft)
            if not folder.is_dir():
                raise
    return folder


def train(mind: Mind, say: Say = lambda _: None) -> Any:
    """Train a model from scratch; a function of the mind alone, up to rounding."""
    with torch.random.fork_rng(devices=[]), flushed_denormals():
        torch.manual_seed(mind.seed)
        model = begin(mind)
        # For rows this short, attention as plain products has the quicker backward pass.
        model.set_attn_implementation("eager")
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=mind.lr, betas=(0.9, 0.98), weight_decay=0.1
        )
        lakes, random, started = train_lakes(), Random(mind.seed), time.monotonic()
        for step in range(mind.steps):
            for group in optimizer.param_groups:
                group["lr"] = mind.lr * min((step + 1) / 30, max(0.03, 1 - step / mind.steps))
            losses = {}
            for family, count in MIX.items():
                drawn = documents.draw_documents(family, count, lakes, random)
                with torch.autocast("cpu", torch.bfloat16, enabled=_is_bfloat16_native()):
                    loss_nats = loss_of(model, drawn)
                (loss_nats * WEIGHT[family] / len(MIX)).backward()
                losses[family] = loss_nats.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 25 == 0:
                told = ", ".join(f"{family} {nats:.2f}" for family, nats in losses.items())
                wall_s = time.monotonic() - started
                say(f"step {step + 1} of {mind.steps}, {wall_s:.0f} s, nats a token: {told}")
    model.set_attn_implementation("sdpa")
    return model.eval()


def train_lakes() -> list[Lake]:
    """The train boards of the game, each as it is and mirrored at its diagonal."""
    found: list[Lake] = []
    for picture in boards_of(LAKE)["train"]:
        mirrored = tuple("".join(row[column] for row in picture) for column in range(4))
        found += [lake_of(one) for one in dict.fromkeys((picture, mirrored))]
    return found


def begin(mind: Mind) -> Any:
    """A model before its first step: random, but for the heads that reading begins with."""
    config = LlamaConfig(
        vocab_size=len(words.VOCABULARY),
        hidden_size=mind.width,
        intermediate_size=3 * mind.width,
        num_hidden_layers=mind.layers,
        num_attention_heads=mind.heads,
        num_key_value_heads=mind.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        _set_heads(model, mind)
    return model


def loss_of(model: Any, drawn: Sequence[Document]) -> Tensor:
    """Mean nats of the wanted tokens, and of what each cell of a board is."""
    ids_BS, labels_BS = pad(drawn)
    wanted_BS = labels_BS != IGNORED
    hidden_TD = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state[wanted_BS]
    labels_T = labels_BS[wanted_BS]
    nats_T = cross_entropy(model.lm_head(hidden_TD).float(), labels_T, reduction="none")
    roles = torch.tensor([words.VOCABULARY[role] for role in words.ROLES])
    is_role_T = torch.isin(labels_T, roles) & (not _are_lessons(drawn))
    loss_nats = nats_T[~is_role_T].mean()
    return loss_nats + ROLE_WEIGHT * nats_T[is_role_T].mean() if is_role_T.any() else loss_nats


def pad(drawn: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """`ids_BS` and `labels_BS`, padded at their ends."""
    longest = max(len(document.ids) for document in drawn)
    ids_BS = torch.zeros(len(drawn), longest, dtype=torch.long)
    labels_BS = torch.full((len(drawn), longest), IGNORED)
    for row, document in enumerate(drawn):
        ids_BS[row, : len(document.ids)] = torch.tensor(document.ids)
        labels_BS[row, : len(document.labels)] = torch.tensor(document.labels)
    return ids_BS, labels_BS


def _are_lessons(drawn: Sequence[Document]) -> bool:
    """Whether the documents are lessons, in which a role is a word that is written."""
    return words.VOCABULARY[words.LESSONS] in drawn[0].ids


def _set_heads(model: Any, mind: Mind) -> None:
    width, size = mind.width, mind.width // mind.heads
    frequency = THETA ** (-torch.arange(0, size, 2) / size)
    # A match has to hold over hundreds of tokens: only what turns slowly takes part.
    slow = (frequency < 0.02).float().repeat(2)
    before, own = (torch.linalg.qr(torch.randn(width, width))[0][:size] for _ in range(2))
    model.model.embed_tokens.weight.normal_(0, EMBEDDING_SCALE)
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    scale = (OFFSET_LOGITS * 16 / size) ** 0.5
    for head in range(mind.heads):
        rows = slice(head * size, (head + 1) * size)
        turned = (head + 1) * frequency
        first.k_proj.bias[rows] = scale * torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
        first.q_proj.bias[rows] = scale * torch.cat([turned.cos(), -turned.sin()])
    first.v_proj.weight[:size] = own
    first.o_proj.weight[:, :size] = before.T * EMBEDDING_SCALE
    for head in range(max(1, mind.heads // 2)):
        rows = slice(head * size, (head + 1) * size)
        second.q_proj.weight[rows] = own * MATCH_SCALE * slow[:, None]
        second.k_proj.weight[rows] = before * MATCH_SCALE * slow[:, None]
        copied = torch.linalg.qr(torch.randn(width, width))[0][:size]
        second.v_proj.weight[rows] = copied
        second.o_proj.weight[:, rows] = copied.T * EMBEDDING_SCALE


def _is_bfloat16_native() -> bool:
    """Whether products in bfloat16 are the quick ones here; weights stay in float32 either way."""
    return auto_dtype("auto", torch.device("cpu")) == torch.bfloat16


def _digest(mind: Mind) -> str:
    """Changes with everything the weights depend on: the mind, the language, the documents."""
    random, lakes = Random(0), train_lakes()
    drawn = [documents.draw_documents(family, 9, lakes, random) for family in MIX]
    ids = [document.ids + document.labels for several in drawn for document in several]
    settings = (
        _is_bfloat16_native(),
        MIX,
        WEIGHT,
        ROLE_WEIGHT,
        THETA,
        EMBEDDING_SCALE,
        MATCH_SCALE,
        OFFSET_LOGITS,
    )
    text = repr((asdict(mind), settings, list(words.VOCABULARY), ids))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
