"""What only the teacher sees, and where it stands in the conversation."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from opcd.config.inputs import ContextConfig, Lessons
from opcd.contexts import add_context, lessons_context, load_context, read_examples, read_text
from opcd.errors import ContextError
from opcd.types import Context, Message, Task
from worlds import write_jsonl

TASK = Task("t", (Message("user", "Hi?"),))
CHAT = Task(
    "c",
    (
        Message("system", "own"),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
    ),
)


def load(task: Task = TASK, **table: Any) -> Context:
    return load_context(TypeAdapter(ContextConfig).validate_python(table), task)


def text_file(folder: Path, text: str, name: str = "context.md") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def shown(task: Task, context: Context) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in add_context(task, context)]


def test_a_system_prompt_comes_first(tmp_path: Path) -> None:
    context = load(type="system_prompt", path=text_file(tmp_path, "\nBe brief.\n\n"))
    assert shown(TASK, context) == [("system", "Be brief."), ("user", "Hi?")]


def test_a_rows_own_system_text_comes_after_the_contexts() -> None:
    """Both in one message, since many templates take one only."""
    assert shown(CHAT, Context(system="Be brief.")) == [
        ("system", "Be brief.\n\nown"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_examples_stand_between_system_and_task(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1", "response": "2"}, {"prompt": "2+2", "response": "4"}]
    path = write_jsonl(tmp_path / "examples.jsonl", rows)
    context = load(type="examples", path=path, system=text_file(tmp_path, "Add."))
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "4")]
    assert shown(TASK, context) == [("system", "Add."), *turns, ("user", "Hi?")]
    alone = load(type="examples", path=path)
    assert shown(CHAT, alone)[:5] == [("system", "own"), *turns]


def test_a_document_in_the_system_message(tmp_path: Path) -> None:
    path = text_file(tmp_path, "MANUAL")
    context = load(type="document", path=path, template="Read:\n{document}\nEnd.")
    assert shown(TASK, context) == [("system", "Read:\nMANUAL\nEnd."), ("user", "Hi?")]


def test_a_document_in_the_user_turn_leaves_earlier_turns_alone(tmp_path: Path) -> None:
    path = text_file(tmp_path, "MANUAL")
    template = "{document}\n\nQ: {prompt}"
    context = load(type="document", path=path, placement="user", template=template)
    assert shown(CHAT, context) == [
        ("system", "own"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "MANUAL\n\nQ: c"),
    ]


def test_braces_in_documents_are_text(tmp_path: Path) -> None:
    """Manuals hold code and JSON; no part of them is a slot."""
    path = text_file(tmp_path, 'Write {"a": {0}} and {name}.')
    context = load(type="document", path=path)
    assert shown(TASK, context)[0] == ("system", 'Write {"a": {0}} and {name}.')


def test_a_document_about_prompts_is_not_filled_in(tmp_path: Path) -> None:
    path = text_file(tmp_path, "Templates hold a {prompt} slot.")
    template = "{document}\n\n{prompt}"
    context = load(type="document", path=path, placement="user", template=template)
    assert shown(TASK, context) == [("user", "Templates hold a {prompt} slot.\n\nHi?")]


@pytest.mark.parametrize(
    ("placement", "template", "expected"),
    [
        ("system", "Facts: {context}", [("system", "Facts: own facts"), ("user", "Hi?")]),
        ("user", "{context} | {prompt}", [("user", "own facts | Hi?")]),
    ],
)
def test_each_row_brings_its_own_context(
    placement: str, template: str, expected: list[tuple[str, str]]
) -> None:
    task = Task("t", TASK.messages, context="own facts")
    context = load(task, type="column", placement=placement, template=template)
    assert shown(task, context) == expected


@pytest.mark.parametrize("own", [None, ""])
def test_a_row_without_its_context_is_named(own: str | None) -> None:
    with pytest.raises(ContextError, match=r"row 'x9' has no context.*fill the row's"):
        load(Task("x9", TASK.messages, context=own), type="column")


def test_an_empty_context_changes_nothing() -> None:
    """The base of `KL = 0 without a context`."""
    assert Context().is_empty
    assert add_context(CHAT, Context()) == CHAT.messages
    assert add_context(TASK, Context()) == TASK.messages


@pytest.mark.parametrize(
    "context",
    [Context(system="s"), Context(examples=TASK.messages), Context(user_template="x {prompt}")],
)
def test_any_part_makes_a_context(context: Context) -> None:
    assert not context.is_empty


def test_a_missing_context_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match=r"none\.md' is missing.*Correct the path"):
        load(type="system_prompt", path=tmp_path / "none.md")


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_an_empty_context_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ContextError, match=r"context\.md' is empty; write the context"):
        read_text(text_file(tmp_path, text))


def test_a_context_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "context.md"
    path.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ContextError, match=r"context\.md"):
        read_text(path)


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"response": "a"}', "[1]", "text", "5"])
def test_a_malformed_example_names_its_line(tmp_path: Path, line: str) -> None:
    path = text_file(tmp_path, '{"prompt": "a", "response": "b"}\n' + line, "examples.jsonl")
    with pytest.raises(ContextError, match=r'examples\.jsonl, line 2: not an example .*"response"'):
        read_examples(path)


def test_an_example_whose_response_is_no_text_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "a", "response": {"mood": "happy"}}
    with pytest.raises(ContextError, match="line 1"):
        read_examples(write_jsonl(tmp_path / "examples.jsonl", [row]))


def test_unicode_line_separators_do_not_end_an_example(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "e.jsonl", [{"prompt": "a\u2028b", "response": "c\x85d"}])
    assert [m.content for m in read_examples(path)] == ["a\u2028b", "c\x85d"]


@pytest.mark.parametrize("placement", ["system", "user"])
def test_lessons_are_worded_by_placement(tmp_path: Path, placement: str) -> None:
    """Our words hold both, and the experience's own braces are text."""
    path = text_file(tmp_path, "- Mind {prompt} and {experience}.\n")
    context = load(type="experience", path=path, placement=placement)
    text = "\n".join(m.content for m in add_context(TASK, context))
    assert text.count("- Mind {prompt} and {experience}.") == 1
    assert text.count("Hi?") == 1


def test_lessons_take_the_users_template(tmp_path: Path) -> None:
    path = text_file(tmp_path, "- a\n")
    context = load(type="experience", path=path, template="{prompt} ({experience})")
    assert shown(TASK, context) == [("user", "Hi? (- a)")]


def test_lessons_without_an_item_are_no_context() -> None:
    assert lessons_context(Lessons(), " \n").is_empty


def test_an_empty_file_of_lessons_is_refused(tmp_path: Path) -> None:
    """As any other context file: it would train on nothing."""
    with pytest.raises(ContextError, match="is empty"):
        load(type="experience", path=text_file(tmp_path, "\n"))
