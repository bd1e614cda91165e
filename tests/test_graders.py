"""Is this response right? Each kind of grader, and what it must not be fooled by."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from opcd.config.inputs import GraderConfig
from opcd.errors import ConfigError, TaskError
from opcd.graders import Grader, build_grader
from opcd.types import Score, Task

MOODS = {"mood": ["happy", "angry"], "escalate": [True, False]}
ANSWER = {"mood": "angry", "escalate": True}
TABLES: dict[str, dict[str, Any]] = {
    "exact": {},
    "contains": {},
    "numeric": {},
    "choice": {"choices": ["A", "B"]},
    "json": {"keys": MOODS},
    "regex": {"pattern": r"is (\w+)"},
}


def grader(kind: str, **table: Any) -> Grader:
    config = {"type": kind, **TABLES.get(kind, {}), **table}
    return build_grader(TypeAdapter(GraderConfig).validate_python(config))


def marks(found: Score) -> tuple[float, float]:
    return found.metrics["valid"], found.metrics["correct"]


def graded(kind: str, answer: Any, response: str, **table: Any) -> tuple[float, float]:
    return marks(grader(kind, **table)(Task("t", (), answer), response))


RIGHT, WRONG, INVALID = (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("Paris", " Paris\n", RIGHT),
        ("Paris", "paris", WRONG),
        ("Paris", "Paris.", WRONG),
        ("Paris", " ", INVALID),
        (7, "7", RIGHT),
    ],
)
def test_exact(answer: Any, response: str, expected: tuple[float, float]) -> None:
    assert graded("exact", answer, response) == expected


def test_exact_may_ignore_case() -> None:
    assert graded("exact", "Paris", "PARIS", ignore_case=True) == RIGHT


@pytest.mark.parametrize(
    ("response", "expected"),
    [("It is PARIS.", RIGHT), ("It is Rome.", WRONG), ("", INVALID)],
)
def test_contains(response: str, expected: tuple[float, float]) -> None:
    assert graded("contains", "Paris", response) == expected


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        (42, "First 7, so it is 42.", RIGHT),
        (42, "42, not 7", WRONG),
        ("1,234.5", "1234.50 EUR", RIGHT),
        (1234567, "1,234,567", RIGHT),
        (-3, "x = -3", RIGHT),
        (3, "x = -3", WRONG),
        (-3, "x = \u22123", RIGHT),
        ("\u22123", "(-3)", RIGHT),
        (3, "x = \u22123", WRONG),
        (7, "pages 5-7", RIGHT),
        (0.5, "0.5000001", RIGHT),
        (42, "none", INVALID),
        (4, "It is 4, I think.", RIGHT),
    ],
)
def test_numeric_reads_the_last_number(
    answer: Any, response: str, expected: tuple[float, float]
) -> None:
    assert graded("numeric", answer, response) == expected


def test_numeric_has_a_tolerance() -> None:
    assert graded("numeric", 10, "10.4", tolerance=0.5) == RIGHT
    assert graded("numeric", 10, "10.6", tolerance=0.5) == WRONG


def test_numeric_reads_a_number_without_a_leading_zero() -> None:
    assert graded("numeric", 0.5, "p = .5") == RIGHT


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("B", "B", RIGHT),
        ("B", "The answer is (b).", RIGHT),
        ("A", "Based on this: B", WRONG),
        ("B", "Based on this", INVALID),
        ("A", "A or B", INVALID),
        ("A", "A, yes, A", RIGHT),
        ("B", "**B**", RIGHT),
        ("B", "b", RIGHT),
        ("B", "Answer: 'B'.", RIGHT),
        ("A", "The answer is A because of the fever.", RIGHT),
        ("A", "This is a hard question.", INVALID),
        ("A", "A child with fever is described.", INVALID),
        ("B", "A child with fever: B", RIGHT),
        ("B", "Plan B's dose", INVALID),
        ("B", "B-cells and A", INVALID),
    ],
)
def test_choice_takes_whole_words(
    answer: str, response: str, expected: tuple[float, float]
) -> None:
    assert graded("choice", answer, response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("A is wrong. <answer> b </answer>", RIGHT),
        ("<answer>A</answer> no: <answer>B</answer>", RIGHT),
        ("<answer>A or B</answer>", INVALID),
        ("<answer>\nB\n</answer>", RIGHT),
        ("B", INVALID),
        ("<answer>B", INVALID),
        ("<answer>(B)</answer>", RIGHT),
        ("<answer>**B.**</answer>", RIGHT),
        ("<Answer>B</Answer>", RIGHT),
        ("<answer>Based on this</answer>", INVALID),
        ("<answer>B</answer> <answer>Based</answer>", INVALID),
        ("<answer>B12</answer>", INVALID),
        ("<answer></answer>", INVALID),
    ],
)
def test_choice_looks_only_into_the_last_tag(response: str, expected: tuple[float, float]) -> None:
    assert graded("choice", "B", response, tag="answer") == expected


def test_choice_reports_the_class_of_the_answer_alone() -> None:
    """Means over rows with `correct_no` are then over the rows whose answer is no."""
    grade = grader("choice", choices=["yes", "no"], tag="answer")
    flagged = grade(Task("t", (), "no"), "<answer>yes</answer>").metrics
    assert flagged == {"valid": 1.0, "correct": 0.0, "correct_no": 0.0}
    assert grade(Task("t", (), "No"), "<answer>no</answer>").metrics["correct_no"] == 1.0
    caught = grade(Task("t", (), "yes"), "<answer>yes</answer>").metrics
    assert caught == {"valid": 1.0, "correct": 1.0, "correct_yes": 1.0}
    assert grade(Task("t", (), "yes"), "").metrics["correct_yes"] == 0.0


def test_an_answer_that_is_no_choice_is_refused() -> None:
    """Such a row could never be right, and would count against every model."""
    with pytest.raises(TaskError, match=r"row 'x9' has the answer 'E'.*\['A', 'B'\]"):
        grader("choice")(Task("x9", (), "E"), "A")


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("1/2", "0.5", RIGHT),
        ("0.5", r"so it is \boxed{\frac{1}{2}}", RIGHT),
        (r"\frac12", "The answer is 1/2.", RIGHT),
        ("$\\frac{1}{2}$", r"\boxed{0.50}", RIGHT),
        (r"\boxed{7}", "7", RIGHT),
        ("1/2", r"\boxed{\frac{1}{3}}", WRONG),
        ("1/2", r"\boxed{1/3}. No: \boxed{1/2}", RIGHT),
        ("1/2", r"\boxed{1/2}. No: \boxed{1/3}", WRONG),
        ("1/2", r"\boxed{1/2} and 9 more", RIGHT),
        ("1/2", r"first 1/2, then \boxed{9", INVALID),
        ("1,234", "It is 1234", RIGHT),
        (1234, r"\boxed{1,234}", RIGHT),
        (1234, r"\boxed{1\,234}", RIGHT),
        ("12", r"\boxed{12 \text{ cm}}", RIGHT),
        ("12", r"\boxed{12\,cm}", RIGHT),
        ("12 cm", "12", RIGHT),
        ("18", "She makes $18 every day.", RIGHT),
        ("18", "Of 18 eggs she sells 9.", WRONG),
        ("-3", "x = -3", RIGHT),
        ("3", "x = -3", WRONG),
        ("-3", "Answer: \u22123", RIGHT),
        ("\u22123", r"\boxed{-3}", RIGHT),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", RIGHT),
        ("34", "Answer: 34", RIGHT),
        ("34", "half of it", INVALID),
        ("34", "", INVALID),
    ],
)
def test_math_compares_values(answer: Any, response: str, expected: tuple[float, float]) -> None:
    """Whatever their form, and only the last box or expression."""
    assert graded("math", answer, response) == expected


def test_math_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"math-verify.*opcd-lm\[math\]"):
        grader("math")


def test_choice_may_be_part_of_another_choice() -> None:
    both = ["good", "very good"]
    assert graded("choice", "very good", "That is very good.", choices=both) == RIGHT
    assert graded("choice", "good", "That is very good.", choices=both) == WRONG
    assert graded("choice", "good", "Good, even very good.", choices=both) == INVALID


def test_choice_takes_its_choices_literally() -> None:
    """A choice is text, not a pattern."""
    assert graded("choice", "C++", "I like C++ best", choices=["C++", "C#"]) == RIGHT
    assert graded("choice", "a.c", "abc", choices=["a.c", "x"]) == INVALID


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"mood": "angry", "escalate": true}', RIGHT),
        (' {"escalate":true,\n"mood":"angry"} ', RIGHT),
        ('{"mood": "happy", "escalate": true}', WRONG),
        ('{"mood": "furious", "escalate": true}', INVALID),
        ('{"mood": "angry", "escalate": 1}', INVALID),
        ('{"mood": "angry", "escalate": "true"}', INVALID),
        ('{"mood": "angry"}', INVALID),
        ('{"mood": "angry", "escalate": true, "x": 1}', INVALID),
        ('Sure: {"mood": "angry", "escalate": true}', INVALID),
        ('{"mood": "angry", "escalate": true} ', RIGHT),
        ('{"mood": "angry", "escalate": true}}', INVALID),
        ('["mood"]', INVALID),
        ("", INVALID),
    ],
)
def test_json_takes_the_whole_response(response: str, expected: tuple[float, float]) -> None:
    assert graded("json", ANSWER, response) == expected


def test_json_tells_which_key_is_right() -> None:
    found = grader("json")(Task("t", (), ANSWER), '{"mood": "happy", "escalate": true}')
    assert found.metrics["correct_mood"] == 0.0
    assert found.metrics["correct_escalate"] == 1.0
    assert "angry" in found.note


@pytest.mark.parametrize(
    "response", ["", "[]", '{"mood": 1, "escalate": true}', '{"mood": "angry"}']
)
def test_json_has_the_same_metrics_for_every_response(response: str) -> None:
    """Means over rows need each metric in each row."""
    metrics = grader("json")(Task("t", (), ANSWER), response).metrics
    assert metrics == {"valid": 0, "correct": 0, "correct_mood": 0, "correct_escalate": 0}


def test_json_allows_any_value_where_none_is_listed() -> None:
    assert graded("json", {"note": "b"}, '{"note": "a"}', keys={"note": []}) == WRONG


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_json_is_never_valid_for_other_values(value: Any) -> None:
    response = json.dumps({"mood": value, "escalate": True})
    expected = value in ("happy", "angry") if isinstance(value, str) else False
    assert graded("json", ANSWER, response)[0] == float(expected)


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [("red", "it is red", RIGHT), ("red", "it is blue", WRONG), ("red", "red", INVALID)],
)
def test_regex_compares_its_first_group(
    answer: str, response: str, expected: tuple[float, float]
) -> None:
    assert graded("regex", answer, response) == expected


def test_regex_without_groups_or_answer() -> None:
    assert graded("regex", None, "it is red") == RIGHT
    assert graded("regex", None, "red") == INVALID
    assert graded("regex", "is 5", "it is 5", pattern=r"is \d") == RIGHT


def test_regex_with_an_optional_group_is_graded() -> None:
    assert graded("regex", "red", "colour", pattern=r"colour(?: (\w+))?") == WRONG


def test_a_malformed_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="pattern"):
        grader("regex", pattern="(")


@pytest.mark.parametrize("kind", ["exact", "contains", "numeric", "math", "choice", "json"])
def test_a_row_without_an_answer_is_named(kind: str) -> None:
    valid = {"numeric": "5", "choice": "A", "json": '{"mood": "angry", "escalate": true}'}
    with pytest.raises(TaskError, match=r"row 'x9' has no answer.*remove \[grader\]"):
        grader(kind)(Task("x9", ()), valid.get(kind, "text"))


@pytest.mark.parametrize("kind", ["numeric", "math", "choice", "json"])
def test_a_row_without_an_answer_is_found_whatever_the_response(kind: str) -> None:
    """`opcd check` grades an empty response to find such rows before a run starts."""
    with pytest.raises(TaskError, match="row 'x9' has no answer"):
        grader(kind)(Task("x9", ()), "")


@pytest.mark.parametrize(
    ("kind", "answer", "response"),
    [
        ("json", {"mood": "angry"}, '{"mood": "angry", "escalate": true}'),
        ("json", "angry", '{"mood": "angry", "escalate": true}'),
        ("numeric", "many", "5"),
        ("math", "?", "5"),
    ],
)
def test_an_answer_of_another_form_is_named(kind: str, answer: Any, response: str) -> None:
    with pytest.raises(TaskError, match="x9"):
        grader(kind)(Task("x9", (), answer), response)


@pytest.mark.parametrize("kind", ["exact", "contains", "numeric", "choice", "json", "regex"])
@given(response=st.text(max_size=30))
def test_every_grader_gives_valid_and_correct_between_0_and_1(kind: str, response: str) -> None:
    """Whatever a model writes is graded; and nothing is correct that is not valid."""
    answer = {"json": ANSWER, "choice": "A"}.get(kind, "5")
    metrics = grader(kind)(Task("t", (), answer), response).metrics
    assert {"valid", "correct"} <= metrics.keys()
    assert all(value in (0.0, 1.0) for value in metrics.values())
    assert metrics["correct"] <= metrics["valid"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>\nIs it 3?\n</think>\n\nIt is 7.", RIGHT),
        ("Is it 3? 7?\n</think>\n\nIt is 3.", WRONG),
        ("<think>\nIt must be 7", INVALID),
        ("<think> 3 </think> <think> It must be 7", INVALID),
    ],
)
def test_a_thought_is_no_answer(response: str, expected: tuple[float, float]) -> None:
    """Nor is one that was cut before it ended, though the right number may stand in it."""
    assert graded("numeric", 7, response) == expected


def test_a_users_function_grades(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from opcd import Score\n"
        "def short(task, response):\n"
        "    return Score({'valid': 1.0, 'correct': float(len(response) <= task.answer)})\n"
    )
    (tmp_path / "my_grader_9.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert graded("function", 3, "abc", target="my_grader_9:short") == RIGHT
    assert graded("function", 3, "abcd", target="my_grader_9:short") == WRONG
