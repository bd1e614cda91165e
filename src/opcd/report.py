"""One HTML file about measured runs: what was gained, what it cost, every answer, every token."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from opcd.errors import InputError
from opcd.figures import Chart, charts_of, inline_svg, write_figures
from opcd.findings import Findings, read_findings
from opcd.runs import write_text
from opcd.tables import is_share

ANSWERS_SHOWN = 1000
TOKEN_ROWS_SHOWN = 200
"""Limits of what a browser can scroll; the page says what is left out."""
KL_EDGES_NATS = (0.01, 0.1, 0.5, 2.0, 8.0)
"""Where one colour of a token ends and the next begins."""
COST_TABLES = {
    "prompt_tokens": "Tokens in a prompt",
    "prefill": "Reading the prompt",
    "kv_cache": "Keys and values in memory",
    "training": "Training",
    "break_even": "Break-even",
}
"""Key in costs.json, heading; other keys follow under their own names."""
EXPLAINED = {
    "valid": "well-formed, says the grader",
    "correct": "right, says the grader",
    "agreement": "same text as in_context",
    "truncated": "cut off at the token limit",
    "kl_nats_per_token": "KL(base || baked) under other system messages",
    "greedy_agreement": "tokens that base and baked both write",
}
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Column:
    """One condition of one run; or of all runs, where it is the same in all."""

    label: str
    run: Findings
    condition: str


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
    file = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if file.suffix not in (".html", ".htm"):
        raise InputError(f"--out {file} does not end in .html, so it may be another file; add it")
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"--out {file}: its folder is not there, or it is a folder; name a file")
    runs = read_findings(paths)
    charts = charts_of(runs)
    html = render(runs, charts)
    write_text(file, html)
    written = write_figures(charts, figures) if figures else []
    return Report(file, len(html.encode()), written)


def render(runs: Sequence[Findings], charts: Sequence[Chart]) -> str:
    """The page; all text of models and rows is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = _sha256
    environment.filters["cell"] = cost_text
    source = (resources.files("opcd") / "report.html").read_text(encoding="utf-8")
    columns = columns_of(runs)
    metric = headline_metric(runs[0])
    return environment.from_string(source).render(
        runs=runs,
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared",
        metric=metric,
        headline=[(column.label, estimate_of(column, "task", metric)) for column in columns],
        sentences=sentences(runs, metric),
        facts=facts(runs),
        columns=[column.label for column in columns],
        suites=suite_tables(columns),
        explained=EXPLAINED,
        paired=[(run.label, paired_sentences(run)) for run in runs],
        totals=totals(runs),
        costs=[(run.label, cost_tables(run.costs)) for run in runs],
        charts=[(chart, Markup(inline_svg(chart))) for chart in charts],
        answers=answer_rows(columns, runs)[:ANSWERS_SHOWN],
        answer_count=len(runs[0].answers),
        graded=all("correct" in row[c.condition] for c in columns for row in c.run.answers),
        tokens=token_rows(runs),
        token_count=sum(len(run.token_kl) for run in runs),
        untraced=[run for run in runs if not run.token_kl],
        legend=kl_legend(),
        configs=[(run.label, run.folder.config.read_text(encoding="utf-8")) for run in runs],
    )


def columns_of(runs: Sequence[Findings]) -> list[Column]:
    """Each condition once, if all runs agree on its numbers and texts, else for each run."""
    names = sorted(
        dict.fromkeys(c for run in runs for c in run.conditions), key=lambda c: c == "baked"
    )
    columns: list[Column] = []
    for condition in names:
        having = [run for run in runs if condition in run.conditions]
        same = condition != "baked" and all(_alike(having[0], run, condition) for run in having)
        if len(runs) == 1 or (same and len(having) == len(runs)):
            columns.append(Column(condition, having[0], condition))
        else:
            columns += [Column(f"{condition} · {run.label}", run, condition) for run in having]
    return columns


def headline_metric(run: Findings) -> str:
    """`correct`, or the first thing that was measured where nothing is graded."""
    names = list(run.summary["suites"]["task"]["baked"])
    return "correct" if "correct" in names else names[0]


