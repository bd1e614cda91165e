"""`opcd.instructions`: files of turns with slots, the shipped ones among them."""

from pathlib import Path

import pytest

from opcd.errors import AuthoringError
from opcd.instructions import load_instructions, parse_instructions
from opcd.types import Message

FILE = """### system
Write.
### each example, user
{context}
### each example, assistant
"{example}"
### user
{context} on {topic}, {not a slot} {other}
### assistant
"I
"My
"""


def test_slots_are_filled_once_and_other_braces_stay() -> None:
    """A context may itself hold braces, such as JSON or the name of a slot."""
    found = parse_instructions(FILE, "f.md", ["context", "topic"])
    turns = found.fill({"context": '{"a": {topic}}', "topic": "tea"})
    assert turns[-1] == Message("user", '{"a": {topic}} on tea, {not a slot} {other}')
    assert found.openings == ('"I', '"My')


def test_examples_become_turns_and_none_leave_nothing() -> None:
    found = parse_instructions(FILE, "f.md", ["context"])
    slots = {"context": "C", "topic": "T"}
    assert [m.role for m in found.fill(slots)] == ["system", "user"]
    assert found.fill(slots, ["one", "two"])[1:5] == [
        Message("user", "C"),
        Message("assistant", '"one"'),
        Message("user", "C"),
        Message("assistant", '"two"'),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "'hello' is no turn"),
        ("### usr\n{context}", "'usr' is no turn"),
        ("", "the turns are"),
        ("### assistant\nx", "the turns are"),
        ("### user\n{context}\n### system\nx\n### user\n{context}", "at most the first is system"),
        ("### user\nhello", r"lacks \{context\}"),
    ],
)
def test_a_malformed_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(AuthoringError, match=message):
        parse_instructions(text, "f.md", ["context"])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AuthoringError, match=r"topics\.md cannot be read"):
        load_instructions("topics.md", ["context"], tmp_path)


def test_the_users_folder_comes_before_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "topics.md").write_text("### user\nmine {context}", encoding="utf-8")
    mine = load_instructions("topics.md", ["context"], tmp_path)
    assert mine.fill({"context": "C"}) == [Message("user", "mine C")]
    assert load_instructions("topics.md", ["context"], None) != mine


def test_the_shipped_files_show_answers() -> None:
    for name, slots in (("topics.md", ["context"]), ("messages.md", ["context", "topic"])):
        assert load_instructions(name, slots, None).demonstrations
