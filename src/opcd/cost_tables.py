"""`costs.json` as tables for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

TITLES = {
    "prompt_tokens": "prompt tokens of a request, mean of the test rows",
    "prefill": "times on this machine, median and range",
    "kv_cache": "keys and values at the end of a request",
    "training": "training",
    "break_even": "break-even, in the currency of the prices",
    "alternatives": "other ways to shorten the prompt, on the same test rows",
}
"""Section of `costs.json` -> the title of its table."""
SHARES = ("valid", "correct", "agreement", "truncated")
"""Beginnings of figures that read best as percentages, as does what ends with `_share`."""


def costs_tables(found: Mapping[str, Any]) -> list[Table]:
    """One table for each section that has rows."""
    sections = [(title, found.get(name)) for name, title in TITLES.items()]
    return [
        figures_table(title, [rows] if isinstance(rows, Mapping) else rows)
        for title, rows in sections
        if rows
    ]


def figures_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Flat rows as a table, `x` with `x_lowest` and `x_highest` in one cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [name for name in names if not name.endswith(("_lowest", "_highest"))]
    table = Table(title=title)
    for name in shown:
        words = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(
            name.replace("_", " "), justify="left" if words else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(_cell(row, name) for name in shown))
    return table


def notes_lines(found: Mapping[str, Any]) -> list[str]:
    """What the tables are about, and what is not in them."""
    return [f"{note['about']}: {note['note']}" for note in found["notes"]]


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = _figure(name, row.get(name))
    if row.get(f"{name}_lowest") is None:
        return value
    low, high = (_figure(name, row[f"{name}_{end}"]) for end in ("lowest", "highest"))
    return f"{value} [{low}, {high}]"


def _figure(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return escape(value)
    if name.startswith(SHARES) or name.endswith("_share"):
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
