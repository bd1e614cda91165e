"""The columns of a report, one for each condition of each run, and what stands in their cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opcd.findings import Findings
from opcd.tables import is_share


@dataclass(frozen=True, slots=True)
class Column:
    """One condition of one run; or of all runs, where it is the same in all."""

    label: str
    run: Findings
    condition: str


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


def suite_tables(columns: Sequence[Column]) -> list[tuple[str, list[str], list[Any]]]:
    """Name, labels of the columns that were measured, and rows of metric, n and estimates."""
    suites = dict.fromkeys(name for c in columns for name in c.run.summary["suites"])
    tables: list[Any] = []
    for suite in suites:
        found = [c.run.summary["suites"].get(suite, {}).get(c.condition, {}) for c in columns]
        measured = [c for c, metrics in zip(columns, found, strict=True) if metrics]
        rows: list[Any] = []
        for metric in dict.fromkeys(name for metrics in found for name in metrics):
            counts = sorted({metrics[metric]["n"] for metrics in found if metric in metrics})
            n = ", ".join(f"{count:,}" for count in counts)
            rows.append((metric, n, [estimate_of(c, suite, metric) for c in measured]))
        tables.append((suite, [c.label for c in measured], rows))
    return tables


def estimate_of(column: Column, suite: str, metric: str) -> dict[str, Any] | None:
    """A metric of a column as texts, with its interval as shares of a bar's width."""
    found = column.run.summary["suites"].get(suite, {}).get(column.condition, {}).get(metric)
    if found is None:
        return None
    low, high = found["ci95"]
    # Shares are in per cent, and their intervals wider than a decimal.
    scale, digits = (100, 0) if is_share(metric) else (1, _digits(found["mean"]))
    interval = f"[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
    bar = (100 * low, 100 * found["mean"], 100 * high) if 0 <= low <= high <= 1 else None
    return {"mean": number(metric, found["mean"]), "interval": interval, "bar": bar}


def number(metric: str, value: float) -> str:
    """A mean with as many digits as are worth reading."""
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.{_digits(value)}f}"


def _alike(first: Findings, second: Findings, condition: str) -> bool:
    suites = [
        {name: suite.get(condition) for name, suite in run.summary["suites"].items()}
        for run in (first, second)
    ]
    texts = [{row["id"]: row[condition] for row in run.answers} for run in (first, second)]
    return suites[0] == suites[1] and texts[0] == texts[1]


def _digits(value: float) -> int:
    return 1 if abs(value) >= 10 else 3
