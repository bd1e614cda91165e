"""One HTML file about measured runs: what was gained, what it cost, every answer, every token."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from opcd.charts import Chart, charts_of
from opcd.columns import columns_of, estimate_of, number, suite_tables
from opcd.errors import InputError
from opcd.exhibits import answer_rows, cost_tables, cost_text, kl_legend, token_rows
from opcd.figures import inline_svg, write_figures
from opcd.findings import Findings, read_findings
from opcd.runs import write_text

ANSWERS_SHOWN = 1000
"""More than that, a browser cannot scroll; the page says what is left out."""
EXPLAINED = {
    "valid": "well-formed, says the grader",
    "correct": "right, says the grader",
    "agreement": "same text as in_context",
    "truncated": "cut off at the token limit",
    "kl_nats_per_token": "KL(base || baked) along the base's answers",
    "greedy_agreement": "tokens that base and baked both write",
    "length_ratio": "baked tokens over base tokens",
    "form": "answers in the form that was baked in",
    "quoted": "five-word runs that stand in the context",
    "talk": "answers that speak of instructions or a prompt",
    "task kl_nats_per_token": "KL to the teacher along a model's own answers",
}
"""Metric -> what it says; one suite's own meaning has the suite's name before it."""
SIGNIFICANT = 0.05


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


def headline_metric(run: Findings) -> str:
    """`correct`, or the first thing that was measured where nothing is graded."""
    names = list(run.summary["suites"]["task"]["baked"])
    return "correct" if "correct" in names else names[0]


def sentences(runs: Sequence[Findings], metric: str) -> list[str]:
    """The result, for someone who reads nothing else."""
    name = metric.replace("_", " ").capitalize()
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
        f"{tokens:,} context tokens are gone from every request.",
        f"{name}: the baked model without the context {told['baked']}, {', '.join(others)}.",
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


def paired_sentences(run: Findings) -> list[str]:
    """The paired tests in words."""
    told: list[str] = []
    for test in run.summary["paired"]:
        points = 100 * test["difference"]
        chance = (
            "more than chance explains"
            if test["p"] < SIGNIFICANT
            else "chance alone could explain it"
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


def _check_target(file: Path) -> None:
    if file.suffix not in (".html", ".htm"):
        raise InputError(f"--out {file} does not end in .html, so it may be another file; add it")
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"--out {file}: its folder is not there, or it is a folder; name a file")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
