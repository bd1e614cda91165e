"""One HTML file about measured runs: what was gained, what it cost, every answer, every token."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from opcd.charts import Chart, charts_of
from opcd.columns import Column, columns_of, compared_columns, estimate_of, number, suite_tables
from opcd.companions import gap_grids, harness_grid, paired_sentences, search_grid, spread_grid
from opcd.cost_tables import cost_grids, notes_lines
from opcd.errors import InputError
from opcd.exhibits import answer_rows, kl_legend, token_rows
from opcd.figures import inline_svg, write_figures
from opcd.findings import Findings, read_findings
from opcd.glossary import CONDITIONS, SUITES, explanation, metric_name
from opcd.intervals import SIGNIFICANT
from opcd.runs import write_text
from opcd.verdict import verdict

ANSWERS_SHOWN = 1000
"""More than that, a browser cannot scroll; the page says what is left out."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was written."""

    file: Path
    size_bytes: int
    figures: list[Path]


def write_report(paths: Sequence[Path], out: Path | None, figures: Path | None) -> Report:
    """Write one page about these runs, and their curves as files where a folder is given.

    Raises:
        InputError: a run cannot be reported, or a target cannot be written.
    """
    if out:
        _check_target(out)
    runs = read_findings(paths)
    file = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    charts = charts_of(runs)
    html = render(runs, charts)
    written = write_figures(charts, figures) if figures else []
    write_text(file, html)
    return Report(file, len(html.encode()), written)


def render(runs: Sequence[Findings], charts: Sequence[Chart]) -> str:
    """The page; all text of models and rows is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = _sha256
    environment.filters["named"] = metric_name
    environment.globals["explanation"] = explanation
    source = (resources.files("opcd") / "report.html").read_text(encoding="utf-8")
    columns = columns_of(runs)
    metric = headline_metric(runs[0])
    return environment.from_string(source).render(
        runs=runs,
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared",
        metric=metric,
        headline=bars(columns, metric),
        sentences=sentences(runs, metric),
        facts=facts(runs),
        meant=conditions_met(columns),
        columns=[column.label for column in columns],
        suites=suite_tables(columns),
        suite_names=SUITES,
        paired=[
            (run.label, paired_sentences(run.summary["paired"]), len(run.answers)) for run in runs
        ],
        totals=totals(runs),
        charts=[(chart, Markup(inline_svg(chart))) for chart in charts],
        answers=answer_rows(columns, runs)[:ANSWERS_SHOWN],
        answer_count=len(runs[0].answers),
        graded=all("correct" in row[c.condition] for c in columns for row in c.run.answers),
        tokens=token_rows(runs),
        token_count=sum(len(run.token_kl) for run in runs),
        untraced=[run for run in runs if not run.token_kl],
        legend=kl_legend(),
        configs=[(run.label, run.folder.config.read_text(encoding="utf-8")) for run in runs],
        **companions(runs),
    )


def companions(runs: Sequence[Findings]) -> dict[str, Any]:
    """What the page shows of the files that a run may have or not."""
    return {
        "compared": [compared(run) for run in runs if run.comparison],
        "searched": [(run.label, search_grid(run.search)) for run in runs if run.search],
        "expected": [
            (run.label, run.gap, verdict(run.gap), gap_grids(run.gap)) for run in runs if run.gap
        ],
        "harnessed": [
            (run.label, run.harness, harness_grid(run.harness)) for run in runs if run.harness
        ],
        "costs": [
            (run.label, cost_grids(run.costs), notes_lines(run.costs) if run.costs else [])
            for run in runs
        ],
    }


def compared(run: Findings) -> dict[str, Any]:
    """A run beside another way to train it, on the same rows."""
    columns, found = compared_columns(run), run.comparison
    metric = headline_metric(run)
    return {
        "label": run.label,
        "found": found,
        "metric": metric,
        "meant": conditions_met(columns),
        "bars": bars(columns, metric),
        "columns": [column.label for column in columns],
        "suites": suite_tables(columns),
        "paired": paired_sentences(found["paired"]),
        "spread": spread_grid(found),
    }


def bars(columns: Sequence[Column], metric: str) -> list[tuple[str, dict[str, Any]]]:
    """The headline: a metric of the task under each condition that it was measured under."""
    found = [(column.label, estimate_of(column, "task", metric)) for column in columns]
    return [(label, estimate) for label, estimate in found if estimate]


def conditions_met(columns: Sequence[Column]) -> dict[str, str]:
    """The conditions of a table, and what they mean."""
    met = {column.condition for column in columns}
    return {name: meaning for name, meaning in CONDITIONS.items() if name in met}


def headline_metric(run: Findings) -> str:
    """`correct`, or the first thing that was measured where nothing is graded."""
    names = list(run.summary["suites"]["task"]["baked"])
    return "correct" if "correct" in names else names[0]


def sentences(runs: Sequence[Findings], metric: str) -> list[str]:
    """The result, for someone who reads nothing else."""
    name = metric_name(metric)
    name = name[0].upper() + name[1:]
    if len(runs) > 1:
        means = {run.label: run.summary["suites"]["task"]["baked"].get(metric) for run in runs}
        found = [f"{label} {number(metric, m['mean'])}" for label, m in means.items() if m]
        gone = [f"{run.label} {run.summary['context_tokens']:,}" for run in runs]
        return [
            f"{name}, baked, without the context: {', '.join(found)}.",
            f"Context tokens gone from every request: {', '.join(gone)}.",
        ]
    task, tokens = runs[0].summary["suites"]["task"], runs[0].summary["context_tokens"]
    told = {c: number(metric, rows[metric]["mean"]) for c, rows in task.items()}
    others = [
        f"the base model {where} it {told[condition]}"
        for condition, where in (("in_context", "with"), ("base", "without"))
        if condition in told
    ]
    return [
        f"{name}: the baked model without the context {told['baked']}, {', '.join(others)}.",
        *losses(runs[0].summary["paired"], metric),
        f"{tokens:,} context tokens are gone from every request.",
    ]


def losses(paired: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Where the weights do worse than the prompt did, said before anything is praised."""
    return [
        f"Not all of it was baked in: {-100 * test['difference']:.1f} points are missing to the "
        f"model with the context (p = {test['p']:.2g})."
        for test in paired
        if [test[key] for key in ("suite", "first", "second", "metric")]
        == ["task", "baked", "in_context", metric]
        and test["difference"] < 0
        and test["p"] < SIGNIFICANT
    ]


