"""On-policy context distillation: the loop.

    L = E_{x ~ tasks, y ~ student(.|x)}  1/|y| sum_t D( student(.|x, y<t), teacher(.|c, x, y<t) )

One step: draw tasks and anchors; the student answers them without the context (`drawing`); the
teacher, who sees it, scores those very tokens; one optimiser step towards the teacher.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch
from accelerate.utils import gather_object
from torch import Tensor

from opcd.adapters import trainable
from opcd.assembly import Parts
from opcd.batching import Batch, collate
from opcd.chunking import Hidden, TeacherScore
from opcd.coaching import coach_rollouts, count_empty
from opcd.config.rollouts import VllmRollout
from opcd.config.training import Direction, Loss
from opcd.divergence import TokenStats
from opcd.drawing import Rollouts, answer_as_teacher, roll_out
from opcd.errors import DivergedError, RolloutError
from opcd.launch import agreed, most
from opcd.remote import RemoteTeacher
from opcd.rollouts.engine import Resting
from opcd.sharding import summing_later, whole
from opcd.tally import Tally, release_memory
from opcd.teachers import LocalTeacher
from opcd.types import Answered, Origin
from opcd.zero import ZeroOptimizer


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    metrics: dict[str, Any]
    """One row of `metrics.jsonl`."""
    answered: Sequence[Answered]
    troubles: Sequence[str] = ()
    """What servers had to be asked again for, or given again."""


@dataclass
class Trainer:
    """What training moves, beside the student itself."""

    optimizer: Any
    scheduler: Any
    step: int = 0
    """Steps done."""
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite; they left the weights as they were."""
    owes_validation: bool = False
    """Whether the last step is still to be validated, since a server was gone then."""


def distill(parts: Parts, trainer: Trainer) -> Iterator[StepReport]:
    """Train until `steps` are done, one report a step.

    Raises:
        DivergedError: more steps than allowed were not finite.
        RolloutError: too many responses were cut, or the engine answers with other weights.
        ServerError: a server cannot be used any longer; the step left the weights as they were.
    """
    while trainer.step < parts.config.steps:
        tally = Tally()
        with tally.timed("wall_s"):
            with tally.timed("rollout_s"):
                rollouts = answer_step(parts, trainer.step)
                if isinstance(parts.engine, Resting):
                    parts.engine.rest()
                    release_memory()
            count_rollouts(parts, rollouts, tally)
            answered = rollouts.answered
            loss = loss_at(parts.config.loss, trainer.step)
            accumulate(parts, answered, loss, tally)
            check_engine(parts, tally)
            with tally.timed("train_s"):
                lr = update(parts, trainer, tally)
                release_memory()
        is_coached = parts.config.context.type == "coach"
        row = summarise(trainer, tally, loss.direction, lr, is_coached)
        troubles = troubles_of(parts)
        yield StepReport({**row, **servers_row(parts, tally, troubles)}, answered, troubles)


def answer_step(parts: Parts, step: int) -> Rollouts:
    """This process's prompts of a step with their responses.

    Raises:
        ServerError: a server is gone.
        RolloutError: the same, or a game that does not fit, in one of several processes; all of
            them are told.
    """
    # The teachers' answers first: what they meet is told before the engine is used again, which
    # all processes do together.
    agreed(parts.accelerator, lambda: answer_as_teacher(parts, step))
    return agreed(parts.accelerator, lambda: coach_rollouts(parts, roll_out(parts, step), step))


