"""Results as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from opcd.authoring import Authored
from opcd.evaluation import CONDITIONS
from opcd.screening import Limits

SHARES = ("valid", "correct", "agreement", "truncated", "greedy_agreement")
"""Metrics that read best as percentages."""


def results_table(summary: Mapping[str, Any]) -> Table:
    """Each metric of each suite under the three conditions, with 95 % intervals."""
    tokens = summary["context_tokens"]
    table = Table(
        title=f"{summary['split']} split, {summary['checkpoint']}, context of {tokens} tokens"
    )
    table.add_column("suite", overflow="fold")
    table.add_column("metric", overflow="fold")
    for condition in CONDITIONS:
        table.add_column(condition, justify="right", overflow="fold")
    for suite, conditions in summary["suites"].items():
        metrics = list(dict.fromkeys(name for rows in conditions.values() for name in rows))
        for metric in metrics:
            cells = [_cell(metric, conditions.get(c, {}).get(metric)) for c in CONDITIONS]
            table.add_row(suite, metric, *cells)
        table.add_section()
    return table


def paired_lines(summary: Mapping[str, Any]) -> list[str]:
    """The paired tests in words."""
    return [
        f"{t['first']} against {t['second']}: {100 * t['difference']:+.1f} points {t['metric']}, "
        f"p = {t['p']:.2g} ({t['test']})"
        for t in summary["paired"]
    ]


def answers_table(answers: Sequence[Mapping[str, Any]], count: int) -> Table:
    """Some answers side by side, spread over the split."""
    table = Table(title=f"{min(count, len(answers))} of {len(answers)} answers", show_lines=True)
    table.add_column("prompt", ratio=3, overflow="fold")
    for condition in CONDITIONS:
        table.add_column(condition, ratio=2, overflow="fold")
    stride = max(1, len(answers) // count)
    for row in answers[::stride][:count]:
        texts = [row[condition]["text"] for condition in CONDITIONS]
        table.add_row(row["prompt"], *(_shorten(text) for text in texts))
    return table


def authored_table(found: Authored, limits: Limits) -> Table:
    """What became of every message that a model wrote."""
    likeness = f"3-word runs, Jaccard index of {limits.near_duplicate} or more"
    meaning = {
        "too long": f"over {limits.max_words} words",
        "near duplicate": likeness,
        "repeats an example": likeness,
        "quotes the context": f"{limits.quoted_share:.0%} of its 4-word runs, or "
        f"{limits.quoted_words} words in a row",
        "cut by the token limit": f"over {2 * limits.max_words} tokens",
    }
    table = Table(title=f"{found.drawn} messages drawn in {found.rounds} rounds")
    table.add_column("what", overflow="fold")
    table.add_column("messages", justify="right")
    table.add_column("where the line is drawn", overflow="fold")
    table.add_row("kept", str(len(found.rows)), "")
    for reason, count in found.dropped.most_common():
        table.add_row(reason, str(count), meaning.get(reason, ""))
    return table


def _cell(metric: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    mean, (low, high) = found["mean"], found["ci95"]
    if metric in SHARES or metric.startswith("correct_"):
        return f"{100 * mean:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
