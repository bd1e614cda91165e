"""Programs on a finished run: measure it, ask it."""

import json
from pathlib import Path
from typing import Any

from opcd.adapters import load_weights
from opcd.assembly import Parts, assemble
from opcd.checking import check_context
from opcd.config import Run
from opcd.config.inputs import PER_ROW
from opcd.contexts import load_context
from opcd.errors import ContextError
from opcd.evaluation import CONDITIONS, Evaluation, evaluate
from opcd.gap import measure_gap
from opcd.items import Item
from opcd.responses import respond
from opcd.runs import (
    RunFolder,
    append_jsonl,
    make_folder,
    open_run,
    read_best,
    read_jsonl,
    write_json,
)
from opcd.serving import answered_here
from opcd.training import Outcome
from opcd.types import Context, Message, Task


def open_baked(path: Path, scored: bool = False) -> tuple[RunFolder, Parts, int]:
    """A run's parts with its best weights in the student, and the step these are from.

    Answers are sampled here, also those of a run whose rollouts came from servers.

    Args:
        path: the run's folder.
        scored: whether answers will be compared with the teacher's, wherever that is.

    Raises:
        InputError: the path is no run, or one without a best step.
    """
    folder, config = open_run(path)
    best = read_best(folder)
    parts = assemble(answered_here(config, scored))
    load_weights(parts.student, folder.best)
    return folder, parts, best["step"]


def gap_of(config: Run) -> dict[str, Any]:
    """Measure what a run's context changes, before any training, and write `gap.json`."""
    check_context(config)
    folder = make_folder(config)
    found = measure_gap(assemble(config))
    write_json(folder.gap, found)
    return found


def evaluate_run(path: Path, split: str = "test") -> Evaluation:
    """Measure a run's best weights on a split, and write `evaluation.json` and `answers.jsonl`."""
    return evaluate_best(*open_baked(path, scored=True), split)


def evaluate_outcome(outcome: Outcome, split: str = "test") -> Evaluation:
    """The same for a run that was just trained, with what it has loaded already."""
    load_weights(outcome.parts.student, outcome.folder.best)
    return evaluate_best(outcome.folder, outcome.parts, outcome.best["step"], split)


def evaluate_best(folder: RunFolder, parts: Parts, step: int, split: str) -> Evaluation:
    """The same for parts that have a run's best weights in their student."""
    found = evaluate(parts, split, f"step-{step}")
    write_json(folder.evaluation, found.summary)
    for file, rows in ((folder.answers, found.answers), (folder.token_kl, found.tokens)):
        file.unlink(missing_ok=True)
        append_jsonl(file, rows)
    return found


def read_evaluation(path: Path, split: str) -> Evaluation | None:
    """What `evaluation.json` says of a run's best weights on a split, if that is what it holds."""
    folder, _ = open_run(path)
    if not folder.evaluation.is_file() or not folder.answers.is_file():
        return None
    summary = json.loads(folder.evaluation.read_text(encoding="utf-8"))
    if (summary["split"], summary["checkpoint"]) != (split, f"step-{read_best(folder)['step']}"):
        return None
    return Evaluation(summary, list(read_jsonl(folder.answers)))


def sample_run(path: Path, prompt: str) -> dict[str, str]:
    """One prompt's greedy answer under each condition."""
    _, parts, _ = open_baked(path)
    parts.grader = None
    task = Task("sample", (Message("user", prompt),))
    context = context_for(parts, task)
    item = Item(task, parts.renderer.pair(task, context), context)
    return {c: respond(parts, [item], c)[0].text for c in CONDITIONS}


def context_for(parts: Parts, task: Task) -> Context:
    """The run's context, for a prompt that is no row of it.

    Raises:
        ContextError: every row of the run has a context of its own.
    """
    if parts.config.context.type in PER_ROW:
        raise ContextError(
            "every row of this run has a context of its own, so a prompt alone has none; put the "
            "prompt into a row (with its context, if that is a column) and use opcd evaluate"
        )
    return load_context(parts.config.context, task)
