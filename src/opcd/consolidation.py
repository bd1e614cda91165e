"""What was learned is baked in, and measured beside everything it has to beat.

The runs are ordinary ones: `NAME-round-R` with the chosen experience (or the pool) as its context,
and `NAME-round-R-off_policy`. On the same test rows:

    base          the model as it was when the round began, with nothing
    raw_traces    the same with whole traces in its prompt, as many as the experience's budget holds
    items         the same with the experience in its prompt
    off_policy    classic distillation of the experience; nothing in the prompt
    baked         on-policy distillation of it; nothing in the prompt
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd.adapters import load_weights
from opcd.assembly import assemble
from opcd.candidates import digest, find_candidates
from opcd.comparing import ensure_trained, off_policy, tests_of
from opcd.config import Run, derive, dump_config
from opcd.errors import ConfigError, NothingLearnedError, OverLongError, RunFolderError
from opcd.evaluation import lengths_of
from opcd.intervals import estimate
from opcd.items import load_rows
from opcd.programs import evaluate_best, read_evaluation
from opcd.responses import by_metric, respond, rows_of
from opcd.runs import RoundFolder, RunFolder, read_best, write_json, write_text
from opcd.tasks import check_leaks, read_row
from opcd.traces import read_traces, saved_prefixes

Say = Callable[[str], object]
Answers = dict[str, list[dict[str, Any]]]
"""Condition -> the graded answers to the test rows, in their order."""

CONDITIONS = ("base", "raw_traces", "items", "off_policy", "baked")
PAIRS = (
    ("baked", "off_policy"),
    ("baked", "items"),
    ("baked", "base"),
    ("off_policy", "base"),
    ("items", "raw_traces"),
    ("items", "base"),
    ("raw_traces", "base"),
)
"""Which conditions are tested against each other."""
PREFIX_VALIDATION_SHARE = 0.1
"""Of saved prefixes, where the run has no validation rows of its own to choose weights on."""


def consolidate(run: Run, number: int, folder: RoundFolder, say: Say) -> dict[str, Any]:
    """Train and measure what is missing of a round; write and return `consolidation.json`.

    Args:
        run: the run as it is in this round, its model the one that the round began with.
        number: of the round, from 1 on.
        folder: of the round, with its experiences and what was selected.
        say: told before something that takes minutes.

    Raises:
        NothingLearnedError: no items is best, so that there is nothing to bake in.
        RunFolderError: a folder holds a run with other values or another experience.
        RunError: training failed or was interrupted; what is there is kept, and used next time.
    """
    files = experience_files(run, folder)
    measured_run = _with_experience(run, f"{run.name}-round-{number}", files)
    trained_run = _on_store(measured_run, run, folder) if _is_stored(run) else measured_run
    check_unchanged(folder, files, trained_run)
    runs, notes = {"baked": trained_run}, _chosen_by_kl(run, trained_run)
    try:
        runs["off_policy"] = off_policy(trained_run)
    except ConfigError as error:
        notes.append(f"no off_policy: {error}")
    folders = {kind: ensure_trained(one, say) for kind, one in runs.items()}
    tables: dict[str, dict[str, Any]] = {}
    answers: Answers = {}
    for kind, trained in folders.items():
        summary, rows = _measured(trained, measured_run, say)
        own = {"baked": "baked", "in_context": "items", "base": "base"}
        for condition, name in own.items() if kind == "baked" else [("baked", kind)]:
            tables[name] = summary["suites"]["task"][condition]
            answers[name] = [{"id": row["id"], **row[condition]} for row in rows]
    rows = [row["id"] for row in answers["baked"]]
    raw = measure_raw(run, number, folder, raw_files(folder, files), rows, say)
    if isinstance(raw, str):
        notes.append(raw)
    else:
        tables["raw_traces"], answers["raw_traces"] = raw["metrics"], raw["answers"]
    found = {
        "round": number,
        "model": run.model.path,
        "experience": [str(file.relative_to(folder.path)) for file in files],
        "runs": {kind: one.name for kind, one in runs.items()},
        "checkpoints": {kind: read_best(one)["step"] for kind, one in folders.items()},
        "split": "test",
        "rows": len(answers["baked"]),
        "conditions": {name: tables[name] for name in CONDITIONS if name in tables},
        "paired": paired(answers),
        "notes": notes,
    }
    write_json(folder.consolidation, found)
    return found


def experience_files(run: Run, folder: RoundFolder) -> list[Path]:
    """What is to be baked in: the selected experience, or the last one of every seed.

    Raises:
        NothingLearnedError: no items is best, or no seed has any.
        RunFolderError: nothing was selected yet.
    """
    assert run.experience, "a run without experience has nothing to consolidate"
    if run.experience.use == "pool":
        last = {one.seed: one for one in find_candidates(folder, 1, len)}
        files = [folder.path / one.name for one in last.values() if one.text]
        if not files:
            raise NothingLearnedError(
                f"none of {len(last)} seeds has an item, so there is nothing to bake in; read what "
                f"the extractor wrote in {folder.path}/seed-*/answers.jsonl, and change the "
                "instructions or the extractor"
            )
        return files
    if not folder.selection.is_file():
        raise RunFolderError(f"{folder.path} has no selection.json; choose with opcd select first")
    if not folder.selected.is_file():
        verdict = json.loads(folder.selection.read_text(encoding="utf-8"))["verdict"]
        raise NothingLearnedError(
            f"there is nothing to bake in: {verdict}. Give it more traces (experience.steps), "
            'another extractor or instructions; or bake it unchosen with experience.use = "pool"'
        )
    return [folder.selected]


def check_unchanged(folder: RoundFolder, files: Sequence[Path], run: Run) -> None:
    """Refuse to take a run for trained whose experience was another one by then.

    Raises:
        RunFolderError: naming what to do.
    """
    note = folder.baked_from
    texts = [file.read_text(encoding="utf-8") for file in files]
    if _is_stored_run(run, folder):
        texts.append(folder.prefixes.read_text(encoding="utf-8"))
    digest = hashlib.sha256("\n\n".join(texts).encode()).hexdigest()
    known = json.loads(note.read_text("utf-8"))["sha256"] if note.is_file() else None
    if RunFolder(run.out / run.name).config.is_file() and known != digest:
        raise RunFolderError(
            f"{run.out / run.name} was not trained with the experience that {folder.path} has now; "
            f"delete it (and {run.name}-off_policy) to train anew, or give name=... another value"
        )
    write_json(note, {"sha256": digest})


def raw_files(folder: RoundFolder, files: Sequence[Path]) -> list[Path]:
    """The raw traces of the seeds whose experiences these are, where any fit the budget."""
    if files == [folder.selected]:
        seeds = [json.loads(folder.selection.read_text(encoding="utf-8"))["chosen"]["seed"]]
    else:
        seeds = [int(file.parent.name.removeprefix("seed-")) for file in files]
    found = [folder.raw(seed) for seed in seeds]
    return [one for one in found if one.is_file() and one.read_text(encoding="utf-8").strip()]


def measure_raw(
    run: Run,
    number: int,
    folder: RoundFolder,
    traces: Sequence[Path],
    rows: Sequence[str],
    say: Say,
) -> dict[str, Any] | str:
    """The model with raw traces in its prompt, on the test rows; or why that cannot be measured.

    Args:
        run: as it is in this round.
        number: of the round.
        folder: of the round.
        traces: files of raw traces; of several, a row has always the same.
        rows: ids of the test rows that the other conditions were measured on.
        say: told before something that takes minutes.
    """
    known = folder.raw_traces
    if not traces:
        return "no raw_traces: not one trace fits the budget of experience.max_tokens"
    measured_run = _with_experience(run, f"{run.name}-round-{number}-raw", traces)
    texts = [file.read_text(encoding="utf-8") for file in traces]
    of = digest("\n\n".join([*texts, *rows, dump_config(measured_run)]))
    if known.is_file():
        found = json.loads(known.read_text(encoding="utf-8"))
        if found["of"] == of:
            return found
    say(f"measuring raw traces as context: {', '.join(map(str, traces))}")
    try:
        parts = assemble(measured_run)
        items = rows_of(parts, "test", run.evaluation.test_rows)
    except OverLongError as error:
        return f"no raw_traces: {error}"
    if [item.task.id for item in items] != list(rows):
        return f"no raw_traces: with them {len(items)} of {len(rows)} test rows fit the model"
    responses = respond(parts, items, "in_context")
    metrics = {**by_metric(responses), **lengths_of(responses)}
    found = {
        "of": of,
        "metrics": {name: estimate(values).as_json() for name, values in metrics.items()},
        "answers": [
            {"id": item.task.id, "text": r.text, "note": r.score.note, **r.score.metrics}
            for item, r in zip(items, responses, strict=True)
        ],
    }
    write_json(known, found)
    return found


def paired(answers: Answers) -> list[dict[str, Any]]:
    """McNemar's exact test of the conditions on `correct`, row by row.

    Raises:
        RunFolderError: two conditions were measured on different rows.
    """
    rows = {name: [row["id"] for row in found] for name, found in answers.items()}
    for name, ids in rows.items():
        if ids != rows["baked"]:
            raise RunFolderError(
                f"{name} and baked were measured on different test rows, so they cannot stand in "
                "one table; run opcd evaluate --again on the round's runs"
            )
    marks = {
        name: [row["correct"] for row in found if "correct" in row]
        for name, found in answers.items()
    }
    return tests_of(marks, [(a, b) for a, b in PAIRS if marks.get(a) and marks.get(b)])


def _with_experience(run: Run, name: str, files: Sequence[Path]) -> Run:
    """An ordinary run whose context is these files."""
    assert run.experience, "asked of a run with experience"
    paths = tuple(file.resolve() for file in files)
    lessons = run.experience.lessons(paths[0] if len(paths) == 1 else paths)
    return derive(run, name=name, context=lessons.model_dump(mode="json"), experience=None)


def _measured(
    trained: RunFolder, run: Run, say: Say
) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """What was measured on the test rows of `run` with a trained run's weights."""
    known = read_evaluation(trained.path, "test")
    if known is None:
        say(f"measuring {trained.path}")
        parts = assemble(run)
        load_weights(parts.student, trained.best)
        known = evaluate_best(trained, parts, read_best(trained)["step"], "test")
    return known.summary, known.answers


