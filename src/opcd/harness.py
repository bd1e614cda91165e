"""Public benchmarks by EleutherAI's lm-evaluation-harness: an optional package, loaded when used.

What baking cost the rest of the model, on sets that others made. The harness's own tasks, prompts,
filters and metrics, through its own `HFLM`, on the base model and on the baked one, both without
the context. `in_context`, the base model with the context as `system_instruction`, stands beside
them where the harness can place it: a system prompt, under a chat template with a system role.
Worked examples, documents and contexts of rows it cannot place, so there the condition is left out.
"""

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError

from opcd.assembly import Parts
from opcd.config.inputs import SystemPrompt
from opcd.contexts import read_text
from opcd.errors import HarnessError
from opcd.programs import open_baked
from opcd.runs import open_run, read_best, write_json

Row = dict[str, Any]
UNLOADABLE = (
    ImportError,
    LookupError,
    OSError,
    StopIteration,
    TypeError,
    ValueError,
    DatasetsError,
    TemplateError,
)
"""What a task raises whose data set, rows, fields or packages are not there."""


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """Which of the harness's tasks to run, and how."""

    tasks: tuple[str, ...]
    include_path: Path | None = None
    """A folder with task files of one's own."""
    limit: int | None = None
    """Only so many rows of each task."""
    batch_size: int = 1
    chat_template: bool = True


@dataclass(frozen=True, slots=True)
class Condition:
    """Who answers: a model, what gives it its weights meanwhile, and its system message."""

    model: Any
    weights: Callable[[], AbstractContextManager[Any, Any]]
    system: str | None = None


def read_tasks(text: str) -> tuple[str, ...]:
    """Task names written as `ifeval,gsm8k`.

    Raises:
        HarnessError: there is none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise HarnessError(
            f"--tasks {text!r} names no task, so nothing would be evaluated; write for example "
            "--tasks ifeval,gsm8k"
        )
    return names


def harness_run(path: Path, benchmarks: Benchmarks, say: Callable[[str], object]) -> Row:
    """Run the harness on a run's base model and on its best weights, and write `harness.json`.

    Args:
        path: the run's folder.
        benchmarks: which tasks, and how.
        say: is told which condition is next.

    Raises:
        HarnessError: the package is missing, or a task is unknown, cannot be loaded or has no rows.
        RunFolderError: the path is no run, or one without a best step.
    """
    check_installed()
    folder, _ = open_run(path)
    read_best(folder)
    manager = index_tasks(benchmarks)
    check_tasks(manager, benchmarks.tasks)
    _, parts, step = open_baked(path)
    found: dict[str, Row] = {}
    for name, condition in conditions(parts, benchmarks).items():
        say(f"{name}: {', '.join(benchmarks.tasks)}")
        found[name] = ask(condition, parts, manager, benchmarks)
    summary = summarize(found) | {
        "limit": benchmarks.limit,
        "chat_template": benchmarks.chat_template,
        "checkpoint": f"step-{step}",
    }
    write_json(folder.harness, summary)
    return summary


def check_installed() -> None:
    """Refuse before anything is loaded.

    Raises:
        HarnessError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(
            "opcd harness needs the package lm_eval, which is not installed; run "
            "pip install 'opcd-lm[eval]' (in a checkout: pip install '.[eval]')"
        )


def index_tasks(benchmarks: Benchmarks) -> Any:
    """The harness's `TaskManager`, which knows all tasks by name.

    Raises:
        HarnessError: `include_path` is no folder.
    """
    from lm_eval.tasks import TaskManager

    # Another program in this process may have turned its log up.
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    folder = benchmarks.include_path
    if folder is None:
        return TaskManager()
    if not folder.is_dir():
        raise HarnessError(
            f"--include-path {str(folder)!r} is no folder; give one with the YAML files of tasks"
        )
    own = TaskManager(include_path=folder, include_defaults=False)
    # The harness takes some twenty seconds to list its own 14,000 tasks.
    if set(benchmarks.tasks) <= set(own.all_subtasks):
        return own
    return TaskManager(include_path=folder)


def check_tasks(manager: Any, names: Sequence[str]) -> None:
    """Load the tasks once, before any model is.

    Raises:
        HarnessError: one is unknown, cannot be loaded, has no rows, or runs what a model wrote.
    """
    for name in names:
        if name not in manager.task_index:
            raise HarnessError(_unknown(name, manager))
    named = f"--tasks {','.join(names)}"
    try:
        tasks = manager.load(list(names))["tasks"]
    except UNLOADABLE as error:
        raise HarnessError(
            f"{named}: lm_eval cannot load this ({type(error).__name__}: {error}); a task takes "
            "its data set, from the hub or from a local file, rows in it, and at times packages of "
            "its own (pip install 'lm_eval[EXTRA]')"
        ) from error
    if not tasks:
        raise HarnessError(
            f"{named}: there is no task behind this name, so nothing would be evaluated; name a "
            "task, or a group or tag that has some"
        )
    if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        raise HarnessError(
            f"{named}: {', '.join(unsafe)} would run code that the model writes, which opcd never "
            "does; take opcd export, and lm_eval itself on that folder, where it is safe to"
        )


