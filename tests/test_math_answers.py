"""Mathematical answers: which part of a text is read, and when two are the same."""

from typing import Any

import pytest

from opcd.math_answers import last_box, load_verifier, parse_gold, parse_response

VERIFIER = load_verifier()


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{7}", "7"),
        (r"a \boxed{1} b \boxed{ 2 } c", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1}, \boxed{2", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{}", ""),
        ("no box {7}", None),
    ],
)
def test_the_last_box_is_read_to_its_own_brace(text: str, inside: str | None) -> None:
    assert last_box(text) == inside


@pytest.mark.parametrize("gold", ["1/2", "$1/2$", r"\frac{1}{2}", r"\boxed{\frac12}", " 0.5 "])
def test_a_gold_answer_may_be_written_in_many_ways(gold: str) -> None:
    assert VERIFIER.verify(parse_gold(VERIFIER, gold), VERIFIER.parse("$1/2$"))


@pytest.mark.parametrize("gold", ["", " ", "?", "$$"])
def test_a_gold_answer_without_meaning_is_none(gold: str) -> None:
    assert parse_gold(VERIFIER, gold) == []


@pytest.mark.parametrize("response", ["", "none", r"\boxed{}", r"7 or \boxed{8"])
def test_a_response_without_an_expression_is_none(response: str) -> None:
    """An open box was cut off: a number before it is no answer."""
    assert parse_response(VERIFIER, response) == []


@pytest.mark.parametrize(
    ("response", "value"),
    [(r"\boxed{1\,234}", 1234), (r"\boxed{1\,234\,567}", 1234567), (r"\boxed{2\,m}", 2)],
)
def test_latexs_spaces_part_thousands_and_units(response: str, value: Any) -> None:
    assert parse_response(VERIFIER, response)[0] == value