def _chosen_by_kl(run: Run, trained_run: Run) -> list[str]:
    """A note where weights are not chosen by what the run calls right."""
    if not run.is_graded or trained_run.is_graded:
        return []
    return [
        "stored prompts have no answers, so the weights were chosen by their KL to the teacher, on "
        f"{PREFIX_VALIDATION_SHARE:.0%} of the stored prompts"
    ]


def _is_stored(run: Run) -> bool:
    return run.experience is not None and run.experience.train_on == "store"


def _is_stored_run(run: Run, folder: RoundFolder) -> bool:
    sources = run.tasks.train if run.tasks else ()
    return any(getattr(s, "path", None) == folder.prefixes.resolve() for s in sources)


def _on_store(measured: Run, run: Run, folder: RoundFolder) -> Run:
    """The run with the trajectory store's prompts to train on: no environment, and no answers.

    Raises:
        TaskError: a stored prompt is a validation or a test row.
    """
    assert run.experience, "asked of a run with experience"
    rows = saved_prefixes(read_traces(run.experience.store or folder.traces))
    prefixes = [read_row(row, row["id"], folder.prefixes.name, None) for row in rows]
    splits = {split: [task for task, _ in found] for split, found in load_rows(run, []).items()}
    check_leaks({"train": prefixes} | {n: splits.get(n, []) for n in ("validation", "test")})
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(folder.prefixes, "".join(lines))
    tasks = run.tasks.model_dump(mode="json") if run.tasks else {}
    tasks["train"] = [{"type": "jsonl", "path": str(folder.prefixes.resolve())}]
    tasks["group_by"], tasks["test_share"], tasks["extraction_share"] = None, 0.0, 0.0
    has_rows = bool(tasks.get("validation"))
    tasks["validation_share"] = 0.0 if has_rows else PREFIX_VALIDATION_SHARE
    graded = {} if has_rows else {"grader": None}
    return derive(measured, tasks=tasks, game=None, **graded)
