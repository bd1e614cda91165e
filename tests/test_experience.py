"""Accumulation: what is kept, in which order and budget, and what is known of the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.experience import (
    Accumulation,
    Limits,
    Record,
    experience_text,
    items_in,
    raw_text,
)
from opcd.traces import Trace
from opcd.types import Message

WORDS = ("heat", "the", "pan", "before", "write", "every", "step", "count", "again", "twice")


def count(text: str) -> int:
    """A tokenizer of words."""
    return len(text.split())


def trace(step: int, outcome: float | None = None, response: str = "r") -> Trace:
    return Trace(f"t{step}", (Message("user", f"q{step}"),), response, outcome=outcome)


def grow(
    limits: Limits, *steps: list[str], outcomes: tuple[float | None, ...] = ()
) -> Accumulation:
    found = Accumulation(limits, count)
    for number, items in enumerate(steps, start=1):
        outcome = outcomes[number - 1] if outcomes else None
        found.add(trace(number, outcome), items, "writer")
    return found


def texts(records: list[Record]) -> list[str]:
    return [record.text for record in records]


WIDE = Limits(1000)

item_lists = st.lists(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), max_size=3),
    max_size=7,
)


def test_every_intermediate_experience_is_there_the_empty_one_first() -> None:
    """Number N is the experience after N traces, also where a trace gave nothing."""
    found = grow(WIDE, ["heat the pan"], [], ["read twice", "count again"])
    first, last = "- heat the pan\n", "- heat the pan\n- read twice\n- count again\n"
    assert found.texts == ["", first, first, last]


def test_provenance_names_trace_model_and_step() -> None:
    (record,) = grow(WIDE, [], ["heat the pan"], outcomes=(None, 1.0)).records
    assert (record.trace, record.model, record.step, record.outcome) == ("t2", "writer", 2, 1.0)
    assert (record.tokens, record.kept, record.reason, record.left_at) == (4, True, "", None)


def test_duplicates_go_and_say_why() -> None:
    long = "write every step and count again before you answer"
    found = grow(WIDE, [long, long.upper()], [f"{long} it", "read twice"])
    reasons = ["", "exact duplicate", "near duplicate", ""]
    assert [r.reason for r in found.records] == reasons
    assert items_in(found.text) == [long, "read twice"]


def test_likeness_is_the_runs_own() -> None:
    one, other = "write every step and count again", "write every step and count twice"
    assert len(grow(Limits(1000, near_duplicate=0.7), [one], [other]).kept) == 2
    assert len(grow(Limits(1000, near_duplicate=0.5), [one], [other]).kept) == 1


def test_what_left_may_come_back() -> None:
    """An item is compared with those that are there, not with those that went."""
    found = grow(Limits(4), ["heat the pan"], ["read it twice"], ["heat the pan"])
    assert [r.reason for r in found.records] == ["over budget", "over budget", ""]
    assert [r.left_at for r in found.records] == [2, 3, None]


def test_an_item_beyond_the_whole_budget_never_enters() -> None:
    found = grow(Limits(4), ["heat the pan"], ["write every step and count again"])
    assert found.text == "- heat the pan\n"
    assert [r.left_at for r in found.records] == [None, None]
    assert found.counts == {"kept": 1, "over budget": 1}


def test_keep_best_lets_the_worst_traces_go_first_and_the_earlier_of_equals() -> None:
    steps = ["a b"], ["c d"], ["e f"], ["g h"], ["i j"]
    limits = Limits(9, "best")
    found = grow(limits, *steps, outcomes=(1.0, 0.0, 1.0, None, 0.0))
    assert items_in(found.text) == ["a b", "e f", "i j"]
    assert items_in(grow(limits, *steps, outcomes=(1.0,) * 5).text) == ["e f", "g h", "i j"]


@given(item_lists, st.integers(1, 40))
def test_recent_keeps_the_longest_tail_that_fits(steps: list[list[str]], budget: int) -> None:
    """Against the law written out: of the items that passed, as many of the last as fit."""
    found = Accumulation(Limits(budget), count)
    expected: list[str] = []
    for number, items in enumerate(steps, start=1):
        before = len(found.records)
        found.add(trace(number), items, "w")
        new = [r for r in found.records[before:] if r.kept or r.left_at == number]
        expected = [*expected, *texts(new)]
        while count(experience_text(expected)) > budget:
            expected = expected[1:]
        assert items_in(found.text) == expected


@given(item_lists, st.integers(1, 40), st.sampled_from(["recent", "best"]))
def test_budget_and_wholeness_hold_at_every_step(
    steps: list[list[str]], budget: int, keep: str
) -> None:
    limits = Limits(budget, keep)  # type: ignore[arg-type]
    outcomes = tuple(float(n % 2) for n in range(len(steps)))
    found = grow(limits, *steps, outcomes=outcomes)
    written = {item for items in steps for item in items}
    for text in found.texts:
        assert count(text) <= budget
        assert set(items_in(text)) <= written
        assert len(set(items_in(text))) == len(items_in(text))
    assert len(found.records) == sum(map(len, steps)) == sum(found.counts.values())
    assert all(r.kept == (not r.reason) for r in found.records)
    assert texts(found.kept) == items_in(found.text)


@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_an_experience_is_read_back_as_its_items(items: list[str]) -> None:
    assert items_in(experience_text(items)) == items


def test_an_item_may_begin_like_one() -> None:
    assert items_in(experience_text(["- a", "b"])) == ["- a", "b"]


def test_raw_traces_are_the_last_that_fit_in_their_order() -> None:
    one, two, three = (trace(n, response=f"answer {n}") for n in (1, 2, 3))
    whole = raw_text([two, three], 1000, count)
    assert whole.index("answer 2") < whole.index("answer 3")
    assert raw_text([one, two, three], count(whole), count) == whole
    assert raw_text([one, two, three], count(whole) + 1, count) == whole


def test_raw_traces_are_never_cut() -> None:
    long = trace(2, response="word " * 50)
    short = raw_text([trace(1)], 1000, count)
    assert raw_text([trace(1), long], count(short), count) == short
    assert raw_text([long], 10, count) == ""


def test_raw_traces_say_what_is_known_of_them() -> None:
    told = Trace("t", (Message("user", "q"),), "r", feedback="It was wrong.")
    assert raw_text([told], 1000, count).strip().endswith("It was wrong.")


def test_a_near_duplicate_limit_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold"):
        grow(Limits(10, near_duplicate=0.0), ["a"])


def test_an_item_of_the_instructions_is_nothing_learned() -> None:
    found = Accumulation(WIDE, count, ["Write every step before you answer the question"])
    found.add(trace(1), ["write every step before you answer the question.", "read twice"], "w")
    assert [r.reason for r in found.records] == ["demonstration", ""]
    assert found.text == "- read twice\n"
