"""One training of a lab model, from its first step to its marks on the test rows.

What was measured is kept by everything it depends on, so that an interrupted run of the claims goes
on where it was and a trial that two claims need is done once.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from opcd.adapters import trainable
from opcd.assembly import Parts, assemble
from opcd.config import Run
from opcd.config.training import Loss
from opcd.distill import distill
from opcd.evaluation import validate
from opcd.items import Item
from opcd.lab.worlds import ROWS, World, WorldName, answer_of, other_truths, prompts_of, tell
from opcd.responses import Response, mean, nats_by_response, respond, rows_of, score
from opcd.runs import write_json
from opcd.suites import kept
from opcd.training import better_of, due, prepare
from opcd.types import Condition, Context, Message, Task
from opcd.weights import flushed_denormals

Marks = list[float]
"""1 for each test row or board that is right, else 0; always in the same order."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Marks of a model, or of what became of it in a training."""

    base: Marks
    in_context: Marks
    baked: Marks
    returned: Marks
    """With the context given again."""
    others_before: Marks
    """Questions under other truths, told in the prompt; none for a lake."""
    others: Marks
    other_task_before: Marks
    """Questions of another kind of world, told in the prompt; none for a lake."""
    other_task: Marks
    kl_nats: Marks
    """To the teacher along the student's own answer to each test row, a token."""
    kept_kl_nats_per_token: float
    """From the base along its answers to other prompts under other truths (the `kept` suite)."""
    best_step: int
    """After how many steps the measured weights were: the best on validation rows, or the last."""
    least_entropy_nats: float
    """Of a step's answers, the least of the run: near 0, the student always says the same."""
    wall_s: float


@dataclass(frozen=True, slots=True)
class Bench:
    """Where trials are kept."""

    folder: Path

    def measure(self, world: World, run: Run) -> Measured:
        """Train a run and measure it, unless that was done before."""
        tree = run.model_dump(mode="json", exclude={"out", "name"})
        for table in (tree["model"], tree["teacher"]):
            # Names of minds say what they are, wherever the cache lies.
            if table.get("path"):
                table["path"] = Path(table["path"]).name
        # What an earlier version measured, on other rows or of another page, is no answer.
        told = world.context.read_text(encoding="utf-8")
        asked = [field.name for field in fields(Measured)], ROWS, told
        text = json.dumps([world.name, world.seed, tree, asked], sort_keys=True, default=str)
        text = text.replace(str(world.folder), "")
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        if not file.is_file():
            found = asdict(trial(world, run))
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, {"run": tree, "measured": found})
        return Measured(**json.loads(file.read_text(encoding="utf-8"))["measured"])


def trial(world: World, run: Run) -> Measured:
    """Train a run to its last step and measure it on the test rows."""
    parts = assemble(run)
    with flushed_denormals():
        before = {c: marks_of(parts, c) for c in ("base", "in_context")}
        others_before, other_task_before = told_marks(parts, world)
        metrics, best_step = train_to_best(parts)
        others, other_task = told_marks(parts, world)
        answers = respond(parts, rows_of(parts, "test", None), "baked")
        return Measured(
            **before,
            baked=marks_in(answers),
            returned=marks_of(parts, "baked_in_context"),
            others_before=others_before,
            others=others,
            other_task_before=other_task_before,
            other_task=other_task,
            kl_nats=kl_to_teacher(parts, answers),
            kept_kl_nats_per_token=kept(parts)["baked"]["kl_nats_per_token"]["mean"],
            best_step=best_step,
            least_entropy_nats=min(row["student_entropy_nats"] for row in metrics),
            wall_s=sum(row["wall_s"] for row in metrics),
        )


def marks_of(parts: Parts, condition: Condition, items: Sequence[Item] | None = None) -> Marks:
    """Which rows are right under a condition; those of the test split, unless given."""
    items = rows_of(parts, "test", None) if items is None else items
    return marks_in(respond(parts, items, condition))


def marks_in(responses: Sequence[Response]) -> Marks:
    """Which of the responses are right."""
    return [response.score.metrics["correct"] for response in responses]


def train_to_best(parts: Parts) -> tuple[list[dict[str, Any]], int]:
    """Train, and put back the weights that were best on validation rows; the last if none are.

    A run whose `evaluation.every_steps` is beyond its last step is not validated.

    Returns:
        The metrics of every step, and after how many steps the kept weights were.
    """
    trainer, run, metrics = prepare(parts), parts.config, list[dict[str, Any]]()
    best: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    for report in distill(parts, trainer):
        metrics.append(report.metrics)
        every = run.evaluation.every_steps
        if every > run.steps or not due(trainer.step, every, run.steps):
            continue
        found = {**validate(parts, trainer.step - 1), "step": trainer.step}
        best, is_new = better_of(found, best, "correct")
        if is_new:
            weights = {name: w.detach().clone() for name, w in trainable(parts.student).items()}
    with torch.no_grad():
        for name, weight in weights.items():
            trainable(parts.student)[name].copy_(weight)
    return metrics, best.get("step", run.steps)


def told_marks(parts: Parts, world: World) -> tuple[Marks, Marks]:
    """Which questions the student answers right under other truths, told in its prompt.

    Those of the same kind, and those of another: a different task altogether.
    """
    if world.name == "lake":
        return [], []
    other: WorldName = "rulebook" if world.name == "code_book" else "code_book"
    return _told(parts, world.name, world.seed), _told(parts, other, world.seed)


def _told(parts: Parts, name: WorldName, seed: int) -> Marks:
    random, asked = Random(f"told/{name}/{seed}"), list[Item]()
    prompts = prompts_of(name, random)
    for number, facts in enumerate(other_truths(name, seed, "test")):
        context = Context(system=tell(facts))
        for row, prompt in enumerate(islice(prompts, 12)):
            task = Task(f"{number}/{row}", (Message("user", prompt),), answer_of(facts, prompt))
            asked.append(Item(task, parts.renderer.pair(task, context), context))
    return marks_of(parts, "baked_in_context", asked)


def kl_to_teacher(parts: Parts, responses: Sequence[Response]) -> Marks:
    """Nats a token between student and teacher, along each of the student's responses."""
    answered = [turn for response in responses for turn in response.turns]
    nats = nats_by_response(responses, score(parts, answered, Loss()))
    return [mean(nats[place]) for place in range(len(responses))]