def count_rollouts(parts: Parts, rollouts: Rollouts, tally: Tally) -> None:
    """Count tokens and cut responses of the tasks, and how games went.

    Raises:
        RolloutError: more were cut than `rollout.max_truncated_fraction`, or none is left.
    """
    answered, played = rollouts.answered, rollouts.played
    tasks = [a.rollout for a in answered if a.pair.origin == "task"]
    tally.add("episodes", len(played.episodes) + len(played.dropped))
    tally.add("dropped_episodes", len(played.dropped) + len(rollouts.returned.dropped))
    tally.add("solved", sum(episode.outcome for episode in played.episodes))
    tally.add("invalid_moves", sum(episode.invalid_moves for episode in played.episodes))
    tally.add("coach_empty", count_empty(answered))
    tally.add("processes_without_samples", not answered)
    tally.add("sequences", len(answered))
    tally.add("tasks", len(tasks))
    tally.add("truncated", sum(not rollout.finished for rollout in tasks))
    tally.add("response_tokens", sum(len(rollout.response_ids) for rollout in tasks))
    tally.add("tokens", sum(len(a.rollout.response_ids) for a in answered))
    tally.gather(parts.accelerator)
    if tally.sums["processes_without_samples"]:
        raise RolloutError(
            "a process has no response to train on in a step, of whose episodes "
            f"{tally.sums['dropped_episodes']:.0f} were dropped, since their prompts did not fit; "
            "lower game.turns, or raise rendering.max_prompt_tokens or batch.prompts_per_step"
        )
    allowed = parts.config.rollout.max_truncated_fraction
    if (found := tally.mean("truncated", "tasks")) > allowed:
        raise RolloutError(
            f"{found:.0%} of a step's responses were cut after "
            f"{parts.config.rollout.max_new_tokens} tokens, but at most {allowed:.0%} are allowed; "
            "raise rollout.max_new_tokens or rollout.max_truncated_fraction"
        )


def loss_at(loss: Loss, step: int) -> Loss:
    """The loss of a step: with the direction of the warm-up while that lasts."""
    if loss.warmup and step < loss.warmup.steps:
        return loss.model_copy(update={"direction": loss.warmup.direction})
    return loss


def accumulate(parts: Parts, answered: Sequence[Answered], loss: Loss, tally: Tally) -> None:
    """Forward and backward over all responses, in portions that share a teacher.

    Sums are divided once, by the count over all portions and processes.

    Raises:
        ServerError: a teacher's server is gone.
        RolloutError: the same in one of several processes; all of them are told.
    """
    accelerator = parts.accelerator
    portions = portions_of(parts, answered)
    total = tally.sums["sequences" if loss.reduction == "sequence" else "tokens"]
    parts.distiller.train()
    for place, portion in enumerate(portions, start=1):
        teacher, batch = batch_of(parts, portion.answered, portion.origin)
        with tally.timed("teacher_s"):
            scored = score_of(teacher, portion.answered, batch)
        waits = place < len(portions)
        with (
            tally.timed("train_s"),
            summing_later(parts.distiller) if waits else nullcontext(),
        ):
            stats = parts.distiller(batch, scored, loss)
            loss_nats = (stats.divergence_T / weigh(batch.length_T, loss)).sum() / total
            # Data-parallel training averages over processes; the total is over all of them.
            # DeepSpeed's engine has a backward pass of its own.
            backward = getattr(parts.distiller, "backward", accelerator.backward)
            backward(loss_nats * accelerator.num_processes * portion.counts)
        if portion.counts:
            tally.add("loss_nats", loss_nats.item())
            add_stats(tally, stats, portion.origin)
            add_engine_difference(tally, stats, portion.answered)
    agree_on_teacher(parts)


def agree_on_teacher(parts: Parts) -> None:
    """Tell all processes if one of them has not been told what its teacher says.

    Raises:
        RolloutError: that was so.
    """
    if isinstance(teacher := parts.teacher, RemoteTeacher):
        agreed(parts.accelerator, teacher.check_told)


class Portion(NamedTuple):
    """What goes through the models in one pass."""

    answered: list[Answered]
    origin: Origin
    """Whose teacher scores it."""
    counts: bool = True
    """Whether it is of the batch, and not there to keep step with other processes."""


def portions_of(parts: Parts, answered: Sequence[Answered]) -> list[Portion]:
    """Responses in portions that share a teacher.

    Where weights are in shards, all processes make the same passes, for each puts a part of the
    weights in: one that has fewer portions makes some again, which count nothing.
    """
    cut = cut_portions(answered, parts.config.batch.rows_per_forward)
    portions = [Portion(one, one[0].pair.origin) for one in cut]
    if not parts.in_shards:
        return portions
    origins = get_args(Origin)
    counts = [sum(p.origin == origin for p in portions) for origin in origins]
    level: list[Portion] = []
    for origin, count in zip(origins, most(parts.accelerator, counts), strict=True):
        same = [p for p in portions if p.origin == origin]
        idle = Portion(portions[0].answered[:1], origin, counts=False)
        level += [*same, *[idle] * (int(count) - len(same))]
    return level


def batch_of(
    parts: Parts, portion: Sequence[Answered], origin: Origin | None = None
) -> tuple[LocalTeacher | RemoteTeacher, Batch]:
    """Who scores a portion of one origin, and its batch."""
    teacher = parts.teacher if (origin or portion[0].pair.origin) == "task" else parts.base
    batch = collate([a.pair for a in portion], [a.rollout for a in portion])
    return teacher, batch.to(parts.accelerator.device)


