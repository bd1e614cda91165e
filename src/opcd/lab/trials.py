"""One training of a lab model, from its first step to its marks on the test rows.

What was measured is kept by everything it depends on, so that an interrupted run of the claims goes
on where it was and a trial that two claims need is done once.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from opcd.assembly import Parts, assemble
from opcd.config import Run
from opcd.config.training import Loss
from opcd.distill import distill
from opcd.items import Item, with_context
from opcd.lab.worlds import World, answer_of, other_truths, tell
from opcd.responses import mean, nats_by_response, respond, rows_of, score
from opcd.runs import write_json
from opcd.training import flushed_denormals, prepare
from opcd.types import Condition, Context

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
    kl_nats_per_token: float
    """To the teacher, along the student's own answers."""
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
        text = json.dumps([world.name, world.seed, tree], sort_keys=True, default=str)
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
        others_before = other_marks(parts, world)
        metrics = [report.metrics for report in distill(parts, prepare(parts))]
        return Measured(
            **before,
            baked=marks_of(parts, "baked"),
            returned=marks_of(parts, "baked_in_context"),
            others_before=others_before,
            others=other_marks(parts, world),
            kl_nats_per_token=kl_to_teacher(parts),
            least_entropy_nats=min(row["student_entropy_nats"] for row in metrics),
            wall_s=sum(row["wall_s"] for row in metrics),
        )


def marks_of(parts: Parts, condition: Condition, items: Sequence[Item] | None = None) -> Marks:
    """Which rows are right under a condition; those of the test split, unless given."""
    items = rows_of(parts, "test", None) if items is None else items
    return [response.score.metrics["correct"] for response in respond(parts, items, condition)]


def other_marks(parts: Parts, world: World) -> Marks:
    """Which questions the student answers right under other truths, told in its prompt."""
    if world.name == "lake":
        return []
    items, random = rows_of(parts, "test", None), Random(world.seed)
    marks: Marks = []
    for facts in other_truths(world, "test"):
        asked = with_context(parts.renderer, random.sample(items, 12), Context(system=tell(facts)))
        right = [answer_of(facts, item.task.messages[-1].content) for item in asked]
        renewed = [
            replace(item, task=replace(item.task, answer=answer))
            for item, answer in zip(asked, right, strict=True)
        ]
        marks += marks_of(parts, "baked_in_context", renewed)
    return marks


def kl_to_teacher(parts: Parts) -> float:
    """Nats a token between student and teacher, along the student's answers to the test rows."""
    responses = respond(parts, rows_of(parts, "test", None), "baked")
    answered = [turn for response in responses for turn in response.turns]
    nats = nats_by_response(responses, score(parts, answered, Loss()))
    return mean([mean(row) for row in nats.values()])
