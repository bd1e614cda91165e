"""The honest table: base, in_context, off_policy and baked on the same test rows.

`off_policy` is classic context distillation: the teacher's own answers, forward KL, and the same
number of steps and prompts. What is missing is trained, what is there is used; with several
seeds, each way of training is run that often.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd.checkpoint import complete
from opcd.config import Run, derive
from opcd.errors import ConfigError, RunFolderError
from opcd.intervals import mcnemar
from opcd.programs import evaluate_run, read_evaluation
from opcd.runs import RunFolder, make_folder, open_run, read_best, read_jsonl, write_json
from opcd.training import check_resumable, train

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished run with what was measured on it."""

    run: Run
    summary: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]]


def compare(run: Run, seeds: int, rates: Sequence[float], say: Say) -> dict[str, Any]:
    """Train and measure what is missing; write and return `comparison.json`.

    Args:
        run: the run to compare; it is the `baked` of the table.
        seeds: training runs of each kind, from the run's own seed upwards.
        rates: learning rates that each kind chooses one of, on validation; none: the run's own.
        say: told before something that takes minutes.

    Raises:
        ConfigError: the teacher cannot answer, or there is nothing to choose a rate on.
        RunFolderError: a folder holds a run with other values, or two runs other test rows.
        RunError: training failed or was interrupted; what is there is kept, and used next time.
    """
    ways, searches = {"baked": run, "off_policy": off_policy(run)}, {}
    if rates:
        searches = {kind: search(one, rates, say) for kind, one in ways.items()}
        ways = {kind: with_rate(one, searches[kind]["chosen"]) for kind, one in ways.items()}
    kinds = {kind: [with_seed(one, n) for n in range(seeds)] for kind, one in ways.items()}
    measured = {
        kind: [measure(ensure_trained(one, say), say) for one in runs]
        for kind, runs in kinds.items()
    }
    check_same_rows([m for several in measured.values() for m in several])
    found = {**comparison(measured), "searches": searches}
    write_json(make_folder(run).comparison, found)
    return found


def off_policy(run: Run) -> Run:
    """The run as classic context distillation, under a name of its own.

    Raises:
        ConfigError: the run's teacher cannot answer, since its weights move.
    """
    return derive(
        run,
        name=f"{run.name}-off_policy",
        rollout={"teacher_fraction": 1.0},
        loss={"direction": "forward_kl", "warmup": None},
    )


def with_seed(run: Run, number: int) -> Run:
    """The run with a later seed, under a name of its own; number 0 is the run itself."""
    if number == 0:
        return run
    return derive(run, name=f"{run.name}-seed{run.seed + number}", seed=run.seed + number)


def with_rate(run: Run, rate: float) -> Run:
    """The run with a learning rate, under a name of its own."""
    return derive(run, name=f"{run.name}-lr{rate:g}", optimizer={"lr": rate})


def ensure_trained(run: Run, say: Say) -> RunFolder:
    """The folder of the finished run: trained now, continued, or there already.

    Raises:
        RunFolderError: the folder holds a run with other values, or training was interrupted.
    """
    folder = RunFolder(run.out / run.name)
    began, anew = folder.config.is_file(), False
    if began:
        check_resumable(run)
        if sum(1 for _ in read_jsonl(folder.metrics)) >= run.steps and folder.best.is_dir():
            return folder
        # Killed before its first checkpoint, it has nothing to go on from, and nothing to lose.
        anew = not complete(folder.checkpoints)
    say(f"training {folder.path}" + " anew: it stopped before its first checkpoint" * anew)
    outcome = train(run, resume=began and not anew, overwrite=anew)
    if outcome.interrupted_by is not None:
        raise RunFolderError(
            f"{folder.path} was interrupted after step {outcome.steps}, so there is nothing to "
            "compare yet; the same command goes on from there"
        )
    return folder


def measure(folder: RunFolder, say: Say) -> Measured:
    """What was measured on a finished run's test rows, or is measured now."""
    _, run = open_run(folder.path)
    known = read_evaluation(folder.path, "test")
    if known is None:
        say(f"measuring {folder.path}")
        known = evaluate_run(folder.path)
    return Measured(run, known.summary, known.answers)