def conditions(parts: Parts, benchmarks: Benchmarks) -> dict[str, Condition]:
    """Those that the harness can ask."""
    base, context = parts.base, parts.config.context
    found = {"base": Condition(base.model, base.as_teacher)}
    # Without a system role, the harness would drop the context without an error.
    roles = benchmarks.chat_template and parts.renderer.has_system_role
    if isinstance(context, SystemPrompt) and roles:
        found["in_context"] = Condition(base.model, base.as_teacher, read_text(context.path))
    return found | {"baked": Condition(parts.student, nullcontext)}


def ask(condition: Condition, parts: Parts, manager: Any, benchmarks: Benchmarks) -> Row:
    """What the harness's `simple_evaluate` returns for one condition."""
    harness: Any = importlib.import_module("lm_eval.evaluator")
    with condition.weights():
        # By name, not as the tasks that were loaded before: some draw random numbers while they
        # load, and simple_evaluate seeds these first, for each condition alike.
        found = harness.simple_evaluate(
            model=wrap(condition.model, parts, benchmarks.batch_size),
            tasks=list(benchmarks.tasks),
            task_manager=manager,
            limit=benchmarks.limit,
            system_instruction=condition.system,
            apply_chat_template=benchmarks.chat_template,
        )
    if found is None:
        raise HarnessError(
            "lm_eval returned nothing: it does in every process but the first; start opcd harness "
            "without accelerate launch or torchrun"
        )
    return dict(found)


def wrap(model: Any, parts: Parts, batch_size: int) -> Any:
    """A model as the harness sees one, with the run's tokenizer and thinking mode."""
    name = "lm_eval.models.huggingface"
    harness: Any = importlib.import_module(name)
    thinking = parts.config.rendering.student_thinking
    with _quiet(name):
        return harness.HFLM(
            pretrained=model,
            tokenizer=parts.renderer.tokenizer,
            batch_size=batch_size,
            # Trained weights are float32; they answer in the run's dtype, as in training.
            mixed_precision_dtype=None if parts.dtype == torch.float32 else parts.dtype,
            chat_template_args={} if thinking is None else {"enable_thinking": thinking},
        )


def summarize(found: Mapping[str, Row]) -> Row:
    """Results of the harness by task and condition, and what separates `baked` from `base`."""
    first = found["base"]
    tasks: Row = {}
    for task, row in first["results"].items():
        if not metrics_of(row):  # a group that only holds others
            continue
        measured = {name: metrics_of(each["results"][task]) for name, each in found.items()}
        rows = {name: values_of(each["samples"].get(task, [])) for name, each in found.items()}
        tasks[task] = measured | {"difference": subtract(measured, rows)}
    return {
        "tasks": tasks,
        "n": {task: first["results"][task]["sample_len"] for task in tasks},
        "versions": {task: first["versions"].get(task) for task in tasks},
        "shots": {task: first["n-shot"].get(task) for task in tasks},
        "lm_eval": first["lm_eval_version"],
    }


def metrics_of(row: Mapping[str, Any]) -> Row:
    """`exact_match,none` and its `exact_match_stderr,none` as one `exact_match`, and so on.

    Another filter than `none` stays in the name.
    """
    found: Row = {}
    for key, value in row.items():
        metric, comma, kept = key.rpartition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = row.get(f"{metric}_stderr,{kept}")
            found[_label(metric, kept)] = {"mean": _number(value), "stderr": _number(stderr)}
    return found


def values_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Each metric's values by row, of those metrics that have a number for a row."""
    found: dict[str, dict[int, float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if (value := _number(sample[metric])) is not None:
                found.setdefault(_label(metric, sample["filter"]), {})[sample["doc_id"]] = value
    return found


def subtract(
    measured: Mapping[str, Row], rows: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> Row:
    """`baked` minus `base`, with the standard error of the rows' own differences.

    Both answered the same rows, so the two standard errors together would be far too wide. It is
    `None` where a metric is no mean of its rows: a group's, a perplexity, an F1.
    """
    found: Row = {}
    for metric, before in measured["base"].items():
        mean = _minus(measured["baked"][metric]["mean"], before["mean"])
        base, baked = (rows[name].get(metric, {}) for name in ("base", "baked"))
        changes = [baked[row] - base[row] for row in base.keys() & baked.keys()]
        paired = (
            len(changes) > 1
            and mean is not None
            and math.isclose(fmean(changes), mean, abs_tol=1e-9)
        )
        stderr = stdev(changes) / math.sqrt(len(changes)) if paired else None
        found[metric] = {"mean": mean, "stderr": stderr}
    return found


def _label(metric: str, kept: str) -> str:
    return metric if kept == "none" else f"{metric},{kept}"


def _number(value: Any) -> float | None:
    """The harness writes "N/A" where a standard error is not known; JSON has no nan."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _unknown(name: str, manager: Any) -> str:
    near = get_close_matches(name, manager.all_tasks, n=5)
    look = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists all of them"
    return (
        f"--tasks: lm_eval has no task, group or tag {name!r} among {len(manager.all_tasks)}; "
        f"{look} A file under --include-path counts if it is YAML with a task: of this name"
    )


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without its warnings; HFLM has some for every model that it has not loaded itself."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
