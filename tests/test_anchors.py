"""Prompts that hold the rest of the behaviour still: the shipped set, and how it is drawn."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.anchors import AnchorSet, load_anchors
from opcd.errors import TaskError

SMALL = AnchorSet(("s0", "s1", "s2"), ("p0", "p1", "p2", "p3", "p4"), "anchor-train")


def texts(tasks: list[Any], role: int) -> list[str]:
    return [task.messages[role].content for task in tasks]


def write_set(folder: Path, **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "train": {"systems": ["a"], "prompts": ["b"]},
        "test": {"systems": ["c"], "prompts": ["d"]},
    }
    for key, value in changes.items():
        split, _, name = key.partition("_")
        tree[split][name] = value
    path = folder / "anchors.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_the_shipped_set_is_large_and_has_its_splits_apart() -> None:
    train, test = load_anchors()
    assert len(train.systems) >= 20
    assert len(train.prompts) >= 150
    assert not set(train.systems) & set(test.systems)
    assert not set(train.prompts) & set(test.prompts)


def test_the_shipped_set_has_no_text_twice_and_none_empty() -> None:
    for split in load_anchors():
        for values in (split.systems, split.prompts):
            assert [text for text, count in Counter(values).items() if count > 1] == []
            assert all(text.strip() for text in values)


@given(count=st.integers(0, 40), seed=st.text(max_size=5))
def test_a_draw_is_spread_evenly(count: int, seed: str) -> None:
    """No prompt or system message comes again before every other one has come."""
    drawn = SMALL.draw(count, seed)
    assert len(drawn) == count
    for role, pool in ((0, SMALL.systems), (1, SMALL.prompts)):
        found = texts(drawn, role)
        for start in range(0, count, len(pool)):
            window = found[start : start + len(pool)]
            assert len(set(window)) == len(window)
            assert set(window) <= set(pool)


@given(count=st.integers(1, 20), seed=st.text(max_size=5))
def test_a_draw_is_a_function_of_its_seed(count: int, seed: str) -> None:
    assert SMALL.draw(count, seed) == SMALL.draw(count, seed)


def test_draws_of_other_steps_differ() -> None:
    train, _ = load_anchors()
    assert texts(train.draw(6, "0/1"), 1) != texts(train.draw(6, "0/2"), 1)


def test_anchors_of_two_steps_have_ids_of_their_own() -> None:
    """The id seeds a response: anchors of two steps must not draw with the same numbers."""
    ids = [task.id for seed in ("0/1", "0/2") for task in SMALL.draw(6, seed)]
    assert len(set(ids)) == len(ids)


def test_an_anchor_is_a_system_message_and_a_prompt() -> None:
    (task,) = SMALL.draw(1, "x")
    assert [m.role for m in task.messages] == ["system", "user"]
    assert task.answer is None


def test_the_last_of_a_draw_may_have_no_system_message() -> None:
    """The same prompts and ids with or without it: only the system message is left out."""
    whole, bare = SMALL.draw(5, "x"), SMALL.draw(5, "x", bare=2)
    assert bare[:3] == whole[:3]
    assert [task.messages for task in bare[3:]] == [task.messages[1:] for task in whole[3:]]
    assert [task.id for task in bare] == [task.id for task in whole]


def test_a_set_of_the_users_is_read(tmp_path: Path) -> None:
    train, test = load_anchors(write_set(tmp_path))
    assert (train.systems, train.prompts) == (("a",), ("b",))
    assert (test.systems, test.prompts) == (("c",), ("d",))
    assert train.name != test.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_prompts": ["d", "b"]}, "has 'b' in train and in test"),
        ({"test_systems": ["a"]}, "has 'a' in train and in test"),
        ({"train_prompts": []}, "has an empty list"),
        ({"test_systems": []}, "has an empty list"),
        ({"train_systems": None}, "is not an anchor set"),
    ],
)
def test_a_bad_set_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_anchors(write_set(tmp_path, **changes))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"train": {}}'])
def test_a_malformed_file_shows_the_right_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "anchors.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=r'anchors\.json.* write \{"train": \{"systems"'):
        load_anchors(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"none\.json"):
        load_anchors(tmp_path / "none.json")