def check_same_rows(measured: Sequence[Measured]) -> None:
    """Refuse to compare runs that answered other rows.

    Raises:
        RunFolderError: naming two of them.
    """
    first, *others = measured
    rows = [row["id"] for row in first.answers]
    for other in others:
        if [row["id"] for row in other.answers] != rows:
            raise RunFolderError(
                f"{first.run.name} and {other.run.name} were measured on different test rows, so "
                "their figures cannot stand in one table; run opcd evaluate --again on both"
            )


def comparison(measured: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """The four conditions on the same rows, paired, with the spread over training runs."""
    first = {kind: several[0] for kind, several in measured.items()}
    task = first["baked"].summary["suites"]["task"]
    conditions = {
        "base": task["base"],
        "in_context": task["in_context"],
        "off_policy": first["off_policy"].summary["suites"]["task"]["baked"],
        "baked": task["baked"],
    }
    others = {
        name: {kind: one.summary["suites"][name].get("baked", {}) for kind, one in first.items()}
        for name in first["baked"].summary["suites"]
        if name != "task" and name in first["off_policy"].summary["suites"]
    }
    return {
        "split": "test",
        "rows": len(first["baked"].answers),
        "checkpoints": {
            one.run.name: one.summary["checkpoint"]
            for several in measured.values()
            for one in several
        },
        "lr": {kind: one.run.optimizer.lr for kind, one in first.items()},
        "suites": {"task": conditions, **others},
        "paired": paired(first),
        "seeds": {kind: spread(several) for kind, several in measured.items()},
    }


def paired(first: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """McNemar's exact test of each pair of conditions on `correct`; none without a grader."""
    rows = first["baked"].answers
    if not rows or "correct" not in rows[0]["baked"]:
        return []
    marks = {c: [row[c]["correct"] for row in rows] for c in ("base", "in_context", "baked")}
    marks["off_policy"] = [row["baked"]["correct"] for row in first["off_policy"].answers]
    pairs = (
        ("baked", "off_policy"),
        ("baked", "in_context"),
        ("off_policy", "in_context"),
        ("baked", "base"),
        ("off_policy", "base"),
        ("in_context", "base"),
    )
    return tests_of(marks, pairs)


def tests_of(
    marks: Mapping[str, Sequence[float]], pairs: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """McNemar's exact test of each pair of conditions, whose marks are of the same rows."""
    return [
        {
            "suite": "task",
            "metric": "correct",
            "first": a,
            "second": b,
            "difference": statistics.fmean(marks[a]) - statistics.fmean(marks[b]),
            "p": mcnemar(marks[a], marks[b]),
            "test": "McNemar, exact",
        }
        for a, b in pairs
    ]


def spread(several: Sequence[Measured]) -> dict[str, Any]:
    """Mean and standard deviation of the baked metrics over training runs."""
    tables = [one.summary["suites"]["task"]["baked"] for one in several]
    found: dict[str, Any] = {"runs": len(several)}
    for name in tables[0]:
        values = [table[name]["mean"] for table in tables]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {"mean": statistics.fmean(values), "deviation": deviation}
    return found


def search(run: Run, rates: Sequence[float], say: Say) -> dict[str, Any]:
    """Train with each learning rate, choose on validation; write and return `search.json`.

    Raises:
        ConfigError: the run has no validation split to choose on; nothing was trained.
        RunFolderError: a folder holds a run with other values.
    """
    if not run.has_validation:
        raise ConfigError(
            f"{run.name} has no validation split, so no learning rate can be chosen; add "
            "tasks.validation or tasks.validation_share, or boards in game.boards.validation"
        )
    rows: list[dict[str, Any]] = []
    for rate in rates:
        one = with_rate(run, rate)
        best = read_best(ensure_trained(one, say))
        rows.append({"lr": rate, "run": one.name, **best})
    name = rows[0]["chosen_by"]
    sign = -1.0 if name == "kl_nats_per_token" else 1.0
    # Equal shares of right answers are told apart by the distance to the teacher.
    chosen = max(rows, key=lambda row: (sign * row[name], -row["kl_nats_per_token"]))
    found = {"split": "validation", "selected_by": name, "chosen": chosen["lr"], "rows": rows}
    write_json(make_folder(run).search, found)
    return found
