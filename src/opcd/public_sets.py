"""Rows of public data sets become this project's rows, each by a small pure function.

Every row gets `prompt`, `answer`, `id` and `template`, so that sets can be mixed and
`tasks.group_by = "template"` works for all of them. Rows without a gold answer or a needed text,
and repeats of an earlier prompt, are left out and counted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opcd.errors import TaskError

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PublicSet:
    """Where a set lies on the hub, and how one of its rows is read."""

    hub_id: str
    config: str | None
    splits: tuple[str, ...]
    """Those with gold answers."""
    read: Callable[[Row], dict[str, str]]
    """`prompt` and `answer`, and where the set has them `id` and `template`.

    Raises LookupError where the row has to be left out, TaskError where the whole file has.
    """


def read_medmcqa(row: Row) -> dict[str, str]:
    """A medical question with four options; the answer is a letter.

    Options of one question share its template, in whatever order they are asked again.
    """
    question = _text(row, "question")
    options = [_text(row, f"op{letter}") for letter in "abcd"]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True))
    return {
        "id": _text(row, "id"),
        "prompt": f"{question}\n\n{listed}\n\nWhich option is right? Close your reply with its "
        "letter alone in tags, like <answer>X</answer>.",
        "answer": _letter(row.get("cop")),
        "template": _normal(question),
    }


def read_tweet_offensive(row: Row) -> dict[str, str]:
    """A tweet; is it offensive, yes or no."""
    return {
        "prompt": _yes_no_prompt(_text(row, "text"), "offensive"),
        "answer": _yes_no(row.get("label"), "offensive", "non-offensive"),
    }


def read_hatecheck(row: Row) -> dict[str, str]:
    """A composed test case; is it hate speech, yes or no. Also reads `text`, `label`, `template`.

    Cases composed from one template differ in the group they name, so they are kept together.
    """
    found = {
        "prompt": _yes_no_prompt(_text(row, "test_case", "text"), "hate speech"),
        "answer": _yes_no(_first(row, "label_gold", "label"), "hateful", "non-hateful"),
        "id": _text(row, "case_id", "id"),
        "template": _text(row, "templ_id", "template"),
    }
    return found | {"functionality": _text(row, "functionality")}


def read_ethos(row: Row) -> dict[str, str]:
    """A comment; is it hate speech, yes or no."""
    return {
        "prompt": _yes_no_prompt(_text(row, "text"), "hate speech"),
        "answer": _yes_no(row.get("label"), "hate_speech", "no_hate_speech"),
    }


def read_dapo_math(row: Row) -> dict[str, str]:
    """A problem with the set's own instruction around it; the answer is a number."""
    turns = row.get("prompt") or ()
    if len(turns) != 1:
        raise LookupError("prompt is not a single turn")
    return {
        "prompt": _text(turns[0], "content"),
        "answer": _text(row.get("reward_model") or {}, "ground_truth"),
    }


def read_gsm8k(row: Row) -> dict[str, str]:
    """A word problem; the answer is the number behind `####`, or all of it where there is none."""
    answer = _text(row, "answer").rpartition("####")[2].strip()
    if not any(character.isdigit() for character in answer):
        raise LookupError("answer holds no number")
    return {"prompt": _text(row, "question"), "answer": answer}


SETS: dict[str, PublicSet] = {
    # Its test split has no gold answers.
    "medmcqa": PublicSet("openlifescienceai/medmcqa", None, ("train", "validation"), read_medmcqa),
    "tweet_offensive": PublicSet(
        "cardiffnlp/tweet_eval", "offensive", ("train", "validation", "test"), read_tweet_offensive
    ),
    "hatecheck": PublicSet("Paul/hatecheck", None, ("test",), read_hatecheck),
    "ethos": PublicSet("iamollas/ethos", "binary", ("train",), read_ethos),
    "dapo_math": PublicSet("BytedTsinghua-SIA/DAPO-Math-17k", None, ("train",), read_dapo_math),
    "gsm8k": PublicSet("openai/gsm8k", "main", ("train", "test"), read_gsm8k),
}
"""Short name -> set; the names are those of `type = "public"`."""


def find_set(name: str, split: str) -> PublicSet:
    """The set of a short name, if it has the split.

    Raises:
        TaskError: it has not.
    """
    found = SETS[name]
    if split not in found.splits:
        raise TaskError(
            f"{name} has no split {split!r} with answers, only {' and '.join(found.splits)}; write "
            f'split = "{found.splits[0]}"'
        )
    return found


def convert(name: str, split: str, rows: Iterable[Row]) -> tuple[list[dict[str, str]], str | None]:
    """A set's rows in this project's form, and what was left out of them, if anything was.

    Two rows with the same prompt but different answers contradict each other: both are left out.

    Raises:
        TaskError: no row is left, or the file is of another form.
    """
    read = SETS[name].read
    kept: dict[str, dict[str, str]] = {}
    contradicted: set[str] = set()
    dropped: Counter[str] = Counter()
    number = 0
    for number, row in enumerate(rows, start=1):
        try:
            fresh = _named(read(row), name, f"{split}-{number:06d}")
        except LookupError as error:
            dropped[str(error.args[0])] += 1
            continue
        key = _normal(fresh["prompt"])
        if key not in kept:
            kept[key] = fresh
        elif kept[key]["answer"] == fresh["answer"]:
            dropped["repeats an earlier prompt"] += 1
        else:
            contradicted.add(key)
            dropped["contradicts another row's answer"] += 1
    for key in contradicted:
        del kept[key]
        dropped["contradicts another row's answer"] += 1
    note = _note(name, split, number, dropped)
    if not kept:
        raise TaskError(
            f"{note or f'{name} {split} is empty'}, so no row is left; name rows with the "
            f"columns of {SETS[name].hub_id}"
        )
    return list(kept.values()), note


def _named(row: dict[str, str], name: str, fallback: str) -> dict[str, str]:
    """The row with an id and a template that no other set has."""
    own = f"{name}-{row.get('id', fallback)}"
    return {
        **row,
        "id": own,
        "template": f"{name}: {row['template']}" if "template" in row else own,
    }


def _note(name: str, split: str, rows: int, dropped: Counter[str]) -> str | None:
    if not dropped:
        return None
    reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    return f"{name} {split}: {dropped.total()} of {rows} rows left out ({reasons})"


def _text(row: Row, *names: str) -> str:
    value = _first(row, *names)
    if value is None or not str(value).strip():
        raise LookupError(f"no {' or '.join(names)}")
    return str(value).strip()


def _first(row: Row, *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _letter(cop: Any) -> str:
    if cop == 4:
        raise TaskError(
            "medmcqa: cop = 4, so this file counts its options from 1, as the first release did; "
            "the hub's counts from 0 (-1 where there is no answer). Subtract 1 from every cop"
        )
    if isinstance(cop, str) and cop.upper() in tuple("ABCD"):
        return cop.upper()
    if not isinstance(cop, int) or not 0 <= cop <= 3:
        raise LookupError("no gold answer")
    return "ABCD"[cop]


def _yes_no(label: Any, yes: str, no: str) -> str:
    label = str(label).strip().lower()
    if label in ("1", "yes", yes):
        return "yes"
    if label in ("0", "no", no):
        return "no"
    raise LookupError("no gold answer")


def _yes_no_prompt(text: str, what: str) -> str:
    return (
        f"Is the text between the two lines {what}?\n\n---\n{text}\n---\n\nClose your reply with "
        "<answer>yes</answer> or <answer>no</answer>."
    )


def _normal(text: str) -> str:
    return " ".join(text.lower().split())
