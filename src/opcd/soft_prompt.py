"""A soft prompt to compare with: vectors in front of the prompt, trained on the same teacher.

Forward KL to the teacher along the teacher's own answers to train rows; nothing else in the model
moves. When it answers, its keys and values are read once, as those of a shared context are.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import DynamicCache

from opcd.adapters import causal_model, trainable
from opcd.assembly import Parts
from opcd.attention import attend_by, keeping_in
from opcd.batching import Side, collate
from opcd.chunking import chunked_stats
from opcd.config.training import ExactSupport
from opcd.distill import cut_portions, weigh
from opcd.drawing import prompt_of
from opcd.items import Item
from opcd.models import PLAIN_ATTENTION_TOKENS, output_head
from opcd.prefix_cache import SharedPrefix, keep_prefix
from opcd.remote import RemoteTeacher
from opcd.responses import Response, grade
from opcd.rollouts.engine import Sampling
from opcd.rollouts.hf import decode
from opcd.tasks import draw
from opcd.types import Answered

VIRTUAL_TOKENS = 16
LEARNING_RATE = 1e-2
"""Of the vectors, at the first step; falls to 0 in a line."""


def train_soft_prompt(parts: Parts, model: Any, steps: int) -> PeftModel:
    """Train a soft prompt for a plain model, on as many teacher's answers a step as the run.

    Args:
        parts: the run's tasks and teacher.
        model: the plain base model; its weights stay as they are.
        steps: optimiser steps.
    """
    with torch.random.fork_rng(devices=[]):
        tuned: Any = get_peft_model(
            model,
            PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL_TOKENS),
        )
    (weight_PD,) = trainable(tuned).values()
    with torch.no_grad():
        weight_PD.copy_(first_vectors(parts, model))
    optimizer = torch.optim.Adam([weight_PD], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0 - done / steps)
    for answered in answer_as_teacher(parts, steps):
        optimizer.zero_grad()
        accumulate(parts, tuned, answered)
        optimizer.step()
        schedule.step()
    return tuned


def first_vectors(parts: Parts, model: Any) -> Tensor:
    """The embeddings of tokens spread evenly over the first train row's prompt with context."""
    ids = parts.items["train"][0].pair.teacher_ids
    chosen = [ids[index * len(ids) // VIRTUAL_TOKENS] for index in range(VIRTUAL_TOKENS)]
    embeddings = model.get_input_embeddings()
    return embeddings(torch.tensor(chosen, device=model.device))


def answer_as_teacher(parts: Parts, steps: int) -> list[list[Answered]]:
    """The train rows of each step as the run drew them, with answers of the teacher's."""
    config = parts.config
    # A teacher that moves began as the base model, which still answers as itself.
    engine = parts.engine if parts.teacher.moves else parts.teacher_engine
    engine.use("base", 0)
    drawn = [
        (step, item.pair)
        for step in range(steps)
        for item in draw(parts.items["train"], config.tasks_per_step, step, config.seed)
    ]
    prompts = [prompt_of(config, pair, True, f"/{step}") for step, pair in drawn]
    sampling = Sampling(config.rollout.temperature, config.rollout.top_p, f"{config.seed}/soft")
    found: list[list[Answered]] = [[] for _ in range(steps)]
    for (step, pair), rollout in zip(drawn, engine.generate(prompts, sampling), strict=True):
        found[step].append(Answered(pair, rollout))
    return found


def accumulate(parts: Parts, tuned: Any, answered: Sequence[Answered]) -> float:
    """Gradients of one step's loss, portion by portion; returns the loss in nats."""
    loss = parts.config.loss.model_copy(
        update={"direction": "forward_kl", "warmup": None, "support": ExactSupport()}
    )
    teacher = parts.teacher
    if isinstance(teacher, RemoteTeacher) or teacher.moves:
        teacher = parts.base
    by_sequence = loss.reduction == "sequence"
    total = len(answered) if by_sequence else sum(len(a.rollout.response_ids) for a in answered)
    sum_nats = 0.0
    for portion in cut_portions(answered, parts.config.batch.rows_per_forward):
        pairs, rollouts = [a.pair for a in portion], [a.rollout for a in portion]
        batch = collate(pairs, rollouts).to(parts.accelerator.device)
        stats = chunked_stats(
            hidden_behind(tuned, batch.student),
            output_head(tuned),
            teacher.hidden(batch.teacher),
            teacher.head,
            batch.response_T,
            loss,
        )
        loss_nats = (stats.divergence_T / weigh(batch.length_T, loss)).sum() / total
        loss_nats.backward()
        sum_nats += loss_nats.item()
    return sum_nats


def hidden_behind(tuned: Any, side: Side) -> Tensor:
    """`hidden_TD` at the response positions, behind the soft prompt, with its gradient."""
    model = causal_model(tuned)
    own_BSD = model.get_input_embeddings()(side.ids_BS)
    soft_BPD = tuned.get_prompt(batch_size=len(side.ids_BS)).to(own_BSD.dtype)
    whole_BSD = torch.cat([soft_BPD, own_BSD], dim=1)
    # As in training: a CPU's fused attention is slow to differentiate in bfloat16.
    short = whole_BSD.shape[1] <= PLAIN_ATTENTION_TOKENS
    plain = short and whole_BSD.device.type == "cpu"
    with attend_by(model, "eager") if plain else nullcontext():
        hidden_BSD = model.get_decoder()(inputs_embeds=whole_BSD, use_cache=False).last_hidden_state
    return hidden_BSD[side.row_T, side.column_T + soft_BPD.shape[1]]


@torch.no_grad()
def read_soft_prompt(tuned: Any) -> SharedPrefix:
    """Keys and values of the soft prompt, which all prompts begin with."""
    model = causal_model(tuned)
    cache = DynamicCache(config=model.config)
    soft_1PD = tuned.get_prompt(batch_size=1).to(model.dtype)
    decoder = model.get_decoder()
    decoder(inputs_embeds=soft_1PD, **keeping_in(cache, decoder))
    # Virtual tokens have no ids.
    return keep_prefix(model, cache, (-1,) * soft_1PD.shape[1])


def respond_behind(
    parts: Parts, tuned: Any, items: Sequence[Item], end_ids: frozenset[int]
) -> list[Response]:
    """One graded greedy response to each task, without the context, behind the soft prompt."""
    prefix, rows, found = read_soft_prompt(tuned), parts.config.rollout.batch_rows, []
    for start in range(0, len(items), rows):
        part = items[start : start + rows]
        prompts = [prompt_of(parts.config, item.pair, with_context=False) for item in part]
        rollouts = decode(
            causal_model(tuned), prompts, Sampling(), end_ids, [prefix] * len(prompts)
        )
        for item, rollout in zip(part, rollouts, strict=True):
            found.append(grade(parts, item, Answered(item.pair, rollout)))
    return found