def score_of(
    teacher: LocalTeacher | RemoteTeacher, portion: Sequence[Answered], batch: Batch
) -> TeacherScore:
    """What the teacher says of the response tokens.

    A response that the teacher gave itself, standing still, has its hidden states already.
    """
    kept = [a.rollout.hidden_TD for a in portion]
    if isinstance(teacher, RemoteTeacher) or any(hidden_TD is None for hidden_TD in kept):
        return teacher.score(batch)
    return Hidden(torch.cat(kept), teacher.head)


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
    if isinstance(trainer.optimizer, ZeroOptimizer):
        norm = trainer.optimizer.grad_norm()
    else:
        clipped: Any = parts.accelerator.clip_grad_norm_(weights, config.clip_norm)
        norm = float(whole(clipped))
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


def add_engine_difference(tally: Tally, stats: TokenStats, portion: Sequence[Answered]) -> None:
    """Add how far an engine's log-probabilities of its tokens are from the trainer's, in nats."""
    own = stats.log_prob_T.detach().split([len(a.rollout.response_ids) for a in portion])
    for answered, ours_T in zip(portion, own, strict=True):
        if answered.rollout.log_probs is None:
            continue
        theirs_T = torch.tensor(answered.rollout.log_probs).to(ours_T)
        tally.add("engine_difference_nats", (theirs_T - ours_T).abs().sum().item())
        tally.add("engine_tokens", len(ours_T))


def check_engine(parts: Parts, tally: Tally) -> None:
    """Compare the servers' log-probabilities of a step with the trainer's, before it trains.

    Raises:
        RolloutError: they are further apart than allowed.
    """
    rollout = parts.config.rollout
    if not isinstance(rollout, VllmRollout):
        return
    for name in ("engine_difference_nats", "engine_tokens"):
        tally.add(name, 0.0)  # where the teacher gave all of this process's answers
    tally.gather(parts.accelerator)
    found = tally.mean("engine_difference_nats", "engine_tokens")
    allowed = rollout.max_logprob_difference_nats
    if not found <= allowed:
        raise RolloutError(
            f"the servers' log-probabilities of a step's tokens are {found:.3f} nats from the "
            f"trainer's, but at most {allowed} are allowed: they answered with other weights, or "
            "compute otherwise; the step was not trained on. Start the servers anew with the run's "
            "model, or raise rollout.max_logprob_difference_nats, then continue with --resume"
        )


def troubles_of(parts: Parts) -> list[str]:
    """What servers had to be asked again for since the last step, by any process."""
    own = [trouble for server in parts.servers for trouble in server.take_troubles()]
    several = parts.servers and parts.accelerator.num_processes > 1
    return gather_object(own) if several else own


def servers_row(parts: Parts, tally: Tally, troubles: Sequence[str]) -> dict[str, Any]:
    """What a step says of the servers it asked; nothing, if there are none."""
    found: dict[str, Any] = {"server_troubles": len(troubles)} if parts.servers else {}
    if isinstance(parts.config.rollout, VllmRollout):
        difference = tally.mean("engine_difference_nats", "engine_tokens")
        found["engine_logprob_difference_nats"] = difference
    return found


def games_row(tally: Tally) -> dict[str, Any]:
    """How the games of a step went; `outcome` is the share of episodes that were solved."""
    counts = ("episodes", "dropped_episodes", "invalid_moves")
    return {
        **{name: int(tally.sums[name]) for name in counts},
        "turns": int(tally.sums["tasks"]),
        "outcome": tally.mean("solved", "episodes"),
    }


def summarise(
    trainer: Trainer, tally: Tally, direction: Direction, lr: float, is_coached: bool = False
) -> dict[str, Any]:
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
        **(games_row(tally) if tally.sums["episodes"] else {}),
        **({"coach_empty": int(tally.sums["coach_empty"])} if is_coached else {}),
        "student_entropy_nats": tally.mean("entropy_nats", "kl_tokens"),
        "student_mass_in_support": tally.mean("student_mass", "kl_tokens"),
        "teacher_mass_in_support": tally.mean("teacher_mass", "kl_tokens"),
        **tally.seconds,
        "peak_bytes": int(tally.peak_bytes),
    }
