"""Texts that say the same in nearly the same words, and texts that quote another.

Both are measured in runs of words: case, punctuation and white space do not count. Languages that
put no spaces between words are compared by characters instead.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = 3
"""Length of the runs that two texts are compared by."""

_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese characters."""

_WORD = re.compile(f"[{_SPACELESS}]|[^\\W{_SPACELESS}]+")

Run = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Which texts stay, and of each that goes, which kept text it repeats."""

    kept: tuple[int, ...]
    """Indices, in the order of the texts."""
    twins: dict[int, int]
    """Dropped index -> the kept index that is most like it."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.casefold())


def runs_of(text: str, words: int = WORDS) -> frozenset[Run]:
    """All runs of so many words; a shorter text is one run of all its words."""
    found = words_of(text)
    if not found:
        return frozenset()
    last = max(1, len(found) - words + 1)
    return frozenset(tuple(found[start : start + words]) for start in range(last))


class SeenTexts:
    """Texts that later ones are compared with, through an index from each run to its texts.

    Likeness is the Jaccard index of two texts' runs of three words: shared runs over all runs.
    Texts without a word are like each other and like nothing else.
    """

    def __init__(self, threshold: float) -> None:
        """Start with none; texts are twins where their likeness is at least the threshold.

        Raises:
            ValueError: the threshold is not above 0 and at most 1.
        """
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"threshold = {threshold}; it must be above 0 and at most 1")
        self._threshold = threshold
        self._sizes: list[int] = []
        """The number of runs of each text."""
        self._holders: dict[Run, list[int]] = {}

    def add(self, text: str) -> int:
        """Remember a text; its number, from 0 on."""
        runs, number = _runs_or_none(text), len(self._sizes)
        self._sizes.append(len(runs))
        for run in runs:
            self._holders.setdefault(run, []).append(number)
        return number

    def twin_of(self, text: str) -> int | None:
        """The number of the text most like this one (the first of several), if alike enough."""
        runs = _runs_or_none(text)
        shared = Counter(other for run in runs for other in self._holders.get(run, ()))
        likeness = {other: n / (len(runs) + self._sizes[other] - n) for other, n in shared.items()}
        twin = max(likeness, key=lambda other: (likeness[other], -other), default=None)
        return twin if twin is not None and likeness[twin] >= self._threshold else None


def near_duplicates(texts: Sequence[str], threshold: float) -> Duplicates:
    """Drop each text that is too like one kept before it; exact, with no pair left out.

    Args:
        texts: in order of preference: the first of its kind is kept.
        threshold: a text goes where its likeness to a kept one (see `SeenTexts`) is at least this.

    Raises:
        ValueError: the threshold is not above 0 and at most 1.
    """
    seen = SeenTexts(threshold)
    kept: list[int] = []
    twins: dict[int, int] = {}
    for index, text in enumerate(texts):
        twin = seen.twin_of(text)
        if twin is None:
            seen.add(text)
            kept.append(index)
        else:
            twins[index] = kept[twin]
    return Duplicates(tuple(kept), twins)


def quoted_share(text: str, source: str, words: int = 4) -> float:
    """The share of a text's runs of so many words that occur in the source.

    0 for a text of fewer words than that: it is too short to be called a quotation.
    """
    if len(words_of(text)) < words:
        return 0.0
    runs = runs_of(text, words)
    return len(runs & runs_of(source, words)) / len(runs)


def quotes_run(text: str, source: str, words: int = 8) -> bool:
    """Whether so many words of a text, one after the other, stand in the source."""
    return quoted_share(text, source, words) > 0.0


def _runs_or_none(text: str) -> frozenset[Run]:
    # A text without words gets a run of its own kind, so that it meets its likes.
    return runs_of(text) or frozenset({()})
