"""On-policy context distillation: the loop.

    L = E_{x ~ tasks, y ~ student(.|x)}  1/|y| sum_t D( student(.|x, y<t), teacher(.|c, x, y<t) )

One step: draw tasks and anchors; the student answers them without the context; the teacher, who
sees it, scores those very tokens; one optimiser step towards the teacher.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from opcd.adapters import trainable
from opcd.assembly import AHEAD_STEPS, Item, Parts
from opcd.batching import Batch, collate
from opcd.config import Run
from opcd.config.training import Direction, Loss
from opcd.divergence import TokenStats
from opcd.errors import DivergedError, RolloutError
from opcd.rollouts.engine import Prompt, RolloutEngine, Sampling
from opcd.tally import Tally, peak_bytes, release_memory
from opcd.tasks import draw
from opcd.teachers import LocalTeacher
from opcd.types import Answered, Origin, PromptPair


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    metrics: dict[str, Any]
    """One row of `metrics.jsonl`."""
    answered: Sequence[Answered]


@dataclass
class Trainer:
    """What training moves, beside the student itself."""

    optimizer: Any
    scheduler: Any
    step: int = 0
    """Steps done."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite; they left the weights as they were."""


def distill(parts: Parts, trainer: Trainer) -> Iterator[StepReport]:
    """Train until `steps` are done, one report a step.

    Raises:
        DivergedError: more steps than allowed were not finite.
        RolloutError: too many responses were cut.
    """
    while trainer.step < parts.config.steps:
        tally = Tally()
        with tally.timed("wall_s"):
            with tally.timed("rollout_s"):
                answered = roll_out(parts, trainer.step)
            count_rollouts(parts, answered, tally)
            loss = loss_at(parts.config.loss, trainer.step)
            accumulate(parts, answered, loss, tally)
            with tally.timed("train_s"):
                lr = update(parts, trainer, tally)
                release_memory()
        yield StepReport(summarise(trainer, tally, loss.direction, lr), answered)


def roll_out(parts: Parts, step: int) -> list[Answered]:
    """Draw this process's tasks and anchors of a step, and have them answered.

    The first `teacher_fraction` of each is answered by their teachers (off-policy), the rest by
    the student.
    """
    answered = answer_as_teacher(parts, step)
    _, asked = draw_pairs(parts, step)
    if not asked:
        return answered
    config = parts.config
    parts.engine.use("student", step)
    sampling = Sampling(config.rollout.temperature, config.rollout.top_p, f"{config.seed}/{step}")
    return answered + answer(config, parts.engine, asked, sampling)


def draw_pairs(parts: Parts, step: int) -> tuple[list[PromptPair], list[PromptPair]]:
    """This process's prompts of a step: those that their teachers answer, and the student's."""
    config, fraction = parts.config, teacher_fraction_at(parts.config, step)
    tasks = draw(parts.items["train"], config.tasks_per_step, step, config.seed)
    bare = config.bare_anchors_per_step
    anchors = parts.anchors.draw(config.anchors_per_step, f"{config.seed}/{step}", bare)
    # What the base says with the context is what is to be kept, so it gives the answers as well.
    taught = [with_context_on_both_sides(i.pair) for i in draw_returned(parts, step)]
    asked: list[PromptPair] = []
    for pairs in (
        [item.pair for item in tasks[parts.own_share]],
        parts.render_anchors(anchors[parts.own_share]),
    ):
        cut = round(len(pairs) * fraction)
        taught += pairs[:cut]
        asked += pairs[cut:]
    return taught, asked


def draw_returned(parts: Parts, step: int) -> list[Item]:
    """This process's tasks of a step that are given with the context."""
    config = parts.config
    turn, waits = divmod(step, config.anchor.return_every_steps)
    if waits:
        return []
    count = config.returns_per_step * config.anchor.return_every_steps
    return draw(parts.items["train"], count, turn, config.seed + 1)[parts.own_share]


def with_context_on_both_sides(pair: PromptPair) -> PromptPair:
    """A task whose student sees the context too, and should answer as its base would."""
    ids = pair.teacher_ids
    return PromptPair(f"{pair.task_id}/context_return", ids, ids, "context_return")