def sentences(runs: Sequence[Findings], metric: str) -> list[str]:
    """The result, for someone who reads nothing else."""
    if len(runs) > 1:
        means = {run.label: run.summary["suites"]["task"]["baked"].get(metric) for run in runs}
        found = [f"{label} {number(metric, m['mean'])}" for label, m in means.items() if m]
        return [f"{metric.replace('_', ' ')} without the context: {', '.join(found)}."]
    task, tokens = runs[0].summary["suites"]["task"], runs[0].summary["context_tokens"]
    told = {name: number(metric, rows[metric]["mean"]) for name, rows in task.items()}
    others = [
        f"the base model {where} it {told[name]}"
        for name, where in (("in_context", "with"), ("base", "without"))
        if name in told
    ]
    return [
        f"{tokens:,} context tokens are gone from every request.",
        f"{metric.replace('_', ' ').capitalize()}: the baked model without the context "
        f"{told['baked']}, {', '.join(others)}.",
    ]


def facts(runs: Sequence[Findings]) -> list[tuple[str, list[str]]]:
    """What was measured: one row a fact, one cell a run."""
    told = {
        "model": lambda run: run.config.model.path,
        "tuning": lambda run: run.config.model.tuning.type,
        "context": lambda run: run.config.context.type,
        "context tokens gone": lambda run: f"{run.summary['context_tokens']:,}",
        "checkpoint": lambda run: run.summary["checkpoint"],
        "chosen by": lambda run: run.best.get("chosen_by", "not said"),
        "split": lambda run: run.summary["split"],
        "rows": lambda run: f"{len(run.answers):,}",
        "seed": lambda run: str(run.summary["seed"]),
    }
    return [(name, [tell(run) for run in runs]) for name, tell in told.items()]


def suite_tables(columns: Sequence[Column]) -> list[tuple[str, list[tuple[str, str, list[Any]]]]]:
    """Each suite's metrics: name, rows, and an estimate or `None` for each column."""
    suites = dict.fromkeys(name for c in columns for name in c.run.summary["suites"])
    tables: list[Any] = []
    for suite in suites:
        found = [c.run.summary["suites"].get(suite, {}).get(c.condition, {}) for c in columns]
        rows: list[Any] = []
        for metric in dict.fromkeys(name for metrics in found for name in metrics):
            counts = sorted({metrics[metric]["n"] for metrics in found if metric in metrics})
            n = ", ".join(f"{count:,}" for count in counts)
            rows.append((metric, n, [estimate_of(c, suite, metric) for c in columns]))
        tables.append((suite, rows))
    return tables


def estimate_of(column: Column, suite: str, metric: str) -> dict[str, Any] | None:
    """A metric of a column as texts, with its interval as shares of a bar's width."""
    found = column.run.summary["suites"].get(suite, {}).get(column.condition, {}).get(metric)
    if found is None:
        return None
    low, high = found["ci95"]
    interval = f"{100 * low:.0f}, {100 * high:.0f}" if is_share(metric) else f"{low:.3f}, {high:.3f}"
    bar = (100 * low, 100 * found["mean"], 100 * high) if 0 <= low <= high <= 1 else None
    return {"mean": number(metric, found["mean"]), "interval": f"[{interval}]", "bar": bar}


def number(metric: str, value: float) -> str:
    """A mean with as many digits as are worth reading."""
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.3f}"


def paired_sentences(run: Findings) -> list[str]:
    """The paired tests in words."""
    told: list[str] = []
    for test in run.summary["paired"]:
        points = 100 * test["difference"]
        chance = (
            "more than chance explains"
            if test["p"] < SIGNIFICANT
            else "chance alone explains it well enough"
        )
        p = "p < 0.001" if test["p"] < 0.001 else f"p = {test['p']:.2g}"
        where = "above" if points > 0 else "below"
        distance = f"{abs(points):.1f} points {where}" if points else "level with"
        told.append(
            f"{test['first']} is {distance} {test['second']} in {test['metric']}: {chance} "
            f"({p}, {test['test']}, {len(run.answers):,} rows)."
        )
    return told


def totals(runs: Sequence[Findings]) -> list[tuple[str, list[str]]]:
    """What training took, from metrics.jsonl: one row a quantity, one cell a run."""

    def total(run: Findings, key: str) -> float:
        return sum(row.get(key) or 0 for row in run.metrics)

    told = {
        "steps": lambda run: f"{len(run.metrics):,}",
        "steps skipped": lambda run: f"{total(run, 'skipped_steps'):,.0f}",
        "response tokens trained on": lambda run: f"{total(run, 'response_tokens'):,.0f}",
        "wall, s": lambda run: f"{total(run, 'wall_s'):,.1f}",
        "of it answering, s": lambda run: f"{total(run, 'rollout_s'):,.1f}",
        "of it the teacher, s": lambda run: f"{total(run, 'teacher_s'):,.1f}",
        "of it the student, s": lambda run: f"{total(run, 'train_s'):,.1f}",
        "peak memory, GiB": lambda run: (
            f"{max((row.get('peak_bytes') or 0 for row in run.metrics), default=0) / 2**30:.2f}"
        ),
    }
    return [(name, [tell(run) for run in runs]) for name, tell in told.items()]


