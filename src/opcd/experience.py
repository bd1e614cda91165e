"""Items that a model wrote become an experience: appended one after another, kept within a budget.

An experience is a text of one line per item. Of every item it stays known which trace it comes
from and what became of it. Knows nothing of how items are written.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from opcd.near_duplicates import SeenTexts
from opcd.traces import Trace, trace_text

MARK = "- "

Reason = Literal["", "demonstration", "exact duplicate", "near duplicate", "over budget"]
"""Why an item is not in the experience; the first is empty: it is."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an experience may hold."""

    max_tokens: int
    keep: Literal["recent", "best"] = "recent"
    near_duplicate: float = 0.7


@dataclass(slots=True)
class Record:
    """An item with where it comes from, and what became of it."""

    text: str
    trace: str
    """The id of the trace it was written from."""
    model: str
    """Who wrote it."""
    step: int
    tokens: int
    outcome: float | None = None
    """Of its trace."""
    kept: bool = True
    """Whether it is in the last experience."""
    reason: Reason = ""
    """Why it is not."""
    left_at: int | None = None
    """The step from which on it is not, where it had been in."""


@dataclass
class Accumulation:
    """One experience as it grows, and every text it has been."""

    limits: Limits
    count_tokens: Callable[[str], int] = field(repr=False)
    demonstrations: Sequence[str] = ()
    """Items that the instructions show: whoever repeats them has learned nothing."""
    records: list[Record] = field(default_factory=list)
    """Every item, in the order they were written."""
    texts: list[str] = field(default_factory=lambda: [""])
    """The experience after 0, 1, 2 ... traces."""

    @cached_property
    def _shown(self) -> SeenTexts:
        shown = SeenTexts(self.limits.near_duplicate)
        for text in self.demonstrations:
            shown.add(text)
        return shown

    @property
    def kept(self) -> list[Record]:
        """The items of the experience as it is now."""
        return [record for record in self.records if record.kept]

    @property
    def counts(self) -> Counter[str]:
        """Items by what became of them."""
        return Counter(record.reason or "kept" for record in self.records)

    def add(self, trace: Trace, items: Sequence[str], model: str) -> None:
        """Take what was written of the next trace: none, one or several items."""
        step = len(self.texts)
        seen, exact = SeenTexts(self.limits.near_duplicate), set[str]()
        for record in self.kept:
            seen.add(record.text)
            exact.add(_folded(record.text))
        for text in items:
            tokens = self.count_tokens(experience_text([text]))
            record = Record(text, trace.id, model, step, tokens, trace.outcome)
            self.records.append(record)
            record.reason = self._drop(record, seen, exact)
            record.kept = not record.reason
            if record.kept:
                seen.add(text)
                exact.add(_folded(text))
        self._trim(step)
        self.texts.append(self.text)

    @property
    def text(self) -> str:
        """The experience as it is now."""
        return experience_text([record.text for record in self.kept])

    def rows(self) -> list[dict[str, Any]]:
        """The records as rows of `items.jsonl`."""
        return [asdict(record) for record in self.records]

    def _drop(self, record: Record, seen: SeenTexts, exact: set[str]) -> Reason:
        if self._shown.twin_of(record.text) is not None:
            return "demonstration"
        if _folded(record.text) in exact:
            return "exact duplicate"
        if seen.twin_of(record.text) is not None:
            return "near duplicate"
        return "over budget" if record.tokens > self.limits.max_tokens else ""

    def _trim(self, step: int) -> None:
        """Let whole items go, the least wanted first, until the rest fits."""
        ranked = sorted(self.kept, key=self._worth) if self.limits.keep == "best" else self.kept
        while self.count_tokens(self.text) > self.limits.max_tokens:
            record, *ranked = ranked
            record.kept, record.reason, record.left_at = False, "over budget", step

    def _worth(self, record: Record) -> tuple[float, int]:
        # An unknown outcome is worth less than a known failure. The sort is stable: of equals the
        # earlier goes first.
        return (-1.0 if record.outcome is None else record.outcome, record.step)


def experience_text(items: Sequence[str]) -> str:
    """Items as the text of an experience: one on each line."""
    return "".join(f"{MARK}{item}\n" for item in items)


def items_in(text: str) -> list[str]:
    """The items of an experience's text."""
    lines = [line.strip() for line in text.split("\n")]
    return [line.removeprefix(MARK) for line in lines if line]


def raw_text(traces: Sequence[Trace], max_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The most recent traces that fit, whole and in their order: the context without extraction.

    One that is too long by itself is left out; empty where that holds for all of them.
    """
    told = [f"{trace_text(t)}\n\n{t.feedback}".rstrip() for t in traces]
    chosen: list[str] = []
    for text in reversed([text for text in told if count_tokens(_joined([text])) <= max_tokens]):
        if count_tokens(_joined([text, *chosen])) > max_tokens:
            break
        chosen = [text, *chosen]
    return _joined(chosen)


def _joined(texts: Sequence[str]) -> str:
    return "".join(f"{text}\n\n" for text in texts)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
