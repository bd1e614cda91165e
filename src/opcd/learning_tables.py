"""What was learned from experience as tables for a terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from opcd.experience import Accumulation, Reason
from opcd.gathering import Answer
from opcd.glossary import metric_name
from opcd.tables import Grid, cell, is_share
from opcd.traces import Trace

SHOWN = ("correct", "valid", "turns", "invalid_moves", "response_tokens", "truncated")
"""Metrics of the table, as far as the rows have them."""
SHORT = {"response_tokens": "tokens", "invalid_moves": "invalid"}
"""Their headings, where the usual ones would not fit beside the others in 80 columns."""


def count_traces(traces: Sequence[Sequence[Trace]]) -> list[dict[str, Any]]:
    """Each accumulation's traces, and how many of them went well, for a table."""
    rows: list[dict[str, Any]] = []
    for seed, own in enumerate(traces):
        known = [trace.outcome for trace in own if trace.outcome is not None]
        rows.append(
            {
                "": f"seed {seed}",
                "traces": len(own),
                "cut at the token limit": sum(trace.cut for trace in own),
                "outcome known": len(known),
                "mean outcome": f"{sum(known) / len(known):.2f}" if known else "-",
            }
        )
    return rows


def count_answers(answers: Sequence[Sequence[Answer]]) -> list[dict[str, Any]]:
    """Each accumulation's answers, and what was in them, for a table."""
    return [
        {
            "answers": len(own),
            "too long to ask": sum(bool(answer.skipped) for answer in own),
            "cut answers": sum(not answer.finished for answer in own),
            "items": sum(len(answer.items) for answer in own),
            "malformed": sum(answer.malformed for answer in own),
        }
        for own in answers
    ]


def count_items(found: Sequence[Accumulation]) -> list[dict[str, Any]]:
    """What became of each accumulation's items, for a table."""
    names = [name or "kept" for name in get_args(Reason)]
    return [
        {
            **{name: grown.counts[name] for name in names},
            "tokens": grown.count_tokens(grown.text),
        }
        for grown in found
    ]


def gathered_words(
    traces: Sequence[Sequence[Trace]],
    answers: Sequence[Sequence[Answer]],
    found: Sequence[Accumulation],
) -> list[str]:
    """What all accumulations of a round made of their traces, nothing left out."""
    solved, written = [t for own in traces for t in own], [a for own in answers for a in own]
    known = [trace.outcome for trace in solved if trace.outcome is not None]
    went = f", mean outcome {sum(known) / len(known):.2f} of {len(known)} known" if known else ""
    fates = sum((grown.counts for grown in found), Counter[str]())
    became = ", ".join(f"{fates[n]} {n}" for n in ("kept", *get_args(Reason)) if fates[n])
    cut = sum(trace.cut for trace in solved)
    return [
        f"{_count(len(solved), 'trace')}{went}; {cut} cut at the token limit",
        f"{_count(len(written), 'answer')} about them: "
        f"{_count(sum(len(a.items) for a in written), 'item')}, "
        f"{_count(sum(a.malformed for a in written), 'malformed piece')}; "
        f"{sum(not a.finished for a in written)} cut at the token limit",
        f"items: {became or 'none'}",
    ]


def rounds_grid(rounds: Sequence[Mapping[str, Any]]) -> Grid:
    """All conditions of all rounds; the first metric with its 95 % intervals."""
    measured = [one for one in rounds if one["conditions"]]
    known = {name for one in measured for table in one["conditions"].values() for name in table}
    metrics = [name for name in SHOWN if name in known]
    if "correct" not in known:
        metrics += sorted(known - {*metrics, "agreement", "kl_nats_per_token"})
    rows = [
        ["" if place else str(one["round"]), name, *_cells(metrics, table)]
        for one in measured
        for place, (name, table) in enumerate(one["conditions"].items())
    ]
    count = measured[0]["rows"] if measured else 0
    names = [SHORT.get(metric, metric_name(metric)) for metric in metrics]
    return Grid(f"{count} test rows, by round", ["round", "condition", *names], rows)


def paired_words(tests: Sequence[Mapping[str, Any]], before: str = "") -> list[str]:
    """Paired tests in words."""
    return [
        f"{before}{t['first']} against {t['second']}: "
        f"{100 * t['difference']:+.1f} points {t['metric']}, p = {t['p']:.2g} ({t['test']})"
        for t in tests
    ]


def learned_lines(found: Mapping[str, Any]) -> list[str]:
    """What to read under the table: what was chosen, what differs, what was left out."""
    lines: list[str] = []
    for one in found["rounds"]:
        name = f"round {one['round']}: "
        selected = one.get("selected") or {}
        verdict = one.get("verdict") or selected.get("verdict")
        lines += [name + verdict] if verdict else []
        lines += paired_words(one["paired"], name)
        lines += [name + note for note in one.get("notes", ())]
    # Of one round alone, these repeat what is said of it above.
    return [*lines, *(paired_words(found["paired"]) if len(found["rounds"]) > 1 else [])]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _cells(metrics: Sequence[str], table: Mapping[str, Any]) -> list[str]:
    first, *others = metrics
    return [cell(first, table.get(first)), *(_mean(name, table.get(name)) for name in others)]


def _mean(metric: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{100 * found['mean']:.0f} %" if is_share(metric) else f"{found['mean']:.2f}"