def cost_tables(costs: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Tables of `costs.json`: heading, column names, rows; whatever the numbers are."""
    tables: list[tuple[str, list[str], list[list[Any]]]] = []
    for key in [*(k for k in COST_TABLES if k in costs), *(k for k in costs if k not in COST_TABLES)]:
        heading, value = COST_TABLES.get(key, key.replace("_", " ")), costs[key]
        if isinstance(value, Mapping):
            tables.append((heading, ["", ""], [[name, v] for name, v in value.items()]))
        elif isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
            names = list(dict.fromkeys(name for row in value for name in row))
            tables.append((heading, names, [[row.get(name) for name in names] for row in value]))
        else:
            tables.append((heading, ["", ""], [[key, value]]))
    return tables


def cost_text(value: Any) -> str:
    """A value of `costs.json` as text."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False)


def answer_rows(columns: Sequence[Column], runs: Sequence[Findings]) -> list[dict[str, Any]]:
    """Each task with its answers under all columns, and the filters that it passes."""
    by_id = [{row["id"]: row for row in column.run.answers} for column in columns]
    rows: list[dict[str, Any]] = []
    others = [{row["id"]: row for row in run.answers} for run in runs]
    for row in runs[0].answers:
        tags = sorted(set().union(*(_tags(rows_of_run[row["id"]]) for rows_of_run in others)))
        cells = [
            (column.label, rows_of_run[row["id"]][column.condition])
            for column, rows_of_run in zip(columns, by_id, strict=True)
        ]
        answer = row.get("answer")
        expected = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        rows.append(
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "expected": None if answer is None else expected,
                "tags": " ".join(tags),
                "cells": cells,
            }
        )
    return rows


def token_rows(runs: Sequence[Findings]) -> list[dict[str, Any]]:
    """Answers whose tokens carry the KL that the context causes there, two lines each."""
    share = max(1, TOKEN_ROWS_SHOWN // len(runs))
    return [
        {
            "id": row.get("id", ""),
            "prompt": row.get("prompt", ""),
            "run": run.label if len(runs) > 1 else "",
            "lines": [
                (name, [_token(*pair) for pair in zip(row["tokens"], row[key], strict=True)])
                for name, key in (("base", "base_kl_nats"), ("baked", "baked_kl_nats"))
            ],
        }
        for run in runs
        for row in run.token_kl[:share]
    ]


def kl_legend() -> list[tuple[int, str]]:
    """The colours' levels and what they stand for, in nats."""
    edges = [f"{edge:g}" for edge in KL_EDGES_NATS]
    between = [f"{low} to {high}" for low, high in zip(edges, edges[1:], strict=False)]
    return list(enumerate([f"below {edges[0]}", *between, f"{edges[-1]} and more"]))


def _token(text: str, kl_nats: float | None) -> tuple[str, int | str, str]:
    """What is shown, the level of its colour, and its number."""
    shown = text.replace("\n", "↵\n") or "∅"
    if kl_nats is None:
        return shown, "x", "not finite"
    return shown, sum(kl_nats >= edge for edge in KL_EDGES_NATS), f"{max(kl_nats, 0):.3f}"


def _tags(row: Mapping[str, Any]) -> set[str]:
    baked, tags = row["baked"], set[str]()
    if "in_context" in row and baked["text"] != row["in_context"]["text"]:
        tags.add("differs")
    if baked.get("correct", 1) < 1:
        tags.add("wrong")
    elif row.get("base", {}).get("correct", 1) < 1:
        tags.add("fixed")
    return tags


def _alike(first: Findings, second: Findings, condition: str) -> bool:
    suites = [
        {name: suite.get(condition) for name, suite in run.summary["suites"].items()}
        for run in (first, second)
    ]
    texts = [{row["id"]: row[condition] for row in run.answers} for run in (first, second)]
    return suites[0] == suites[1] and texts[0] == texts[1]


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
