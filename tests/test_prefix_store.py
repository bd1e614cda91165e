"""`opcd.prefix_store`: what was read of openings is kept within its budget."""

from collections.abc import Sequence
from typing import Any

import pytest

from opcd.prefix_cache import SharedPrefix, read_prefix, token_bytes
from opcd.prefix_store import PrefixStore
from tiny import random_ids
from worlds import tiny_llama

FIRST, SECOND, THIRD = (random_ids(10 + n, n) for n in range(3))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def store_of(model: Any, tokens: int) -> tuple[PrefixStore, list[tuple[int, ...]]]:
    """A store with room for so many tokens, and what it reads."""
    reads: list[tuple[int, ...]] = []

    def read(ids: Sequence[int]) -> SharedPrefix:
        reads.append(tuple(ids))
        if len(ids) <= tokens:
            assert store.bytes + len(ids) * token_bytes(model) <= store.most_bytes
        return read_prefix(model, ids)

    store = PrefixStore(model, read, tokens * token_bytes(model))
    return store, reads


def test_an_opening_is_read_once(model: Any) -> None:
    store, reads = store_of(model, 100)
    assert store.get(FIRST) is store.get(FIRST)
    assert store.get(SECOND).ids == SECOND
    assert reads == [FIRST, SECOND]
    assert (store.reads, store.dropped, store.most_tokens) == (2, 0, 100)
    assert store.bytes == (10 + 11) * token_bytes(model)


def test_the_least_recently_used_leaves_first(model: Any) -> None:
    """Before the next is read, so that the budget holds while it is; both are counted."""
    store, reads = store_of(model, 25)
    for ids in (FIRST, SECOND, FIRST, THIRD, FIRST, SECOND):
        store.get(ids)
        assert store.bytes <= store.most_bytes
    assert reads == [FIRST, SECOND, THIRD, SECOND]
    assert (store.reads, store.dropped) == (4, 2)


def test_one_that_is_too_long_is_kept_alone(model: Any) -> None:
    store, reads = store_of(model, 11)
    for ids in (FIRST, THIRD, THIRD):
        store.get(ids)
    assert reads == [FIRST, THIRD]
    assert store.bytes == len(THIRD) * token_bytes(model)


def test_what_is_not_kept_makes_nothing_leave(model: Any) -> None:
    store, reads = store_of(model, 25)
    store.get(FIRST)
    store.get(SECOND, keep=False)
    store.get(FIRST)
    assert reads == [FIRST, SECOND] and store.dropped == 0


def test_other_weights_read_anew(model: Any) -> None:
    store, reads = store_of(model, 100)
    store.get(FIRST)
    store.clear()
    assert store.bytes == 0
    store.get(FIRST)
    assert reads == [FIRST, FIRST]
