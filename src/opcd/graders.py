"""Is this response right? Each grader is a function `(task, response) -> Score`.

All of them report `valid` (the response has the asked form) and `correct` (it is also right). A
metric of one class (`correct_no`) is reported for the rows of that class alone.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from opcd.config import inputs
from opcd.errors import ConfigError, TaskError
from opcd.math_answers import load_verifier, parse_gold, parse_response, plain_minus
from opcd.targets import resolve
from opcd.types import Score, Task

Grader = Callable[[Task, str], Score]

ARTICLE = re.compile(r"\b(?:A|I) (?!(?:is|or|and|because)\b)(?=[a-z])")
"""A and I where a sentence goes on with them: words, not the letters of an option."""
WRAPPING = " \t\r\n.:;()[]*\"'"
"""What may stand around a choice in its tag."""
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A hyphen between two numbers, as in 10-3, is no sign of the second."""

THOUGHT = ("<think>", "</think>")
"""What a model that thinks before it answers puts around its thoughts."""


def build_grader(config: inputs.GraderConfig) -> Grader:
    """The grader that a `[grader]` table describes.

    A thought is no answer: only what follows it is graded. A user's own function is given all.
    """
    grader = _grader_of(config)
    if isinstance(config, inputs.Function):
        return grader
    return lambda task, response: grader(task, after_thought(response))


def after_thought(response: str) -> str:
    """A response without its thought; nothing is left of one that was cut while it thought."""
    opening, closing = THOUGHT
    return response.rpartition(closing)[2].partition(opening)[0]


def _grader_of(config: inputs.GraderConfig) -> Grader:
    match config:
        case inputs.Exact():
            return lambda task, response: grade_exact(task, response, config.ignore_case)
        case inputs.Contains():
            return grade_contains
        case inputs.Numeric():
            return lambda task, response: grade_numeric(task, response, config.tolerance)
        case inputs.Choice():
            return lambda task, response: grade_choice(task, response, config.choices, config.tag)
        case inputs.JsonObject():
            return lambda task, response: grade_json(task, response, config.keys)
        case inputs.Regex() | inputs.Math() | inputs.Function():
            return _prepare(config)


def form_of(config: inputs.GraderConfig) -> Callable[[str], bool] | None:
    """Whether a text has the form that right answers have, whatever it says; `None` if any has."""
    match config:
        case inputs.JsonObject(keys=keys):
            answer: Any = dict.fromkeys(keys)
        case inputs.Choice(choices=choices):
            answer = choices[0]
        case inputs.Regex():
            answer = None
        case _:
            return None
    grader, task = build_grader(config), Task("form", (), answer)
    return lambda text: grader(task, text).metrics["valid"] == 1.0


def grade_exact(task: Task, response: str, ignore_case: bool = False) -> Score:
    """Right where response and answer are the same text."""
    found, wanted = response.strip(), str(_answer(task)).strip()
    if ignore_case:
        found, wanted = found.lower(), wanted.lower()
    return _score(valid=bool(found), correct=found == wanted, note=f"wanted {wanted!r}")


def grade_contains(task: Task, response: str) -> Score:
    """Right where the answer occurs in the response."""
    wanted = str(_answer(task))
    hit = wanted.lower() in response.lower()
    return _score(valid=bool(response.strip()), correct=hit, note=f"wanted {wanted!r} in it")


def grade_numeric(task: Task, response: str, tolerance: float = 1e-6) -> Score:
    """Right where the last number in the response is the answer (thousands commas allowed)."""
    answer = plain_minus(str(_answer(task))).replace(",", "")
    try:
        wanted = float(answer)
    except ValueError as error:
        raise _unfit(task, "a number") from error
    numbers = NUMBER.findall(plain_minus(response))
    if not numbers:
        return _score(valid=False, correct=False, note="no number")
    found = float(numbers[-1].replace(",", ""))
    return _score(True, abs(found - wanted) <= tolerance, f"found {found}, wanted {wanted}")


def grade_math(task: Task, response: str, verifier: Any) -> Score:
    r"""Right where the last `\boxed{...}`, else the last expression, equals the answer.

    Equal in value: 1/2 is 0.5, 1,234 is 1234, and units are left aside.
    """
    wanted = str(_answer(task))
    gold = parse_gold(verifier, wanted)
    if not gold:
        raise _unfit(task, "a mathematical expression")
    found = parse_response(verifier, response)
    if not found:
        return _score(valid=False, correct=False, note="no expression, or a box left open")
    return _score(True, verifier.verify(gold, found), f"found {found[-1]}, wanted {wanted}")


def grade_choice(
    task: Task, response: str, choices: tuple[str, ...], tag: str | None = None
) -> Score:
    """Right where exactly one choice is named as a whole word, and it is the answer.

    With `tag`, only the last `<tag>...</tag>` counts and must hold the choice alone, so that
    neither 'Based on ...' is read as B, nor a sentence about every option as the last one.
    Without, a choice of one letter is named by its capital, in brackets, or alone: the article in
    'This is a hard case' is not option A.

    Besides `valid` and `correct`, `correct_CHOICE` says the latter of the answer's own class. Rows
    of other classes do not have it, so that its mean is the share of that class that is right.
    """
    wanted = str(_answer(task)).lower()
    (own, *_) = [c for c in choices if c.lower() == wanted] or [None]
    if own is None:
        raise _unfit(task, f"one of {list(choices)}")
    found = _tagged(choices, response, tag) if tag else _named(choices, response)
    if len(found) != 1:
        score = _score(valid=False, correct=False, note=f"names {len(found)} of the choices")
    else:
        (choice,) = found
        score = _score(True, choice == own, f"found {choice!r}, wanted {own!r}")
    return Score({**score.metrics, f"correct_{own}": score.metrics["correct"]}, score.note)


