"""What was found of the claims, as a page of Markdown with one table and one figure."""

import math
import warnings
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from opcd.figures import INK, RULE, SETTINGS
from opcd.glossary import metric_name
from opcd.intervals import Estimate
from opcd.lab.claims import Finding
from opcd.lab.verdicts import Comparison
from opcd.runs import write_text

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
        "side, *does not hold* where that of one is on the other, and is *undecided* else.",
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
    rows = [(name, c) for name, one in findings.items() for c in one.comparisons]
    stream = StringIO()
    no_metadata: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        figure = Figure(figsize=(9, 0.32 * len(rows) + 1.2))
        axes = figure.subplots()
        axes.axvline(0, color=RULE, linewidth=1)
        for place, (_, comparison) in enumerate(rows):
            mean, low, high, _ = comparison.difference
            colour = COLOURS[comparison.verdict]
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([mean], [place], "o", color=colour, markersize=5)
            if comparison.margin:
                axes.plot([comparison.margin], [place], "|", color=INK, markersize=9)
        axes.set_yticks(range(len(rows)), [f"{name}: {_pair(c)}" for name, c in rows])
        axes.invert_yaxis()
        axes.set_xlabel("difference in the share of right answers, with its 95 % interval")
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata=no_metadata)
    return stream.getvalue()


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


def _sentence(comparison: Comparison) -> str:
    mean, low, high, _ = (100 * value for value in comparison.difference)
    allowed = f", allowed {100 * comparison.margin:.0f}" if comparison.margin else ""
    return (
        f"{_pair(comparison)}, {metric_name(comparison.metric)}: {mean:+.1f} points "
        f"[{low:+.1f}, {high:+.1f}]{allowed}: {comparison.verdict}"
    )


def _pair(comparison: Comparison) -> str:
    return f"{comparison.first} > {comparison.second}"


def _figure(metric: str, found: Estimate | None) -> str:
    if found is None:
        return ""
    if metric.endswith("nats_per_token"):
        known = math.isfinite(found.low)
        return f"{found.mean:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if known else "")
    return f"{100 * found.mean:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _words(name: str) -> str:
    return name.replace("_", " ")