def facts(runs: Sequence[Findings]) -> list[tuple[str, list[str]]]:
    """What was measured: one row a fact, one cell a run."""
    told = {
        "model": lambda run: run.config.model.path,
        "tuning": lambda run: run.config.model.tuning.type,
        "context": lambda run: run.config.context.type,
        "context tokens gone": lambda run: f"{run.summary['context_tokens']:,}",
        "checkpoint": lambda run: run.summary["checkpoint"],
        "chosen by": lambda run: metric_name(run.best.get("chosen_by", "not said")),
        "split": lambda run: run.summary["split"],
        "rows": lambda run: f"{len(run.answers):,}",
        "seed": lambda run: str(run.summary["seed"]),
    }
    return [(name, [tell(run) for run in runs]) for name, tell in told.items()]


def totals(runs: Sequence[Findings]) -> list[tuple[str, list[str]]]:
    """What training took, from metrics.jsonl: one row a quantity, one cell a run."""

    def total(run: Findings, key: str) -> float:
        return sum(row.get(key) or 0 for row in run.metrics)

    told = {
        "steps": lambda run: f"{len(run.metrics):,}",
        "steps skipped": lambda run: f"{total(run, 'skipped_steps'):,.0f}",
        "response tokens trained on": lambda run: f"{total(run, 'response_tokens'):,.0f}",
        "time, s": lambda run: f"{total(run, 'wall_s'):,.1f}",
        "of it answering, s": lambda run: f"{total(run, 'rollout_s'):,.1f}",
        "of it the teacher, s": lambda run: f"{total(run, 'teacher_s'):,.1f}",
        "of it the student, s": lambda run: f"{total(run, 'train_s'):,.1f}",
        "peak memory, GiB": lambda run: (
            f"{max((row.get('peak_bytes') or 0 for row in run.metrics), default=0) / 2**30:.2f}"
        ),
    }
    return [(name, [tell(run) for run in runs]) for name, tell in told.items()]


def _check_target(file: Path) -> None:
    if file.suffix not in (".html", ".htm"):
        raise InputError(f"--out {file} does not end in .html, so it may be another file; add it")
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"--out {file}: its folder is not there, or it is a folder; name a file")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