def answer_as_teacher(parts: Parts, step: int) -> list[Answered]:
    """The prompts of a step that their teachers answer, with the responses.

    Those teachers stand still, so they answer the prompts of `AHEAD_STEPS` steps at a time: many
    rows cost little more than few. Where the windows begin does not depend on where a run was
    resumed.
    """
    config = parts.config
    if step not in parts.ahead:
        start = step - step % AHEAD_STEPS
        steps = range(start, min(start + AHEAD_STEPS, config.steps))
        parts.ahead = {s: [] for s in steps}
        taught = [(s, pair) for s in steps for pair in draw_pairs(parts, s)[0]]
        sampling = Sampling(config.rollout.temperature, config.rollout.top_p, str(config.seed))
        engines: dict[Origin, RolloutEngine] = dict.fromkeys(get_args(Origin), parts.engine)
        engines["task"] = parts.teacher_engine
        groups: dict[tuple[int, bool], list[tuple[int, PromptPair]]] = {}
        for s, pair in taught:
            # Anchors apart: all other prompts begin with the context, which is then read once.
            key = id(engines[pair.origin]), pair.origin == "anchor"
            groups.setdefault(key, []).append((s, pair))
        for mine in groups.values():
            engine = engines[mine[0][1].origin]
            engine.use("base", 0)
            prompts = [
                replace(prompt_of(config, pair, True, f"/{s}"), keep_hidden=parts.keeps_hidden)
                for s, pair in mine
            ]
            for (s, pair), rollout in zip(mine, engine.generate(prompts, sampling), strict=True):
                parts.ahead[s].append(Answered(pair, rollout))
    return parts.ahead[step]


