"""What the files of a finished run say, read together and held against each other; no model."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd.config import Run
from opcd.errors import RunFolderError
from opcd.runs import RunFolder, open_run, read_best, read_jsonl

SUMMARY_KEYS = ("suites", "paired", "split", "checkpoint", "context_tokens", "seed")
TOKEN_KL_KEYS = ("base_kl_nats", "baked_kl_nats")
COSTS_KEYS = ("prompt_tokens", "prefill", "kv_cache", "training", "break_even", "notes")
COMPARISON_KEYS = ("split", "rows", "checkpoints", "suites", "paired", "seeds")
SEARCH_KEYS = ("selected_by", "chosen", "rows")
GAP_KEYS = ("split", "rows", "metrics", "margin_nats", "margin_nats_by_answer")
HARNESS_KEYS = ("tasks", "lm_eval", "limit")
HARNESS_NUMBERS = {"mean", "stderr"}

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Findings:
    """A measured run: its configuration, and everything that was written about it."""

    label: str
    """The folder's name; the whole path where two runs share a name."""
    folder: RunFolder
    config: Run
    best: dict[str, Any]
    summary: dict[str, Any]
    """`evaluation.json`."""
    answers: Rows
    metrics: Rows
    validation: Rows
    token_kl: Rows
    """Empty where the run has no `token_kl.jsonl`."""
    costs: dict[str, Any]
    """Empty where the run has no `costs.json`; so are those that follow."""
    gap: dict[str, Any]
    """What was expected before training."""
    search: dict[str, Any]
    """Learning rates that were tried."""
    comparison: dict[str, Any]
    """The run beside another way to train it."""
    harness: dict[str, Any]
    """Public benchmarks before and after training."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """What the task suite was measured under; `baked` comes last."""
        found = self.summary["suites"]["task"]
        return tuple(sorted(found, key=lambda condition: condition == "baked"))

    @property
    def warmup_steps(self) -> int:
        """How many steps another loss was trained first; 0 if none."""
        return self.config.loss.warmup.steps if self.config.loss.warmup else 0


def read_findings(paths: Sequence[Path]) -> list[Findings]:
    """Everything that is known of these runs, in this order.

    Raises:
        RunFolderError: a run is not measured, not with its best weights, or damaged; or two of
            them are one, or were measured on different rows.
    """
    _check_distinct(paths)
    names = [path.resolve().name for path in paths]
    labels = [
        name if names.count(name) == 1 else str(path)
        for name, path in zip(names, paths, strict=True)
    ]
    runs = [_read_run(path, label) for path, label in zip(paths, labels, strict=True)]
    for other in runs[1:]:
        check_comparable(runs[0], other)
    return runs


def check_comparable(first: Findings, second: Findings) -> None:
    """Two runs can stand in one table only if both answered the same rows.

    Raises:
        RunFolderError: they were measured on different splits or rows.
    """
    here, there = first.folder.path, second.folder.path
    splits = first.summary["split"], second.summary["split"]
    if splits[0] != splits[1]:
        raise RunFolderError(
            f"{here} was measured on its {splits[0]} split and {there} on its {splits[1]} split, "
            f"so their numbers cannot be compared; run opcd evaluate {there} --split {splits[0]}"
        )
    ours, theirs = ({row["id"]: _question(row) for row in run.answers} for run in (first, second))
    only = ours.keys() ^ theirs.keys()
    differ = [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
    if only or differ:
        example = min(only or differ, key=str)
        what = "is in one of them only" if only else "has another prompt or answer in each"
        raise RunFolderError(
            f"{here} and {there} were measured on different rows ({len(only) + len(differ)} of "
            f"{len(ours.keys() | theirs.keys())} differ; {example!r} {what}), so their numbers "
            f"cannot be compared; give both the same tasks.{splits[0]} and evaluation.test_rows, "
            "and evaluate again"
        )


def _check_distinct(paths: Sequence[Path]) -> None:
    resolved = [path.resolve() for path in paths]
    for path, full in zip(paths, resolved, strict=True):
        if resolved.count(full) > 1:
            raise RunFolderError(f"{path} is named more than once; name each run once")


def _read_run(path: Path, label: str) -> Findings:
    folder, config = open_run(path)
    summary, answers = _read_evaluation(folder)
    best = read_best(folder)
    _check_checkpoint(folder, summary, best)
    token_kl = _read_rows(folder.token_kl)
    for row in token_kl:
        _check_token_row(folder.token_kl, row)
    comparison = _read_optional(folder.comparison, COMPARISON_KEYS, "opcd compare")
    harness = _read_harness(folder.harness)
    _check_weights(folder.comparison, comparison.get("checkpoints", {}).get(config.name), best)
    _check_weights(folder.harness, harness.get("checkpoint"), best)
    return Findings(
        label=label,
        folder=folder,
        config=config,
        best=best,
        summary=summary,
        answers=answers,
        metrics=_read_rows(folder.metrics),
        validation=_read_rows(folder.validation),
        token_kl=token_kl,
        costs=_read_optional(folder.costs, COSTS_KEYS, f"opcd costs {path}"),
        gap=_read_optional(folder.gap, GAP_KEYS, "opcd gap"),
        search=_read_optional(folder.search, SEARCH_KEYS, "opcd search"),
        comparison=comparison,
        harness=harness,
    )


def _read_optional(file: Path, keys: Sequence[str], command: str) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = _read_object(file)
    if missing := [key for key in keys if key not in found]:
        raise RunFolderError(
            f"{file} lacks {', '.join(missing)}, so another version wrote it; delete it, or write "
            f"it again with {command}"
        )
    return found


def _read_harness(file: Path) -> dict[str, Any]:
    found = _read_optional(file, HARNESS_KEYS, "what measured it")
    for task, sides in found.get("tasks", {}).items():
        base, baked = (sides.get(side, {}) for side in ("base", "baked"))
        whole = all(set(v) >= HARNESS_NUMBERS for v in (*base.values(), *baked.values()))
        if not base or base.keys() != baked.keys() or not whole:
            raise RunFolderError(
                f"{file}: {task} needs the same metrics for base and baked, each with mean and "
                "stderr; delete the file, or measure again"
            )
    return found


def _check_weights(file: Path, compared: str | None, best: Mapping[str, Any]) -> None:
    """`compared` is the checkpoint that a file is about; `None` where it does not say."""
    held = f"step-{best['step']}"
    if compared not in (None, held):
        raise RunFolderError(
            f"{file} is about {compared}, but best/ holds {held}: the numbers are of other "
            "weights; delete the file, or write it again"
        )


def _read_evaluation(folder: RunFolder) -> tuple[dict[str, Any], Rows]:
    measure = f"run opcd evaluate {folder.path}"
    for file in (folder.evaluation, folder.answers):
        if not file.is_file():
            again = " --again" if file == folder.answers else ""
            raise RunFolderError(
                f"{folder.path} has no {file.name}, so there is nothing to report; {measure}{again}"
            )
    summary = _read_object(folder.evaluation)
    if missing := [key for key in SUMMARY_KEYS if key not in summary]:
        raise RunFolderError(f"{folder.evaluation} lacks {', '.join(missing)}; {measure} --again")
    task = summary["suites"].get("task")
    answers = _read_rows(folder.answers)
    if not answers or not task or not all(task.values()):
        raise RunFolderError(
            f"{folder.evaluation} holds an empty task suite ({len(answers)} answers), so there is "
            f"nothing to report; look at tasks.{summary['split']}, then {measure} --again"
        )
    wanted = {"id", "prompt", *task}
    for row in answers:
        if missing := sorted(wanted - row.keys()):
            raise RunFolderError(
                f"{folder.answers}: row {row.get('id')!r} lacks {', '.join(missing)}, which "
                f"{folder.evaluation.name} speaks of; {measure} --again"
            )
    return summary, answers


def _check_checkpoint(
    folder: RunFolder, summary: Mapping[str, Any], best: Mapping[str, Any]
) -> None:
    if summary["checkpoint"] != f"step-{best['step']}":
        raise RunFolderError(
            f"{folder.evaluation} measured {summary['checkpoint']}, but best/ holds "
            f"step-{best['step']}: the numbers are of other weights; run opcd evaluate "
            f"{folder.path}"
        )


def _check_token_row(file: Path, row: Mapping[str, Any]) -> None:
    lengths = {key: len(row.get(key, ())) for key in ("tokens", *TOKEN_KL_KEYS)}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{count} {key}" for key, count in lengths.items())
        raise RunFolderError(
            f"{file}: row {row.get('id')!r} has {found}; every token needs one of each, so run "
            f"opcd evaluate {file.parent} --again"
        )


def _read_object(file: Path) -> dict[str, Any]:
    value = _parsed(file, lambda: json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(value, dict):
        raise RunFolderError(f"{file} holds no JSON object; delete it and write it again")
    return value


def _read_rows(file: Path) -> Rows:
    return _parsed(file, lambda: list(read_jsonl(file)))


def _parsed(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValueError as error:
        raise RunFolderError(
            f"{file} cannot be read ({error}), so it was damaged after it was written; delete it "
            "and write it again"
        ) from error


def _question(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["prompt"], row.get("answer")
