"""What was found of the claims, as a page of Markdown with one table and one figure."""

import math
import warnings
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from opcd.figures import INK, RULE, SETTINGS
from opcd.glossary import metric_name
from opcd.intervals import Estimate
from opcd.lab.setups import Finding
from opcd.lab.verdicts import Comparison
from opcd.runs import write_text

Rows = Sequence[tuple[str, Comparison]]
"""Comparisons, each with the name of its claim."""
PLAIN = ("right", "solved")
"""Metrics that need no name in the figure."""
ROW_INCHES = 0.24
GAP = 0.5
"""Between the claims of the figure, in rows."""
SHAPES = {"holds": "o", "does not hold": "X", "undecided": "D"}
"""Besides the colour, which not everybody can tell apart."""
COLOURS = {"holds": "#2a7f62", "does not hold": "#b3413b", "undecided": "#8a8a8a"}


def write_page(folder: Path, findings: Mapping[str, Finding], facts: str) -> Path:
    """Write `claims.md` and `claims.svg`; returns the page.

    Args:
        folder: where both are written.
        findings: by the claim's name.
        facts: how it was measured, a sentence or two.
    """
    write_text(folder / "claims.svg", draw(findings))
    head = [
        "# The paper's claims in the lab",
        "",
        "Written by `opcd lab claims`. " + facts,
        "",
        "A claim *holds* where the whole 95 % interval of every one of its differences is on its "
        "side, *does not hold* where that of one is on the other, and is *undecided* else. In the "
        "figure a circle holds, a cross does not and a diamond is undecided; a bar is what is "
        "allowed.",
        "",
        "| claim | world | verdict |",
        "|---|---|---|",
        *(f"| {f.claim} | {_words(f.world)} | **{f.verdict}** |" for f in findings.values()),
        "",
        "![every difference with its interval](claims.svg)",
        "",
    ]
    sections = [line for name, one in findings.items() for line in _section(name, one)]
    write_text(folder / "claims.md", "\n".join([*head, *sections]).rstrip() + "\n")
    return folder / "claims.md"


def draw(findings: Mapping[str, Finding]) -> str:
    """Every difference with its interval, as SVG; the same findings give the same text."""
    named = [(name, c) for name, one in findings.items() for c in one.comparisons]
    shares = [row for row in named if not in_nats(row[1].metric)]
    nats = [row for row in named if in_nats(row[1].metric)]
    stream = StringIO()
    no_metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    heights = [rows_high(shares)] + ([rows_high(nats)] if nats else [])
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        figure = Figure(figsize=(10, ROW_INCHES * sum(heights)), layout="constrained")
        panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        _draw_rows(panels[0], shares, 100, "points more of right answers, with 95 % interval")
        if nats:
            label = "nats a token nearer to the teacher, with 95 % interval"
            _draw_rows(panels[1], nats, 1, label)
            if max(abs(c.difference.mean) for _, c in nats) > 1:
                # A loss that is no divergence may end a hundred times further away than others.
                panels[1].set_xscale("symlog", linthresh=1)
                ticks = SymmetricalLogLocator(base=10, linthresh=1, subs=[1, 2, 5])
                panels[1].xaxis.set_major_locator(ticks)
                panels[1].xaxis.set_major_formatter("{x:g}")
        figure.savefig(stream, format="svg", metadata=no_metadata)
    return stream.getvalue()


def rows_high(rows: Rows) -> float:
    """The height of a panel in rows: its own, a gap between claims, and its axis."""
    return len(rows) + GAP * len({name for name, _ in rows}) + 2.5


def _draw_rows(axes: Axes, rows: Rows, scale: float, label: str) -> None:
    axes.axvline(0, color=RULE, linewidth=1)
    places: list[float] = []
    last, place = "", 0.0
    for name, comparison in rows:
        place += 1 + (GAP if name != last else 0)
        if name != last:
            axes.axhline(place - (1 + GAP) / 2, color=RULE, linewidth=0.5)
            axes.annotate(
                name,
                (1.01, place),
                xycoords=("axes fraction", "data"),
                va="center",
                weight="bold",
            )
        last = name
        places.append(place)
        mean, low, high = (scale * value for value in comparison.difference[:3])
        colour, shape = COLOURS[comparison.verdict], SHAPES[comparison.verdict]
        if math.isfinite(low):
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([mean], [place], shape, color=colour, markersize=6)
        if comparison.margin:
            axes.plot([scale * comparison.margin], [place], "|", color=INK, markersize=10)
    axes.set_yticks(places, [_label(comparison) for _, comparison in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place + 0.8, 0.2)
    axes.set_xlabel(label)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _section(name: str, finding: Finding) -> list[str]:
    metrics = list(dict.fromkeys(m for line in finding.lines for m in line.figures))
    cells = [
        f"| {line.condition} | "
        + " | ".join(_figure(m, line.figures.get(m)) for m in metrics)
        + " |"
        for line in finding.lines
    ]
    return [
        f"## {name}: {finding.verdict}",
        "",
        f"{finding.claim} ({_words(finding.world)}).",
        "",
        f"| | {' | '.join(metric_name(m) for m in metrics)} |",
        "|---|" + "---|" * len(metrics),
        *cells,
        "",
        *(f"- {_sentence(comparison)}" for comparison in finding.comparisons),
        *(f"- {note}" for note in finding.notes),
        "",
    ]


def in_nats(metric: str) -> bool:
    """Whether a metric is counted in nats, and not a share of rows."""
    return metric.endswith("nats_per_token")


def _sentence(comparison: Comparison) -> str:
    mean, low, high, _ = comparison.difference
    metric, margin = comparison.metric, comparison.margin
    if in_nats(metric):
        name = metric_name(metric).partition(",")[0]
        allowed = f", allowed {margin:g}" if margin else ""
        found = f"{name}: {mean:+.3f} nats a token less [{low:+.3f}, {high:+.3f}]"
    else:
        allowed = f", allowed {100 * margin:.0f}" if margin else ""
        found = f"{metric_name(metric)}: {100 * mean:+.1f} points"
        found += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{_pair(comparison)}, {found}{allowed}: {comparison.verdict}"


def _pair(comparison: Comparison) -> str:
    first, second = comparison.first, comparison.second
    place, colon, condition = second.partition(": ")
    # What both are about is said once.
    return f"{first} > {condition if colon and first.startswith(place + colon) else second}"


def _label(comparison: Comparison) -> str:
    plain = comparison.metric in PLAIN or in_nats(comparison.metric)
    return _pair(comparison) + ("" if plain else f" ({metric_name(comparison.metric)})")


def _figure(metric: str, found: Estimate | None) -> str:
    if found is None:
        return ""
    if in_nats(metric):
        known = math.isfinite(found.low)
        return f"{found.mean:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if known else "")
    return f"{100 * found.mean:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _words(name: str) -> str:
    return name.replace("_", " ")
