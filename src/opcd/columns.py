"""The columns of a report, one for each condition of each run, and what stands in their cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd.findings import Findings
from opcd.tables import COMPARED, is_share


@dataclass(frozen=True, slots=True)
class Column:
    """One condition of one run; or of all runs, where it is the same in all."""

    label: str
    run: Findings
    condition: str
    suites: Mapping[str, Any]
    """Of the file that the column is about."""

    def metrics(self, suite: str) -> Mapping[str, Any]:
        """What was measured in a suite under this condition; empty where nothing was."""
        return self.suites.get(suite, {}).get(self.condition, {})


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
            columns.append(_column(condition, having[0], condition))
        else:
            columns += [_column(f"{condition} · {run.label}", run, condition) for run in having]
    return columns


def compared_columns(run: Findings) -> list[Column]:
    """The conditions of `comparison.json`: a run beside another way to train it."""
    return [Column(c, run, c, run.comparison["suites"]) for c in COMPARED]


def suite_tables(columns: Sequence[Column]) -> list[tuple[str, list[str], list[Any]]]:
    """Name, labels of the columns that were measured, and rows of metric, n and estimates."""
    suites = dict.fromkeys(name for c in columns for name in c.suites)
    tables: list[Any] = []
    for suite in suites:
        found = [c.metrics(suite) for c in columns]
        measured = [c for c, metrics in zip(columns, found, strict=True) if metrics]
        rows: list[Any] = []
        for metric in dict.fromkeys(name for metrics in found for name in metrics):
            counts = sorted({metrics[metric]["n"] for metrics in found if metric in metrics})
            n = ", ".join(f"{count:,}" for count in counts)
            rows.append((metric, n, [estimate_of(c, suite, metric) for c in measured]))
        tables.append((suite, [c.label for c in measured], rows))
    return tables


def estimate_of(column: Column, suite: str, metric: str) -> dict[str, Any] | None:
    """A metric of a column as texts; `None` where it was not measured."""
    found = column.metrics(suite).get(metric)
    return None if found is None else estimate_texts(metric, found)


def estimate_texts(metric: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A mean and its interval as texts, and both as shares of a bar's width."""
    low, high = found["ci95"]
    # Shares are in per cent, and their intervals wider than a decimal.
    scale, places = (100, 0) if is_share(metric) else (1, digits(found["mean"]))
    interval = f"[{scale * low:.{places}f}, {scale * high:.{places}f}]"
    bar = (100 * low, 100 * found["mean"], 100 * high) if 0 <= low <= high <= 1 else None
    return {"mean": number(metric, found["mean"]), "interval": interval, "bar": bar}


def number(metric: str, value: float) -> str:
    """A mean with as many digits as are worth reading."""
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.{digits(value)}f}"


def digits(value: float) -> int:
    """How many decimals of a number that is no share are worth reading."""
    return 1 if abs(value) >= 10 else 3


def _column(label: str, run: Findings, condition: str) -> Column:
    return Column(label, run, condition, run.summary["suites"])


def _alike(first: Findings, second: Findings, condition: str) -> bool:
    suites = [
        {name: suite.get(condition) for name, suite in run.summary["suites"].items()}
        for run in (first, second)
    ]
    texts = [{row["id"]: row[condition] for row in run.answers} for run in (first, second)]
    return suites[0] == suites[1] and texts[0] == texts[1]
