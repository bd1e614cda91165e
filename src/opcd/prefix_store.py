"""The openings that a model has read, within a budget of bytes: the least recently used leaves."""

from collections.abc import Callable
from typing import Any

from opcd.attention import why_no_prefix
from opcd.openings import Ids
from opcd.prefix_cache import SharedPrefix, token_bytes

PREFIX_BYTES = 2**32
"""What is kept, unless a run says otherwise."""


class PrefixStore:
    """Keys and values of openings, read when they are first needed."""

    def __init__(
        self, model: Any, read: Callable[[Ids], SharedPrefix], most_bytes: int = PREFIX_BYTES
    ) -> None:
        """An empty store.

        Args:
            model: whose keys and values they are.
            read: reads an opening with the weights that the store is for; those stand still, or
                `clear` is called when they have moved.
            most_bytes: what is kept at one time. A longer opening is kept alone.
        """
        self._model = model
        self._read = read
        self.most_bytes = most_bytes
        self._kept: dict[Ids, SharedPrefix] = {}
        self.reads = 0
        """How often an opening was read."""
        self.dropped = 0
        """How many had to leave for another."""

    @property
    def most_tokens(self) -> int:
        """How many tokens fit in; of a model that reads every prompt in full, none."""
        if why_no_prefix(self._model):
            return 0
        return self.most_bytes // token_bytes(self._model)

    @property
    def bytes(self) -> int:
        """What it takes now."""
        return sum(prefix.bytes for prefix in self._kept.values())

    def __contains__(self, ids: Ids) -> bool:
        """Whether an opening is kept, so that it need not be read."""
        return ids in self._kept

    def get(self, ids: Ids, keep: bool = True) -> SharedPrefix:
        """An opening's keys and values; those used least recently leave before it is read.

        Args:
            ids: the opening.
            keep: whether it may be asked for again; nothing leaves for one that is not kept.
        """
        if not keep:
            return self._read(ids)
        found = self._kept.pop(ids, None)
        if found is None:
            room = self.most_tokens - len(ids)
            while self._kept and sum(map(len, self._kept)) > room:
                self._kept.pop(next(iter(self._kept)))
                self.dropped += 1
            self.reads += 1
            found = self._read(ids)
        self._kept[ids] = found
        return found

    def clear(self) -> None:
        """Forget everything, since the weights have moved."""
        self._kept.clear()
