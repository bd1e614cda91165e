"""A training run from its first step to its last, or from where it was interrupted.

Drives `opcd.distill`: validates, keeps the best weights, writes checkpoints, stops when asked to.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from opcd import checkpoint
from opcd.adapters import in_shards, save_weights, trainable
from opcd.assembly import Parts, assemble
from opcd.checking import check_context
from opcd.config import Run, differences
from opcd.distill import StepReport, Trainer, distill
from opcd.errors import CheckpointError, ConfigError, RolloutError, RunFolderError, ServerError
from opcd.evaluation import validate
from opcd.interruption import Interruption
from opcd.launch import (
    agreed,
    build_accelerator,
    check_shardable,
    on_main,
    sharding_of,
    summed,
    together,
)
from opcd.runs import RunFolder, check_free, create_run, open_run, rewind_jsonl, write_json
from opcd.sharding import Sharding, give, weights_by_name
from opcd.teachers import LocalTeacher
from opcd.tracking import Tracker
from opcd.types import Answered
from opcd.weights import flushed_denormals
from opcd.zero import Zero

OF_SERVERS = ("servers", "key_env", "timeout_s", "retries", "parallel", "weights_folder")
FREE_TO_CHANGE = (
    *("checkpoint.", "tracking.", "launch.", "out"),
    *(f"{table}.{key}" for table in ("rollout", "teacher") for key in OF_SERVERS),
)
"""Keys that a resumed run may have other values for, since no result depends on them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training run ended."""

    folder: RunFolder
    steps: int
    """Steps done in all."""
    best: dict[str, Any]
    """Which step was chosen, by what."""
    interrupted_by: int | None
    """The signal that stopped it early."""
    parts: Parts
    """What it was trained with; the student as it was after the last step."""


def train(config: Run, resume: bool = False, overwrite: bool = False) -> Outcome:
    """Train a run, validate it on the way, and keep its best weights in `best/`.

    Args:
        config: the run.
        resume: go on from the run's newest checkpoint, bitwise on a CPU.
        overwrite: delete an earlier run of this name.

    Raises:
        InputError: something is wrong with the input; nothing was started.
        RunError: training failed; its checkpoints are kept.
    """
    check_context(config)
    accelerator = build_accelerator(config)
    with together(accelerator):
        # Refused before a model is loaded, or a server is waited for.
        on_main(
            accelerator,
            lambda: check_resumable(config) if resume else check_free(config, overwrite),
        )
        parts = assemble(config)
        folder = on_main(
            accelerator,
            lambda: check_resumable(config) if resume else create_run(config, overwrite),
        )
        trainer, best = prepare(parts), {}
        if resume:
            best = restore(parts, trainer, folder)
        return _train(parts, trainer, best, folder)


def _train(parts: Parts, trainer: Trainer, best: dict[str, Any], folder: RunFolder) -> Outcome:
    config, interruption = parts.config, Interruption()
    with (
        Tracker(config, folder, parts.accelerator) as tracker,
        interruption.listening(),
        flushed_denormals(),
    ):
        for note in parts.notes:
            tracker.say(note)
        best = take_steps(parts, trainer, best, folder, tracker, interruption)
    early = trainer.step < config.steps
    stopped_by = interruption.signals[0] if interruption.signals and early else None
    return Outcome(folder, trainer.step, best, stopped_by, parts)


def take_steps(
    parts: Parts,
    trainer: Trainer,
    best: dict[str, Any],
    folder: RunFolder,
    tracker: Tracker,
    interruption: Interruption,
) -> dict[str, Any]:
    """Train until all steps are done, or somebody asks to stop; returns the best so far.

    Raises:
        RolloutError: responses cannot be trained on; the steps before are saved.
        ServerError: a server cannot be used any longer; the steps before are saved.
    """
    config, random = parts.config, checkpoint.random_state()
    try:
        if trainer.owes_validation:
            best = choose_best(parts, trainer, best, folder, tracker)
            write_checkpoint(parts, trainer, best, folder)
        for report in distill(parts, trainer):
            show(parts, report, tracker)
            random, stop = checkpoint.random_state(), interruption.heard(parts.accelerator)
            if due(trainer.step, config.evaluation.every_steps, config.steps):
                best = choose_best(parts, trainer, best, folder, tracker)
            if stop or due(trainer.step, config.checkpoint.every_steps, config.steps):
                write_checkpoint(parts, trainer, best, folder)
            if stop:
                break
    except (RolloutError, ServerError) as error:
        # Of several processes, all have to write. What comes to all of them is a RolloutError.
        if isinstance(error, RolloutError) or parts.accelerator.num_processes == 1:
            checkpoint.restore_random(random)
            write_checkpoint(parts, trainer, best, folder)
            tracker.say(f"stopped after step {trainer.step}, which is saved")
        raise
    return best


def show(parts: Parts, report: StepReport, tracker: Tracker) -> None:
    """Write down what a step did, and what trouble it had."""
    tracker.step(report.metrics, sample_rollouts(parts, report))
    for trouble in report.troubles:
        tracker.say(f"step {report.metrics['step'] + 1}: {trouble}")


def due(done: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return done % every == 0 or done == last


def prepare(parts: Parts) -> Trainer:
    """Optimiser and schedule, with everything handed to accelerate.

    Raises:
        ConfigError: transformers has no schedule of that name.
    """
    config = parts.config.optimizer
    cut = spread(parts)
    optimizer: Any = torch.optim.AdamW(
        list(trainable(parts.student).values()),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    try:
        scheduler = get_scheduler(
            config.schedule, optimizer, config.warmup_steps, parts.config.steps
        )
    except ValueError as error:
        raise ConfigError(f"optimizer.schedule = {config.schedule!r}: {error}") from error
    if isinstance(cut, Zero):
        both = cut.shard(parts.distiller, optimizer, parts.accelerator.autocast)
        parts.distiller, optimizer = both
    return Trainer(optimizer, scheduler)


def spread(parts: Parts) -> Sharding | Zero | None:
    """Hand the student to DDP, or cut it and the frozen teachers into shards; returns how.

    DeepSpeed cuts the student later, together with its optimiser.

    Raises:
        ConfigError: the launch and the run contradict each other.
    """
    sharding = sharding_of(parts.config, parts.accelerator, parts.dtype)
    if sharding is None:
        parts.distiller = summed(parts.accelerator, parts.distiller)
        return None
    check_shardable(parts.config, isinstance(sharding, Zero))
    local = [t for t in (parts.teacher, parts.base) if isinstance(t, LocalTeacher)]
    own, teachers = parts.distiller, {id(t): t for t in local}.values()

    def in_student(work: Callable[[], Tensor]) -> Tensor:
        # Looked up when it is called: cutting the student gives it another `run`.
        return own.run(work)

    for teacher in teachers:
        teacher.go_inside(in_student if teacher.model is parts.student else lambda work: work())
    if isinstance(sharding, Sharding):
        sharding.shard(own, parts.accelerator.autocast)
    for teacher in teachers:
        if teacher.shadow:
            teacher.shadow.start()
        elif teacher.model is not parts.student:
            sharding.shard_frozen(teacher.model)
    # The states that came with an answer would be there for some rows and not for others.
    parts.keeps_hidden = False
    return sharding


def choose_best(
    parts: Parts, trainer: Trainer, best: dict[str, Any], folder: RunFolder, tracker: Tracker
) -> dict[str, Any]:
    """Validate, and keep these weights if they are the best so far.

    Without a validation split, the last step is kept, and said to be no choice.
    """
    done = trainer.step
    if "validation" not in parts.items:
        found: dict[str, Any] = {"step": done, "chosen_by": "last step, no validation split"}
    else:
        trainer.owes_validation = True
        metrics = validate(parts, done - 1)
        trainer.owes_validation = False
        tracker.validated(metrics)
        name = "kl_nats_per_token"
        if parts.config.is_graded:
            name = parts.config.evaluation.select_by
        found = {**metrics, "step": done, "chosen_by": name}
        found, is_new = better_of(found, best, name)
        if not is_new:
            return found
    weights = weights_by_name(parts.student) if in_shards(parts.student) else None
    on_main(parts.accelerator, lambda: _keep_weights(parts, folder.best, found, weights))
    return found


def better_of(
    found: dict[str, Any], best: dict[str, Any], name: str
) -> tuple[dict[str, Any], bool]:
    """The better of a step's validation and the best so far; and whether that is the step's.

    It knows the `highest` value of the metric `name` that was seen, whichever step had it.
    """
    is_new = not best or is_better(found, best, name)
    highest = max(found[name], best.get("highest", found[name]))
    return {**(found if is_new else best), "highest": highest}, is_new


def is_better(found: dict[str, Any], best: dict[str, Any], name: str) -> bool:
    """Whether a step's validation is better than that of the best so far.

    By the metric `name`, if it is further from the highest that was seen than one standard error
    of a share of the rows that have it; else by the KL to the teacher, since a few rows more or
    less say nothing.
    """
    nearer = found["kl_nats_per_token"] < best["kl_nats_per_token"]
    if name == "kl_nats_per_token":
        return nearer
    highest, rows = best.get("highest", best[name]), found.get(f"rows_{name}", found["rows"])
    # As if one row more were right and one wrong: at 0 and 1 there is noise too. A user's own
    # metric need not be a share.
    share = (min(max(highest, 0.0), 1.0) * rows + 1) / (rows + 2)
    noise = math.sqrt(share * (1.0 - share) / rows)
    if abs(found[name] - highest) <= noise:
        return nearer or best[name] < highest - noise
    return found[name] > highest


def write_checkpoint(
    parts: Parts, trainer: Trainer, best: dict[str, Any], folder: RunFolder
) -> None:
    """Save everything that a bitwise resume needs.

    Raises:
        CheckpointError: it could not be written.
    """
    optimizer, groups = checkpoint.pack_optimizer(trainer.optimizer)
    snapshot = checkpoint.Snapshot(
        trainer.step,
        {
            "model": weights_by_name(parts.student),
            "optimizer": optimizer,
            "teacher": parts.teacher.state(),
            "random": checkpoint.random_states(parts.accelerator),
        },
        {
            "optimizer_groups": groups,
            "scheduler": trainer.scheduler.state_dict(),
            "skipped_steps": trainer.skipped_steps,
            "owes_validation": trainer.owes_validation,
            "best": best,
        },
    )
    keep = parts.config.checkpoint.keep
    on_main(parts.accelerator, lambda: checkpoint.save(folder.checkpoints, snapshot, keep))


def restore(parts: Parts, trainer: Trainer, folder: RunFolder) -> dict[str, Any]:
    """Put everything back as the newest checkpoint has it; returns the best so far.

    Raises:
        CheckpointError: there is none, or it cannot be trusted.
    """
    snapshot = checkpoint.load(checkpoint.latest(folder.checkpoints))
    own = trainable(parts.student)
    if own.keys() != snapshot.tensors["model"].keys():
        raise CheckpointError(
            f"step-{snapshot.step} holds other weights than the run trains; it is not its own"
        )
    for name, weight in snapshot.tensors["model"].items():
        give(own[name], weight)
    groups = snapshot.facts["optimizer_groups"]
    checkpoint.unpack_optimizer(trainer.optimizer, snapshot.tensors["optimizer"], groups)
    trainer.scheduler.load_state_dict(snapshot.facts["scheduler"])
    of_teacher = dict(snapshot.tensors["teacher"])
    agreed(parts.accelerator, lambda: parts.teacher.load_state(of_teacher))
    checkpoint.restore_random(snapshot.tensors["random"], parts.accelerator.process_index)
    trainer.step, trainer.skipped_steps = snapshot.step, snapshot.facts["skipped_steps"]
    trainer.owes_validation = snapshot.facts.get("owes_validation", False)

    def rewind() -> None:
        for path in (folder.metrics, folder.rollouts, folder.validation):
            rewind_jsonl(path, snapshot.step)

    on_main(parts.accelerator, rewind)
    return dict(snapshot.facts["best"])


def check_resumable(config: Run) -> RunFolder:
    """The folder of the run to go on with.

    Raises:
        RunFolderError: there is none, or it was started with other values.
    """
    folder, started_as = open_run(config.out / config.name)
    changed = [d for d in differences(started_as, config) if not d.startswith(FREE_TO_CHANGE)]
    if changed:
        raise RunFolderError(
            f"{folder.path} was started with other values:\n  " + "\n  ".join(changed) + "\n"
            "Put them back to resume, or start anew under another name"
        )
    return folder


def sample_rollouts(parts: Parts, report: StepReport) -> list[dict[str, Any]]:
    """The first responses of a step, as text for people."""
    count = parts.config.tracking.rollouts_per_step
    tasks = [a for a in report.answered if a.pair.origin == "task"][:count]
    anchors = [a for a in report.answered if a.pair.origin == "anchor"][:count]
    return [_rollout_row(parts, report.metrics["step"], a) for a in (*tasks, *anchors)]


def _rollout_row(parts: Parts, step: int, answered: Answered) -> dict[str, Any]:
    return {
        "step": step,
        "id": answered.rollout.task_id,
        "origin": answered.pair.origin,
        "prompt": parts.renderer.decode(answered.pair.student_ids),
        "response": parts.renderer.decode(answered.rollout.response_ids),
        "finished": answered.rollout.finished,
    }


def _keep_weights(
    parts: Parts, target: Path, found: dict[str, Any], weights: dict[str, Tensor] | None
) -> None:
    draft = target.with_name(".best")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        save_weights(parts.student, draft, weights)
        write_json(draft / "best.json", found)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"best/ could not be written ({error}); the one from before is kept. Free space on "
            "the disk, then continue with --resume"
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
