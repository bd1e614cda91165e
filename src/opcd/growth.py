"""How the score grows with what was learned: one line a seed, and their mean with its interval."""

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opcd.candidates import Scored
from opcd.figures import INK, LINES, RULE, SETTINGS
from opcd.glossary import metric_name
from opcd.intervals import Estimate, estimate
from opcd.runs import write_text
from opcd.tables import Grid, cell, is_share

MOST_COLUMNS = 4
"""More seeds than these are shown as their lowest and highest, not one by one."""


@dataclass(frozen=True, slots=True)
class Point:
    """All seeds after the same number of traces."""

    step: int
    by_seed: dict[int, Scored]
    items: float
    """On average over the seeds."""
    score: Estimate
    """Of the mean over the seeds, on the same rows; the interval is that of the rows."""


def growth_of(scored: Sequence[Scored]) -> list[Point]:
    """The points of the mean line, in the order of the traces.

    Seeds may have stopped at different steps: a point is of those that have one.
    """
    points: list[Point] = []
    for step in sorted({one.candidate.step for one in scored}):
        by_seed = {one.candidate.seed: one for one in scored if one.candidate.step == step}
        of_row = zip(*(one.marks for one in by_seed.values()), strict=True)
        means = [statistics.fmean(marks) for marks in of_row]
        items = statistics.fmean(one.candidate.items for one in by_seed.values())
        points.append(Point(step, by_seed, items, estimate(means)))
    return points


def growth_grid(scored: Sequence[Scored], chosen: Scored, metric: str, rows: int) -> Grid:
    """The same as a table: a row for each number of traces; the chosen one is marked."""
    points = growth_of(scored)
    seeds = sorted({one.candidate.seed for one in scored})
    each = len(seeds) <= MOST_COLUMNS
    columns = [f"seed {seed}" for seed in seeds] if each else ["lowest", "highest"]
    mean = [f"mean of {len(seeds)}"] if len(seeds) > 1 else []
    cells = [
        [str(point.step), f"{point.items:.3g}", f"{_tokens(point):.0f}"]
        + (_by_seed(point, seeds, chosen, metric) if each else _ends(point, chosen, metric))
        + ([cell(metric, point.score.as_json())] if mean else [])
        for point in points
    ]
    if not mean:
        columns = ["score"]
        for row, point in zip(cells, points, strict=True):
            mark = " *" if chosen in point.by_seed.values() else ""
            row[-1] = cell(metric, point.score.as_json()) + mark
    title = f"{metric_name(metric)} on {rows} validation rows, by traces learned from"
    return Grid(title, ["traces", "items", "tokens", *columns, *mean], cells)


def write_growth(file: Path, scored: Sequence[Scored], chosen: Scored, metric: str) -> None:
    """The figure as SVG, whole or not at all; the same scores give the same bytes."""
    stream = StringIO()
    no_metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = draw_growth(scored, chosen, metric)
        figure.savefig(stream, format="svg", facecolor="white", metadata=no_metadata)
    write_text(file, stream.getvalue())


def draw_growth(scored: Sequence[Scored], chosen: Scored, metric: str) -> Figure:
    """Score against number of items, in the order of the traces."""
    figure = Figure(figsize=(5.4, 3.3))
    figure.subplots_adjust(left=0.13, right=0.97, bottom=0.16, top=0.89)
    axes: Axes = figure.subplots()
    scale = 100.0 if is_share(metric) else 1.0
    points = growth_of(scored)
    seeds = sorted({one.candidate.seed for one in scored})
    for seed in seeds:
        line = [point.by_seed[seed] for point in points if seed in point.by_seed]
        axes.plot(
            [one.candidate.items for one in line],
            [scale * one.mean for one in line],
            color=LINES[2],
            linewidth=0.8,
            alpha=0.55,
            label="a seed each" if seed == seeds[0] else None,
        )
    _draw_mean(axes, points, scale)
    axes.plot(
        chosen.candidate.items,
        scale * chosen.mean,
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=LINES[1],
        linestyle="",
        label="chosen",
    )
    _label(axes, metric, len(chosen.marks))
    return figure


def _draw_mean(axes: Axes, points: Sequence[Point], scale: float) -> None:
    items = [point.items for point in points]
    low, high = ([scale * getattr(p.score, end) for p in points] for end in ("low", "high"))
    # A budget may let the items shrink again: the band is filled between neighbours, one by one.
    for i in range(len(points) - 1):
        ends = slice(i, i + 2)
        axes.fill_between(
            items[ends], low[ends], high[ends], color=LINES[0], alpha=0.14, linewidth=0
        )
    axes.plot(
        items,
        [scale * p.score.mean for p in points],
        color=LINES[0],
        linewidth=1.9,
        marker="o" if len(points) < 12 else "",
        markersize=3.5,
        label="mean, with 95 % interval",
    )


def _label(axes: Axes, metric: str, rows: int) -> None:
    axes.set_title(
        f"{metric_name(metric)} by items learned", loc="left", fontsize=10.5, weight="bold"
    )
    axes.set_xlabel("items in the experience")
    axes.set_ylabel(f"% of {rows} validation rows" if is_share(metric) else f"mean of {rows} rows")
    if is_share(metric):
        axes.set_ylim(-4, 104)
        axes.set_yticks(range(0, 101, 25))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.tick_params(length=3, color=RULE, labelcolor=INK)
    axes.legend(frameon=False, fontsize=8.5, handlelength=2.2)


def _by_seed(point: Point, seeds: Sequence[int], chosen: Scored, metric: str) -> list[str]:
    return [_score(point.by_seed.get(seed), chosen, metric) for seed in seeds]


def _ends(point: Point, chosen: Scored, metric: str) -> list[str]:
    ordered = sorted(point.by_seed.values(), key=lambda one: one.mean)
    low, high = (_number(one.mean, metric) for one in (ordered[0], ordered[-1]))
    return [low, high + (" *" if chosen in ordered else "")]


def _score(one: Scored | None, chosen: Scored, metric: str) -> str:
    if one is None:
        return ""
    return _number(one.mean, metric) + (" *" if one == chosen else "")


def _tokens(point: Point) -> float:
    return statistics.fmean(one.candidate.tokens for one in point.by_seed.values())


def _number(value: float, metric: str) -> str:
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.3f}"