def grade_json(task: Task, response: str, keys: dict[str, tuple[Any, ...]]) -> Score:
    """Right where the whole response is one JSON object with these keys that equals the answer.

    Besides `valid` and `correct`, one metric for each key says whether that value is right.
    """
    answer = _answer(task)
    if not isinstance(answer, dict) or answer.keys() != keys.keys():
        raise _unfit(task, f"an object with the keys {sorted(keys)}")
    wrong = dict.fromkeys((f"correct_{key}" for key in keys), 0.0)
    try:
        found = json.loads(response)
    except json.JSONDecodeError as error:
        return Score({"valid": 0.0, "correct": 0.0, **wrong}, f"not JSON: {error.msg}")
    if not isinstance(found, dict) or found.keys() != keys.keys():
        return Score({"valid": 0.0, "correct": 0.0, **wrong}, f"keys are not {sorted(keys)}")
    for key, allowed in keys.items():
        if allowed and not any(_same(found[key], value) for value in allowed):
            note = f"{key} = {found[key]!r} is none of {list(allowed)}"
            return Score({"valid": 0.0, "correct": 0.0, **wrong}, note)
    each = {f"correct_{key}": float(_same(found[key], answer[key])) for key in keys}
    correct = float(all(each.values()))
    return Score({"valid": 1.0, "correct": correct, **each}, "" if correct else f"wanted {answer}")


def grade_regex(task: Task, response: str, pattern: re.Pattern[str]) -> Score:
    """Right where the pattern occurs and, with an answer, its first group equals the answer."""
    match = pattern.search(response)
    if match is None:
        return _score(valid=False, correct=False, note=f"no match for {pattern.pattern!r}")
    if task.answer is None:
        return _score(valid=True, correct=True)
    found = (match.group(1) if pattern.groups else match.group(0)) or ""
    return _score(True, found.strip() == str(task.answer).strip(), f"found {found!r}")


def feedback_on(task: Task, outcome: float | None, kind: str) -> str:
    """What somebody who reads an answer is told of it: `none`, its `outcome`, or the `answer`."""
    if outcome is None or kind == "none":
        return ""
    if 0.0 < outcome < 1.0:
        said = f"The answer is right to {outcome:.0%}."
    else:
        said = f"The answer is {'right' if outcome else 'wrong'}."
    if kind != "answer" or task.answer is None:
        return said
    known = task.answer if isinstance(task.answer, str) else json.dumps(task.answer)
    return f"{said} The right answer is: {known}"


def _tagged(choices: tuple[str, ...], response: str, tag: str) -> set[str]:
    inside = re.findall(
        rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", response, re.DOTALL | re.IGNORECASE
    )
    held = {inside[-1].strip().lower(), inside[-1].strip(WRAPPING).lower()} if inside else set()
    return {c for c in choices if c.lower() in held}


def _named(choices: tuple[str, ...], response: str) -> set[str]:
    alone = response.strip(WRAPPING).lower()
    letters = [c for c in choices if len(c) == 1 and c.isalpha()]
    found = {c for c in choices if c.lower() == alone}
    for letter in letters:
        upper = re.escape(letter.upper())
        bracketed = rf"[(\[*]{upper}[)\]*]"
        found |= {letter} if re.search(bracketed, response, re.IGNORECASE) else set()
        # An apostrophe makes it part of a word: "I'm".
        capital = rf"(?<!\w){upper}(?!['\u2019]?\w)"
        found |= {letter} if re.search(capital, ARTICLE.sub("", response)) else set()
    # Longest first, so that "very good" does not name "good" as well.
    words = sorted(set(choices) - set(letters), key=len, reverse=True)
    longest = "|".join(re.escape(word) for word in words)
    hits = re.findall(rf"(?<!\w)(?:{longest})(?!\w)", response, re.IGNORECASE) if words else []
    named = {hit.lower() for hit in hits}
    return found | {c for c in words if c.lower() in named}


def _prepare(config: inputs.Regex | inputs.Math | inputs.Function) -> Grader:
    """A grader that needs something made or loaded first."""
    match config:
        case inputs.Regex():
            pattern = _compile(config.pattern)
            return lambda task, response: grade_regex(task, response, pattern)
        case inputs.Math():
            verifier = load_verifier()
            return lambda task, response: grade_math(task, response, verifier)
        case inputs.Function():
            return resolve(config.target)


def _score(valid: bool, correct: bool, note: str = "") -> Score:
    return Score({"valid": float(valid), "correct": float(correct)}, "" if correct else note)


def _answer(task: Task) -> Any:
    if task.answer is None:
        raise TaskError(
            f"row {task.id!r} has no answer, so it cannot be graded; add an answer column, or "
            "remove [grader]"
        )
    return task.answer


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"grader.pattern = {pattern!r} is not a regular expression: {error}"
        ) from error


def _unfit(task: Task, wanted: str) -> TaskError:
    return TaskError(
        f"row {task.id!r} has the answer {task.answer!r}, but this grader compares with {wanted}; "
        "correct the row, or take another grader"
    )


def _same(found: Any, wanted: Any) -> bool:
    """Equal in value and kind: JSON's `true` is not 1."""
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)
