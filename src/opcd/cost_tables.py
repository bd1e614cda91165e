"""`costs.json` as people read it, on a terminal and on a page: titles, headings, units, order."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from opcd.glossary import METRICS
from opcd.tables import Grid, is_share

TITLES = {
    "prompt_tokens": "Tokens in the prompt of a request, mean of the test rows",
    "prefill": "Times on this machine, median [lowest, highest]",
    "kv_cache": "Keys and values in memory at the end of a request",
    "training": "Training, pass by pass",
    "break_even": "Break-even, in the currency of the prices",
    "alternatives": "Other ways to shorten the prompt, on the same test rows [95 % interval]",
}
"""Section of `costs.json` -> the title of its table, in the order in which they are shown."""
HEADINGS = METRICS | {
    "rows": "test rows",
    "with_context_tokens": "with the context",
    "without_context_tokens": "without it",
    "context_tokens": "the context itself",
    "saved_share": "saved",
    "shared_tokens": "the same in all prompts",
    "batch_size": "requests at once",
    "prefill_wall_s": "prompt read, s",
    "first_token_wall_s": "first token, s",
    "decode_tokens_per_s": "tokens written per second",
    "own_tokens_per_request": "tokens a request",
    "bytes_per_request": "MiB a request",
    "shared_tokens_per_server": "tokens kept once for all",
    "bytes_per_server": "MiB kept once for all",
    "bytes_per_token": "KiB a token",
    "prompt_tokens_with_shared_once": "prompt tokens, the context read once",
    "task_response_tokens": "answers to tasks, tokens",
    "anchor_response_tokens_at_most": "answers to anchors, tokens at most",
    "context_return_response_tokens_at_most": "answers with the context, tokens at most",
    "wall_s": "time, s",
    "training_currency": "training",
    "request_currency": "a million requests with the context",
    "baked_request_currency": "a million baked requests",
    "saving_currency_per_request": "saved by a million",
    "requests": "requests to get even",
}
"""Keys of `costs.json` that say little by themselves -> what stands over their figures."""
SCALES = {
    "bytes_per_request": 2**20,
    "bytes_per_server": 2**20,
    "bytes_per_token": 2**10,
    "request_currency": 1e-6,
    "baked_request_currency": 1e-6,
    "saving_currency_per_request": 1e-6,
}
"""Keys whose heading names another unit than the file's -> how many of the file's that is."""


def cost_grids(found: Mapping[str, Any]) -> list[Grid]:
    """One table for each section that has rows."""
    return [section_grid(title, found[key]) for key, title in TITLES.items() if found.get(key)]


def costs_tables(found: Mapping[str, Any]) -> list[Table]:
    """The same for a terminal."""
    return [grid.for_terminal() for grid in cost_grids(found)]


def section_grid(title: str, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Grid:
    """Flat rows as a table, `x` with `x_lowest` and `x_highest` in one cell; one row stands up."""
    if isinstance(rows, Mapping):
        return Grid(title, ["", ""], [[heading(name), cell(rows, name)] for name in _shown([rows])])
    names = _shown(rows)
    cells = [[cell(row, name) for name in names] for row in rows]
    return Grid(title, [heading(name) for name in names], cells)


def heading(name: str) -> str:
    """What stands over the figures of a key."""
    return HEADINGS.get(name, name.replace("_", " "))


def cell(row: Mapping[str, Any], name: str) -> str:
    """A figure, with its lowest and highest where it has them."""
    value = _figure(name, row.get(name))
    if row.get(f"{name}_lowest") is None:
        return value
    ends = [row[f"{name}_{end}"] for end in ("lowest", "highest")]
    # In an interval a share's unit and decimals are noise, as in the tables of results.
    low, high = (f"{100 * end:.0f}" if _is_share(name) else _figure(name, end) for end in ends)
    return f"{value} [{low}, {high}]"


def notes_lines(found: Mapping[str, Any]) -> list[str]:
    """What the tables are about, and what is not in them."""
    return [f"{_about(note['about'])}: {note['note']}" for note in found["notes"]]


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if not name.endswith(("_lowest", "_highest"))]


def _about(section: str) -> str:
    return TITLES.get(section, section).split(",")[0]


def _is_share(name: str) -> bool:
    return is_share(name) or name.endswith("_share")


def _figure(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if _is_share(name):
        return f"{100 * value:.1f} %"
    if name in SCALES:
        value /= SCALES[name]
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:#.3g}"
