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


def near_duplicates(texts: Sequence[str], threshold: float) -> Duplicates:
    """Drop each text that is too like one kept before it.

    Likeness is the Jaccard index of the texts' runs of three words: shared runs over all runs.
    Texts without a word are like each other and like nothing else. Exact, through an index from
    each run to the kept texts that have it.

    Args:
        texts: in order of preference: the first of its kind is kept.
        threshold: a text goes where its likeness to a kept one is at least this; above 0, at
            most 1.

    Raises:
        ValueError: the threshold is outside of that range.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold = {threshold}; it must be above 0 and at most 1")
    sizes: dict[int, int] = {}
    """Kept index -> its number of runs."""
    holders: dict[Run, list[int]] = {}
    twins: dict[int, int] = {}
    for index, text in enumerate(texts):
        # A text without words gets a run of its own kind, so that it meets its likes.
        runs = runs_of(text) or frozenset({()})
        shared = Counter(kept for run in runs for kept in holders.get(run, ()))
        likeness = {kept: n / (len(runs) + sizes[kept] - n) for kept, n in shared.items()}
        twin = max(likeness, key=lambda kept: (likeness[kept], -kept), default=None)
        if twin is not None and likeness[twin] >= threshold:
            twins[index] = twin
            continue
        sizes[index] = len(runs)
        for run in runs:
            holders.setdefault(run, []).append(index)
    return Duplicates(tuple(sizes), twins)


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
