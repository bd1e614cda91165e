"""Which prompts open alike, so that what they share is read once for all of them.

A pool of ten experiences makes ten groups, a system message one. Groups are found in the tokens
alone, by the tree that prompts with the same first tokens make: from its leaves to its root, a
group stands by itself as long as its own opening saves more than the shorter one does that it has
in common with the others around it.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Ids = tuple[int, ...]

MIN_PREFIX_TOKENS = 64
"""A shared opening shorter than this is read with each prompt; one that is not longer than a wider
group's by this much is no group of its own."""


@dataclass
class _Branch:
    """Prompts that share their first `depth` tokens: groups of their own, and the rest."""

    depth: int
    groups: list[tuple[int, list[int]]] = field(default_factory=list)
    """The tokens they open with, and which they are."""
    rest: list[int] = field(default_factory=list)

    def take(self, inner: "_Branch") -> None:
        """Join a branch that goes on from here."""
        self.groups += inner.groups
        self.rest += inner.rest

    def close(self, weights: Sequence[float]) -> "_Branch":
        """All of its prompts are known: those that have no better group make one."""
        if self.depth < MIN_PREFIX_TOKENS:
            return self
        kept: list[tuple[int, list[int]]] = []
        for tokens, rows in self.groups:
            count = sum(weights[row] for row in rows)
            # What a group saves: its opening is read once in place of `count` times.
            if (count - 1) * tokens >= count * (self.depth + MIN_PREFIX_TOKENS):
                kept.append((tokens, rows))
            else:
                self.rest += rows
        if sum(weights[row] for row in self.rest) >= 2:
            kept.append((self.depth, self.rest))
            self.rest = []
        self.groups = kept
        return self


def find_openings(prompts: Sequence[Ids], weights: Sequence[float] | None = None) -> list[int]:
    """How many tokens at the head of each prompt its group shares; 0 for one in no group.

    At least one token is left of every prompt, since its last one's logits predict the response.

    Args:
        prompts: token ids.
        weights: how many prompts each one stands for; default: one.
    """
    weights = weights or [1.0] * len(prompts)
    keys = [_sortable(ids) for ids in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    found = [0] * len(prompts)
    open_: list[_Branch] = []
    inner = _Branch(0, rest=order[:1])
    for before, row in pairwise(order):
        depth = _shared(keys[before], keys[row])
        while open_ and open_[-1].depth > depth:
            open_[-1].take(inner)
            inner = open_.pop().close(weights)
        if not open_ or open_[-1].depth < depth:
            open_.append(_Branch(depth))
        open_[-1].take(inner)
        inner = _Branch(0, rest=[row])
    while open_:
        open_[-1].take(inner)
        inner = open_.pop().close(weights)
    for tokens, rows in inner.groups:
        for row in rows:
            found[row] = tokens
    return found


class Openings:
    """The openings of a run's prompts: fixed before it starts, whatever its batches hold."""

    def __init__(self, prompts: Sequence[Ids] = (), weights: Sequence[float] | None = None) -> None:
        """Find them.

        Args:
            prompts: all prompts, or examples of them.
            weights: how many prompts each example stands for.
        """
        found = find_openings(prompts, weights)
        self.known = sorted({ids[:cut] for ids, cut in zip(prompts, found, strict=True) if cut})
        self.without = sum(not cut for cut in found)
        """How many of `prompts` are in no group."""
        self._by_head: dict[Ids, list[Ids]] = {}
        for opening in sorted(self.known, key=len, reverse=True):
            self._by_head.setdefault(opening[:MIN_PREFIX_TOKENS], []).append(opening)

    def of(self, prompt: Ids) -> int:
        """Tokens of the longest opening that a prompt begins with; 0, if there is none."""
        for opening in self._by_head.get(prompt[:MIN_PREFIX_TOKENS], ()):
            if len(prompt) > len(opening) and prompt[: len(opening)] == opening:
                return len(opening)
        return 0

    def __contains__(self, opening: Ids) -> bool:
        """Whether these tokens are one of them."""
        return opening in self._by_head.get(opening[:MIN_PREFIX_TOKENS], ())

    @property
    def tokens(self) -> int:
        """Of all openings together."""
        return sum(map(len, self.known))


def in_passes(
    openings: Sequence[Ids], most_rows: int, most_tokens: int, most_whole: int
) -> Iterator[list[int]]:
    """Places of neighbours that are read together: few enough, behind few enough openings.

    Rows with and rows without an opening are never in one pass: the latter are longer by far.

    Args:
        openings: of each row, `()` for none; those that are the same stand together, those that
            are none in front.
        most_rows: of a pass whose rows have one.
        most_tokens: of such a pass's different openings together; one may be longer.
        most_whole: rows of a pass whose rows have none.
    """
    part: list[int] = []
    held = 0
    for place, opening in enumerate(openings):
        last = openings[part[-1]] if part else ()
        more = 0 if part and opening == last else len(opening)
        is_full = len(part) == (most_rows if last else most_whole)
        is_apart = more > 0 and (not last or held + more > most_tokens)
        if part and (is_full or is_apart):
            yield part
            part, held, more = [], 0, len(opening)
        part.append(place)
        held += more
    if part:
        yield part


def _sortable(ids: Ids) -> bytes:
    """Ids as bytes of the same order, which compare a hundred times as fast."""
    codes = array("I", ids)
    assert codes.itemsize == 4
    if array("H", [1]).tobytes() == b"\1\0":
        codes.byteswap()
    return codes.tobytes()


def _shared(first: bytes, second: bytes) -> int:
    """How many ids two prompts begin with alike; the last one of either never counts."""
    low, high = 0, min(len(first), len(second)) // 4 - 1
    while low < high:
        middle = (low + high + 1) // 2
        if first[: 4 * middle] == second[: 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return max(low, 0)
