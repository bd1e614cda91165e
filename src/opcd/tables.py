"""Results as tables for a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from opcd.screening import Limits
from opcd.types import CONDITIONS

if TYPE_CHECKING:  # it runs a model; a table of its counts does not
    from opcd.authoring import Authored

SHARES = (
    "valid",
    "correct",
    "agreement",
    "truncated",
    "greedy_agreement",
    "form",
    "quoted",
    "talk",
)
"""Metrics that read best as percentages."""
COMPARED = ("base", "in_context", "off_policy", "baked")
"""The conditions of `comparison.json`, as they stand side by side."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts, for a terminal or a page."""

    title: str
    headings: list[str]
    """Empty where the rows name themselves."""
    rows: list[list[str]]

    def has_words(self, index: int) -> bool:
        """Whether a column is read from the left; numbers stand one below the other."""
        return any(row[index][:1].isalpha() for row in self.rows)

    def for_terminal(self) -> Table:
        """Words to the left, numbers to the right; nothing in a cell is markup."""
        table = Table(title=self.title, show_header=any(self.headings))
        for index, name in enumerate(self.headings):
            side = "left" if self.has_words(index) else "right"
            table.add_column(name, justify=side, overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


def is_share(metric: str) -> bool:
    """Whether a metric reads best as a percentage."""
    return metric in SHARES or metric.startswith("correct_")


def results_table(summary: Mapping[str, Any]) -> Table:
    """Each metric of each suite under the three conditions, with 95 % intervals."""
    tokens = summary["context_tokens"]
    title = f"{summary['split']} split, {summary['checkpoint']}, context of {tokens} tokens"
    return _suites_table(title, summary["suites"], CONDITIONS)


def comparison_table(found: Mapping[str, Any]) -> Table:
    """The same with `off_policy` beside them, and which checkpoints these are."""
    checkpoints = ", ".join(f"{name} {step}" for name, step in found["checkpoints"].items())
    title = f"{found['rows']} {found['split']} rows; {checkpoints}"
    return _suites_table(title, found["suites"], COMPARED)


def spread_lines(found: Mapping[str, Any]) -> list[str]:
    """Mean and spread over training runs, where there are several."""
    return [
        f"{kind}, {several['runs']} training runs: "
        + ", ".join(
            f"{name} {_number(name, several[name]['mean'])} +- "
            f"{_number(name, several[name]['deviation'])}"
            for name in ("valid", "correct", "agreement", "kl_nats_per_token")
            if name in several
        )
        for kind, several in found["seeds"].items()
        if several["runs"] > 1
    ]


def search_table(found: Mapping[str, Any]) -> Table:
    """Learning rates with what they reached on validation; the chosen one is marked."""
    table = Table(title=f"validation, chosen by {found['selected_by']}")
    names = [n for n, v in found["rows"][0].items() if isinstance(v, float) and n != "lr"]
    for column in ("", "lr", "step", *names):
        table.add_column(column, justify="right", overflow="fold")
    for row in found["rows"]:
        mark = "*" if row["lr"] == found["chosen"] else ""
        table.add_row(mark, f"{row['lr']:g}", str(row["step"]), *(f"{row[n]:.3f}" for n in names))
    return table


def gap_table(gap: Mapping[str, Any]) -> Table:
    """What the context changes: each metric without and with it, and distances in nats."""
    table = Table(
        title=f"{gap['rows']} {gap['split']} rows, context of {gap['context_tokens']} tokens"
    )
    for column in ("", "base", "in_context", "difference", "p"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, found in gap["metrics"].items():
        cells = [cell(name, found[c]) for c in ("base", "in_context", "difference")]
        table.add_row(name, *cells, f"{found['p']:.2g}")
    for name in ("kl_nats_per_token", "kl_nats_per_response", "margin_nats"):
        table.add_row(name, "", cell(name, gap[name]), "", "")
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
    conditions = [condition for condition in CONDITIONS if condition in answers[0]]
    for condition in conditions:
        table.add_column(condition, ratio=2, overflow="fold")
    stride = max(1, len(answers) // count)
    for row in answers[::stride][:count]:
        texts = [answer_text(row[condition]) for condition in conditions]
        # An action in brackets would be taken for a style.
        table.add_row(*map(escape, (row["prompt"], *texts)))
    return table


def answer_text(answer: Mapping[str, Any]) -> str:
    """A row of `answers.jsonl` under one condition, shortened; of a game, how it ended as well."""
    text = _shorten(answer["text"])
    if "feedback" not in answer:
        return text
    ending = answer["note"].replace("_", " ")
    return f"{ending} after {answer['turns']:.0f} turns, the last reply: {text}"


def authored_table(found: "Authored", limits: Limits) -> Table:
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


def counts_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A column for each row of counts, which are many and have long names."""
    cells = [[name, *(str(row[name]) for row in rows)] for name in rows[0]]
    return Grid(title, cells[0], cells[1:]).for_terminal()


def harness_table(found: Mapping[str, Any]) -> Table:
    """Each metric of each benchmark by condition, and baked minus base, with standard errors."""
    limit = f", at most {found['limit']} rows of a task" if found["limit"] else ""
    table = Table(title=f"lm_eval {found['lm_eval']}, {found['checkpoint']}{limit}")
    columns = list(dict.fromkeys(name for task in found["tasks"].values() for name in task))
    for column in ("task", "rows", "metric", *columns):
        words = column in ("task", "metric")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for task, measured in found["tasks"].items():
        for metric in measured["base"]:
            cells = [_with_stderr(measured[c][metric], c == "difference") for c in columns]
            table.add_row(escape(task), str(found["n"][task]), escape(metric), *cells)
        table.add_section()
    return table


def _suites_table(title: str, suites: Mapping[str, Any], conditions: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("suite", overflow="fold")
    table.add_column("metric", overflow="fold")
    for condition in conditions:
        table.add_column(condition, justify="right", overflow="fold")
    for suite, found in suites.items():
        metrics = list(dict.fromkeys(name for rows in found.values() for name in rows))
        for metric in metrics:
            cells = [cell(metric, found.get(c, {}).get(metric)) for c in conditions]
            table.add_row(suite, metric, *cells)
        table.add_section()
    return table


def _number(metric: str, value: float) -> str:
    return f"{100 * value:.1f} %" if is_share(metric) else f"{value:.3f}"


def cell(metric: str, found: Mapping[str, Any] | None) -> str:
    """An estimate with its interval; empty where there is none."""
    if found is None:
        return ""
    mean, (low, high) = found["mean"], found["ci95"]
    if is_share(metric):
        return f"{100 * mean:.1f} % [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _with_stderr(found: Mapping[str, float | None], signed: bool) -> str:
    mean, stderr = found["mean"], found["stderr"]
    if mean is None:
        return ""
    value = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return value if stderr is None else f"{value} +- {stderr:.3f}"


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
