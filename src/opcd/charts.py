"""What a run's curves are: one chart a quantity, one line a run."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opcd.findings import Findings
from opcd.glossary import metric_name
from opcd.tables import is_share

LOG_RATIO = 50
"""A curve that falls by more than this needs a logarithmic axis to show where it ends."""

TRAINING = (
    ("kl_nats_per_token", "KL to the teacher", "nats per token"),
    ("anchor_kl_nats_per_token", "KL to the base model on anchors", "nats per token"),
    (
        "context_return_kl_nats_per_token",
        "KL to base, the context given again",
        "nats per token",
    ),
    ("student_entropy_nats", "Entropy of the student", "nats"),
    ("tokens_per_response", "Response length", "tokens per response"),
    ("truncated_fraction", "Responses cut off", "% of responses"),
)
"""Key in metrics.jsonl, title, unit."""
UNMEASURED = re.compile("step|rows(_.*)?")
"""What a row of validation.jsonl holds besides measurements; `rows_METRIC` counts rows."""


@dataclass(frozen=True, slots=True)
class Line:
    """One run's curve; `None` where a value was not finite."""

    label: str
    run: int
    steps: list[int]
    values: list[float | None]
    best_step: int | None = None
    """Marked, where the chosen weights are a point of this curve."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One quantity over the steps that were done."""

    name: str
    """Of letters, digits, `_` and `-`: the file's name, and what its ids begin with."""
    title: str
    unit: str
    lines: list[Line]
    warmup_ends: dict[int, str]
    """After how many steps a warm-up ended, and whose."""

    @property
    def gaps(self) -> int:
        """How many values were not finite and are left out."""
        return sum(value is None for line in self.lines for value in line.values)

    @property
    def is_logarithmic(self) -> bool:
        """Whether the values are all positive and too far apart for a linear axis."""
        values = [v for line in self.lines for v in line.values if v is not None]
        return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_RATIO


def charts_of(runs: Sequence[Findings]) -> list[Chart]:
    """Every quantity that at least one of the runs has values of."""
    warmups = _warmup_ends(runs)
    charts = [
        Chart(name, title, unit, _lines(runs, name, "metrics"), warmups)
        for name, title, unit in TRAINING
    ]
    names = dict.fromkeys(key for run in runs for row in run.validation for key in row)
    for name in names:
        if not UNMEASURED.fullmatch(name):
            unit = "nats per token" if name == "kl_nats_per_token" else _unit(name)
            title = "KL to the teacher" if name == "kl_nats_per_token" else metric_name(name)
            lines = _lines(runs, name, "validation")
            slug = re.sub(r"[^A-Za-z0-9_-]", "_", f"validation_{name}")
            charts.append(Chart(slug, f"Validation: {title}", unit, lines, warmups))
    return [chart for chart in charts if chart.lines]


def _warmup_ends(runs: Sequence[Findings]) -> dict[int, str]:
    ends: dict[int, list[str]] = {}
    for run in runs:
        if 0 < run.warmup_steps <= max((row["step"] + 1 for row in run.metrics), default=0):
            ends.setdefault(run.warmup_steps, []).append(run.label)
    whole = len(ends) == 1 and len(runs) == len(next(iter(ends.values())))
    return {steps: "" if whole else f" ({', '.join(labels)})" for steps, labels in ends.items()}


def _lines(runs: Sequence[Findings], name: str, source: str) -> list[Line]:
    return list(_lines_with_values(runs, name, source))


def _lines_with_values(runs: Sequence[Findings], name: str, source: str) -> Iterator[Line]:
    for index, run in enumerate(runs):
        rows = [row for row in getattr(run, source) if name in row]
        if rows and _is_measured(run, name):
            best = run.best["step"] if source == "validation" else None
            steps = [row["step"] + 1 for row in rows]
            yield Line(run.label, index, steps, [row[name] for row in rows], best)


def _is_measured(run: Findings, name: str) -> bool:
    """Without prompts of a kind their KL is written as 0, which is no measurement."""
    shares = {
        "anchor_": run.config.anchor.share,
        "context_return_": run.config.anchor.context_return,
    }
    return all(share > 0 for prefix, share in shares.items() if name.startswith(prefix))


def _unit(name: str) -> str:
    if is_share(name):
        return "% of rows"
    return "nats" if name.endswith("_nats") else "mean over rows"
