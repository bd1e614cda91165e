"""`opcd.costs`: sums done by hand, and prices that are refused."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.costs import (
    KvShape,
    Prices,
    Request,
    StepPrompts,
    break_even,
    kv_rows,
    price_of,
    prompt_figures,
    read_batch_sizes,
    requests_until,
    training_rows,
)
from opcd.errors import CostsError
from opcd.types import Origin, PromptPair

PRICES = Prices(2.0, 10.0, 0.5, 3.6)
IN_CONTEXT = Request(Fraction(1100), Fraction(20))
CACHED = Request(Fraction(1100), Fraction(20), shared_tokens=1000)
BAKED = Request(Fraction(100), Fraction(20))
REQUESTS = {"in_context": IN_CONTEXT, "in_context_cached": CACHED, "baked": BAKED}

MOST: dict[Origin, int] = {"anchor": 8, "context_return": 16}

ABOVE_0 = st.fractions(min_value=Fraction(1, 100))


def pair(student: int, teacher: int, origin: Origin = "task") -> PromptPair:
    return PromptPair("x", (7,) * student, (7,) * teacher, origin)


def test_prompt_tokens_are_means_over_the_rows() -> None:
    found = prompt_figures([pair(10, 40), pair(20, 60)], shared_tokens=25)
    assert found == {
        "rows": 2,
        "with_context_tokens": 50.0,
        "without_context_tokens": 15.0,
        "context_tokens": 35.0,
        "saved_share": 0.7,
        "shared_tokens": 25,
    }


def test_keys_and_values_that_are_shared_are_the_servers() -> None:
    """2 sides x 3 layers x 2 heads x 8 wide x 2 bytes = 192 bytes a token."""
    shape = KvShape(layers=3, key_value_heads=2, head_width=8, bytes_per_value=2)
    rows = {row["condition"]: row for row in kv_rows(shape, REQUESTS)}
    assert shape.bytes_per_token == 192
    own = {c: (r["bytes_per_request"], r["bytes_per_server"]) for c, r in rows.items()}
    assert own == {
        "in_context": (1120 * 192, 0),
        "in_context_cached": (120 * 192, 1000 * 192),
        "baked": (120 * 192, 0),
    }


def test_a_request_is_priced_by_what_is_read_and_written() -> None:
    """In millionths: 1100 x 2 + 20 x 10; with 1000 cached, 100 x 2 + 1000 x 0.5 + 20 x 10."""
    million = 1_000_000
    assert price_of(IN_CONTEXT, PRICES) * million == 2400
    assert price_of(CACHED, PRICES) * million == 900
    assert price_of(BAKED, PRICES) * million == 400
    assert price_of(BAKED, Prices(2.0)) * million == 200


def test_break_even_is_the_cost_of_training_over_the_saving() -> None:
    """500 s at 3.6 an hour cost 0.5; requests save 0.002 and 0.0005."""
    rows = {row["against"]: row for row in break_even(PRICES, REQUESTS, wall_s=500.0)}
    assert rows["in_context"]["training_currency"] == 0.5
    assert rows["in_context"]["saving_currency_per_request"] == 0.002
    assert rows["in_context"]["requests"] == 250
    assert rows["in_context_cached"]["requests"] == 1000
    assert rows["in_context_cached"]["verdict"] == "after 1,000 requests"


@given(
    cost=st.fractions(min_value=Fraction(1, 100)), saving=st.fractions(min_value=Fraction(1, 99))
)
def test_break_even_is_the_first_request_that_covers_the_cost(
    cost: Fraction, saving: Fraction
) -> None:
    count = requests_until(cost, saving)
    assert count is not None
    assert (count - 1) * saving < cost <= count * saving


def test_what_saves_nothing_never_pays() -> None:
    same = {"in_context": BAKED, "baked": BAKED}
    (row,) = break_even(PRICES, same, 500.0)
    assert row["requests"] is None
    assert row["verdict"].startswith("never: a baked request costs the same")
    # The baked model writes so much more that it loses what the shorter prompt saves.
    longer = {"in_context_cached": CACHED, "baked": Request(Fraction(100), Fraction(90))}
    (row,) = break_even(PRICES, longer, 500.0)
    assert row["requests"] is None
    assert row["verdict"] == "never: a baked request costs more, 0.0011 instead of 0.0009"


def test_without_prices_there_is_no_break_even_and_the_options_are_named() -> None:
    assert break_even(Prices(2.0, 10.0, 0.5), REQUESTS, 500.0) == []
    assert Prices(2.0).missing == ["--training-price"]
    assert Prices().missing == ["--input-price", "--training-price"]
    assert PRICES.missing == []


def test_cached_prompts_are_compared_at_their_own_price_only() -> None:
    """At the full price they would look as dear as uncached ones."""
    rows = break_even(Prices(2.0, None, None, 3.6), REQUESTS, 500.0)
    assert [row["against"] for row in rows] == ["in_context"]


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ({"input_per_million_tokens": 0.0}, "--input-price 0: .* nothing can be saved"),
        ({"training_per_hour": 0.0}, "--training-price 0: .* paid for itself before"),
        ({"output_per_million_tokens": -1.0}, "--output-price -1: a price is a number above 0"),
        ({"cached_per_million_tokens": float("nan")}, "--cached-price nan: a price is a number"),
        ({"input_per_million_tokens": float("inf")}, "--input-price inf: a price is a number"),
    ],
)
def test_prices_that_mean_nothing_are_refused(prices: Any, message: str) -> None:
    with pytest.raises(CostsError, match=message):
        Prices(**prices)


def test_batch_sizes_are_read_in_order_and_once() -> None:
    assert read_batch_sizes("16, 1,4,4") == (1, 4, 16)


@pytest.mark.parametrize(
    ("text", "word"), [("0", "0"), ("1,0", "0"), ("-2", "-2"), ("1,,2", ""), ("1.5", "1.5")]
)
def test_batch_sizes_that_are_none_are_refused(text: str, word: str) -> None:
    with pytest.raises(CostsError, match=f"'{word}' is no batch size"):
        read_batch_sizes(text)


def context_of(ids: tuple[int, ...]) -> tuple[int, ...]:
    """What the teacher has read of a prompt already."""
    return ids[:30]


def test_training_counts_prompts_by_who_read_them() -> None:
    """One step of the teacher's answers, one half and half; the context of 30 is read once."""
    anchor = pair(5, 5, "anchor")
    steps = [
        StepPrompts(taught=[pair(10, 40), pair(12, 42), anchor], asked=[]),
        StepPrompts(taught=[pair(10, 40)], asked=[pair(14, 44), anchor]),
    ]
    seconds = {"rollout_s": 1.0, "teacher_s": 2.0, "train_s": 3.0, "wall_s": 6.5}
    metrics = [{"response_tokens": n, **seconds} for n in (20, 12)]
    rows = {row["part"]: row for row in training_rows(steps, metrics, context_of, MOST)}
    taught, asked = rows["answers, by the teacher"], rows["answers, by the student"]
    assert (asked["prompt_tokens"], taught["prompt_tokens"]) == (14 + 5, 40 + 42 + 5 + 40)
    assert (asked["task_response_tokens"], taught["task_response_tokens"]) == (6, 20 + 6)
    assert (asked["sequences"], taught["sequences"]) == (2, 4)
    assert taught["prompt_tokens_with_shared_once"] == 127 - 2 * 30
    scores, learns = rows["teacher scores"], rows["student learns"]
    assert scores["prompt_tokens"] == 40 + 42 + 5 + 40 + 44 + 5
    assert scores["prompt_tokens_with_shared_once"] == scores["prompt_tokens"] - 3 * 30
    assert learns["prompt_tokens"] == learns["prompt_tokens_with_shared_once"] == 10 + 12 + 24 + 10
    assert learns["anchor_response_tokens_at_most"] == 2 * 8
    assert [rows[p]["wall_s"] for p in ("answers, both", "teacher scores", "student learns")] == [
        2.0,
        4.0,
        6.0,
    ]
    assert rows["all"]["wall_s"] == 13.0
    assert rows["all"]["task_response_tokens"] == 3 * 32


def test_tasks_with_the_context_are_neither_tasks_nor_anchors() -> None:
    """They share the context with the tasks, and their answers may be as long as a task's."""
    returned = pair(40, 40, "context_return")
    steps = [StepPrompts(taught=[returned, returned, pair(10, 40)], asked=[pair(5, 5, "anchor")])]
    metrics = [
        {"response_tokens": 20, "rollout_s": 1.0, "teacher_s": 1.0, "train_s": 1.0, "wall_s": 3.0}
    ]
    rows = {row["part"]: row for row in training_rows(steps, metrics, context_of, MOST)}
    scores = rows["teacher scores"]
    assert scores["prompt_tokens"] == 3 * 40 + 5
    assert scores["prompt_tokens_with_shared_once"] == 3 * 40 + 5 - 2 * 30
    assert scores["context_return_response_tokens_at_most"] == 2 * 16
    assert scores["anchor_response_tokens_at_most"] == 8
    assert rows["answers, by the teacher"]["task_response_tokens"] == 20