def answer(
    config: Run,
    engine: RolloutEngine,
    pairs: Sequence[PromptPair],
    sampling: Sampling,
    with_context: bool = False,
    max_new_tokens: int | None = None,
) -> list[Answered]:
    """Each pair with a response to its student prompt, or to its teacher prompt.

    As long as the run lets it be, unless `max_new_tokens` says otherwise.
    """
    prompts = [prompt_of(config, pair, with_context) for pair in pairs]
    if max_new_tokens:
        prompts = [replace(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    rollouts = engine.generate(prompts, sampling)
    return [Answered(pair, rollout) for pair, rollout in zip(pairs, rollouts, strict=True)]


def prompt_of(config: Run, pair: PromptPair, with_context: bool, draw: str = "") -> Prompt:
    """What an engine is asked: one side of a pair, and how long the response may be."""
    of_anchors = pair.origin == "anchor"
    most = config.anchor.max_new_tokens if of_anchors else config.rollout.max_new_tokens
    ids = pair.teacher_ids if with_context else pair.student_ids
    return Prompt(pair.task_id, ids, most, draw)


def count_rollouts(parts: Parts, answered: Sequence[Answered], tally: Tally) -> None:
    """Count tokens and cut responses of the tasks.

    Raises:
        RolloutError: more were cut than `rollout.max_truncated_fraction`.
    """
    tasks = [a.rollout for a in answered if a.pair.origin == "task"]
    tally.add("sequences", len(answered))
    tally.add("tasks", len(tasks))
    tally.add("truncated", sum(not rollout.finished for rollout in tasks))
    tally.add("response_tokens", sum(len(rollout.response_ids) for rollout in tasks))
    tally.add("tokens", sum(len(a.rollout.response_ids) for a in answered))
    tally.gather(parts.accelerator)
    allowed = parts.config.rollout.max_truncated_fraction
    if (found := tally.mean("truncated", "tasks")) > allowed:
        raise RolloutError(
            f"{found:.0%} of a step's responses were cut after "
            f"{parts.config.rollout.max_new_tokens} tokens, but at most {allowed:.0%} are allowed; "
            "raise rollout.max_new_tokens or rollout.max_truncated_fraction"
        )


def teacher_fraction_at(config: Run, step: int) -> float:
    """The share of a step's prompts that their teachers answer."""
    warmup = config.loss.warmup
    if warmup is None or step >= warmup.steps or warmup.teacher_fraction is None:
        return config.rollout.teacher_fraction
    return warmup.teacher_fraction


def loss_at(loss: Loss, step: int) -> Loss:
    """The loss of a step: with the direction of the warm-up while that lasts."""
    if loss.warmup and step < loss.warmup.steps:
        return loss.model_copy(update={"direction": loss.warmup.direction})
    return loss


def accumulate(parts: Parts, answered: Sequence[Answered], loss: Loss, tally: Tally) -> None:
    """Forward and backward over all responses, in portions that share a teacher.

    Sums are divided once, by the count over all portions and processes.
    """
    accelerator = parts.accelerator
    portions = cut_portions(answered, parts.config.batch.rows_per_forward)
    total = tally.sums["sequences" if loss.reduction == "sequence" else "tokens"]
    parts.distiller.train()
    for portion in portions:
        teacher, batch = batch_of(parts, portion)
        with tally.timed("teacher_s"):
            teacher_TD = teacher_states(teacher, portion, batch)
        waits = portion is not portions[-1]
        with (
            tally.timed("train_s"),
            accelerator.no_sync(parts.distiller) if waits else nullcontext(),
        ):
            stats = parts.distiller(batch, teacher_TD, teacher.head, loss)
            loss_nats = (stats.divergence_T / weigh(batch.length_T, loss)).sum() / total
            # Data-parallel training averages over processes; the total is over all of them.
            accelerator.backward(loss_nats * accelerator.num_processes)
        tally.add("loss_nats", loss_nats.item())
        add_stats(tally, stats, portion[0].pair.origin)


def batch_of(parts: Parts, portion: Sequence[Answered]) -> tuple[LocalTeacher, Batch]:
    """Who scores a portion of one origin, and its batch, without what that teacher has read."""
    origin = portion[0].pair.origin
    teacher = parts.teacher if origin == "task" else parts.base
    # The context opens all prompts but those of anchors.
    prefix_tokens = teacher.prefix_tokens if origin != "anchor" else 0
    batch = collate([a.pair for a in portion], [a.rollout for a in portion], prefix_tokens)
    return teacher, batch.to(parts.accelerator.device)


def teacher_states(teacher: LocalTeacher, portion: Sequence[Answered], batch: Batch) -> Tensor:
    """The teacher's hidden states at the response tokens, `hidden_TD`.

    A response that the teacher gave itself, standing still, has them already.
    """
    kept = [a.rollout.hidden_TD for a in portion]
    if any(hidden_TD is None for hidden_TD in kept):
        return teacher.hidden(batch.teacher)
    return torch.cat(kept)


def cut_portions(answered: Sequence[Answered], rows: int) -> list[list[Answered]]:
    """At most `rows` at a time and equally many, of one origin and of similar length."""
    portions: list[list[Answered]] = []
    for origin in get_args(Origin):
        same = [a for a in answered if a.pair.origin == origin]
        same.sort(key=lambda a: len(a.pair.student_ids) + len(a.rollout.response_ids))
        count = math.ceil(len(same) / rows)
        bounds = [round(part * len(same) / max(count, 1)) for part in range(count + 1)]
        portions += [same[start:end] for start, end in pairwise(bounds)]
    return portions


def weigh(length_T: Tensor, loss: Loss) -> Tensor:
    """What each token's divergence is divided by: its response's length, or one."""
    return length_T if loss.reduction == "sequence" else torch.ones_like(length_T)


def update(parts: Parts, trainer: Trainer, tally: Tally) -> float:
    """One optimiser step, unless something is not finite; returns the learning rate used.

    Raises:
        DivergedError: that has happened more often than `optimizer.max_nonfinite_steps`.
    """
    config, weights = parts.config.optimizer, list(trainable(parts.distiller).values())
    tally.gather(parts.accelerator)
    clipped: Any = parts.accelerator.clip_grad_norm_(weights, config.clip_norm)
    norm = float(clipped)
    tally.sums["grad_norm"] = norm
    lr = trainer.optimizer.param_groups[0]["lr"]
    if math.isfinite(norm) and math.isfinite(tally.sums["loss_nats"]):
        trainer.optimizer.step()
        trainer.scheduler.step()
        parts.teacher.after_step(trainer.step)
    else:
        trainer.skipped_steps += 1
    trainer.optimizer.zero_grad()
    trainer.step += 1
    if trainer.skipped_steps > config.max_nonfinite_steps:
        raise DivergedError(
            f"{trainer.skipped_steps} steps had a loss or gradient that is not finite (the last: "
            f"loss {tally.sums['loss_nats']}, norm {norm}), but optimizer.max_nonfinite_steps = "
            f"{config.max_nonfinite_steps}; lower optimizer.lr. The last checkpoint is good"
        )
    return lr


def add_stats(tally: Tally, stats: TokenStats, origin: str) -> None:
    """Add the diagnostics of a portion's tokens to the step's sums."""
    prefix = "" if origin == "task" else f"{origin}_"
    tally.add(f"{prefix}kl_nats", stats.kl_T.sum().item())
    tally.add(f"{prefix}kl_tokens", len(stats.kl_T))
    if origin == "task":
        tally.add("entropy_nats", stats.entropy_T.sum().item())
        tally.add("student_mass", stats.student_mass_T.sum().item())
        tally.add("teacher_mass", stats.teacher_mass_T.sum().item())


def summarise(trainer: Trainer, tally: Tally, direction: Direction, lr: float) -> dict[str, Any]:
    """One row of `metrics.jsonl`; `step` counts from 0."""
    return {
        "step": trainer.step - 1,
        "kl_nats_per_token": tally.mean("kl_nats", "kl_tokens"),
        "anchor_kl_nats_per_token": tally.mean("anchor_kl_nats", "anchor_kl_tokens"),
        "context_return_kl_nats_per_token": tally.mean(
            "context_return_kl_nats", "context_return_kl_tokens"
        ),
        "loss_nats": tally.sums["loss_nats"],
        "direction": direction,
        "grad_norm": tally.sums["grad_norm"],
        "lr": lr,
        "skipped_steps": trainer.skipped_steps,
        "response_tokens": int(tally.sums["response_tokens"]),
        "tokens_per_response": tally.mean("response_tokens", "tasks"),
        "truncated_fraction": tally.mean("truncated", "tasks"),
        "student_entropy_nats": tally.mean("entropy_nats", "kl_tokens"),
        "student_mass_in_support": tally.mean("student_mass", "kl_tokens"),
        "teacher_mass_in_support": tally.mean("teacher_mass", "kl_tokens"),
        **tally.seconds,
        "peak_bytes": peak_bytes(),
    }
