"""Curves of one run or several: the same drawing inline in a page, and as PNG and SVG files."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from opcd.charts import Chart, Line
from opcd.errors import InputError

INK, RULE = "#2b2b2b", "#d4d4d4"
LINES = ("#0b6e6e", "#b3541e", "#5a4fa0", "#8a7300", "#a8326b", "#3d6fb6")
"""Colours of runs, in turn."""
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
"""Strokes of runs, in turn: colour alone never tells two of them apart."""
THEMED = {INK: "currentColor", RULE: "var(--rule)"} | {
    colour: f"var(--line-{i})" for i, colour in enumerate(LINES)
}
"""What a page puts in the place of each colour, so that curves follow light and dark."""
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "opcd",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def inline_svg(chart: Chart) -> str:
    """The chart as an `<svg>` element that takes its colours from the page."""
    stream = io.StringIO()
    with mpl.rc_context(SETTINGS):
        _save(chart, stream, format="svg", transparent=True, metadata=_no_metadata())
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:height|width)="[\d.]+pt"', "", svg, count=2)
    # Ids are of a whole page, and all charts are in one.
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{chart.name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, themed in THEMED.items():
        svg = svg.replace(colour, themed)
    return svg


def write_figures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write each chart as a PNG and an SVG file; the files.

    Raises:
        InputError: the folder cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, so no figures can be put into it; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    with mpl.rc_context(SETTINGS):
        for chart in charts:
            for suffix in ("png", "svg"):
                file = folder / f"{chart.name}.{suffix}"
                metadata = _no_metadata() if suffix == "svg" else None
                _save(chart, file, dpi=160, facecolor="white", metadata=metadata)
                files.append(file)
    return files


def draw(chart: Chart) -> Figure:
    """The chart, in the colours of a white page."""
    figure = Figure(figsize=(4.6, 2.9))
    figure.subplots_adjust(left=0.19, right=0.98, bottom=0.17, top=0.9)
    axes: Axes = figure.subplots()
    for line in chart.lines:
        _draw_line(axes, chart, line)
    axes.set_title(chart.title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_ylabel(f"{chart.unit} (log scale)" if chart.is_logarithmic else chart.unit)
    gaps = f"; {chart.gaps} values were not finite and are gaps" if chart.gaps else ""
    axes.set_xlabel(f"steps done{gaps}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.tick_params(length=3, color=RULE)
    _set_scale(axes, chart)
    _mark_warmups(axes, chart)
    if len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=8.5, handlelength=2.6)
    return figure


def _save(chart: Chart, target: Any, **settings: Any) -> None:
    with warnings.catch_warnings():
        # A run's name may be in letters that the font of the drawing lacks; a page has others.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        draw(chart).savefig(target, **settings)


def _draw_line(axes: Axes, chart: Chart, line: Line) -> None:
    scale = 100.0 if chart.unit.startswith("%") else 1.0
    values = [math.nan if value is None else scale * value for value in line.values]
    sparse = len(values) < 12
    axes.plot(
        line.steps,
        values,
        color=LINES[line.run % len(LINES)],
        linestyle=DASHES[line.run % len(DASHES)],
        linewidth=1.7,
        marker="o" if sparse else "",
        markersize=3.5,
        # The legend would leave out what begins with an underscore.
        label=f" {line.label}" if line.label.startswith("_") else line.label,
    )
    if line.best_step in line.steps:
        index = line.steps.index(line.best_step)
        axes.plot(
            line.steps[index],
            values[index],
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=LINES[line.run % len(LINES)],
        )


def _set_scale(axes: Axes, chart: Chart) -> None:
    if chart.is_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    elif chart.unit.startswith("%"):
        axes.set_ylim(-4, 104)
        axes.set_yticks(range(0, 101, 25))
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    last = max(step for line in chart.lines for step in line.steps)
    axes.set_xlim(0, last * 1.03 + 0.5)


def _mark_warmups(axes: Axes, chart: Chart) -> None:
    _make_room(axes, 0.08 * len(chart.warmup_ends))
    for height, (steps, whose) in enumerate(sorted(chart.warmup_ends.items())):
        # Between the last step of the warm-up and the first one after it.
        axes.axvline(steps + 0.5, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(
            f"warm-up ends{whose} ",
            (steps + 0.5, 1.0 - 0.08 * height),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            fontsize=8,
        )


def _make_room(axes: Axes, share: float) -> None:
    """Raise the upper end, so that no curve runs through the words above it."""
    scale = axes.transScale.transform
    low, high = (scale((1, y))[1] for y in axes.get_ylim())
    raised = (1, low + (high - low) * (1 + share))
    axes.set_ylim(top=axes.transScale.inverted().transform(raised)[1])


def _no_metadata() -> dict[str, Any]:
    # Dates and version numbers would make two drawings of the same run differ.
    return dict.fromkeys(("Date", "Creator", "Format", "Type"))
