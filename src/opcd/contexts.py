"""What only the teacher sees, and where it is placed in the conversation."""

import hashlib
import json
import re
from pathlib import Path

from opcd.config.inputs import (
    Coach,
    Column,
    ContextConfig,
    Document,
    Examples,
    Lessons,
    SystemPrompt,
)
from opcd.errors import ContextError
from opcd.types import Context, Message, Task

LESSONS = {
    "system": "What was learned from earlier problems. Use what helps with the one you are given."
    "\n\n{experience}",
    "user": "What was learned from earlier problems:\n\n{experience}\n\n"
    "Use what helps with this one:\n\n{prompt}",
}
"""How an experience is worded by placement, where the run has no template of its own."""


def load_context(config: ContextConfig, task: Task) -> Context:
    """The context of one task.

    Raises:
        ContextError: a file is missing or empty, or a row has no context of its own.
    """
    match config:
        case SystemPrompt():
            return Context(system=read_text(config.path))
        case Examples():
            system = read_text(config.system) if config.system else ""
            return Context(system=system, examples=read_examples(config.path))
        case Document():
            return _place(config.template, "{document}", read_text(config.path), config.placement)
        case Column():
            own = _own_text(task, "type = 'column' takes it")
            return _place(config.template, "{context}", own, config.placement)
        case Coach():
            if config.feedback == "rubric":
                _own_text(task, "feedback = 'rubric' takes what the coach is told")
            return Context()
        case Lessons():
            return _lessons_of(config, task)


def lessons_context(config: Lessons, experience: str) -> Context:
    """The text of an experience, placed as the run says; empty, if there is none."""
    template = config.template or LESSONS[config.placement]
    if not experience.strip():
        return Context()
    return _place(template, "{experience}", experience.strip(), config.placement)


def pool_of(config: ContextConfig) -> list[Context]:
    """The contexts that every train row is asked with, where there are several."""
    if not isinstance(config, Lessons) or len(config.files) < 2:
        return []
    return [lessons_context(config, read_text(path)) for path in config.files]


def add_context(task: Task, context: Context) -> tuple[Message, ...]:
    """The conversation as the teacher sees it.

    The context's system text comes before the task's own, in one system message; the examples
    follow; the last user turn goes through `context.user_template`.
    """
    own_system = [m.content for m in task.messages if m.role == "system"]
    turns = [m for m in task.messages if m.role != "system"]
    system = "\n\n".join(text for text in (context.system, *own_system) if text)
    last = Message("user", _fill(context.user_template, turns[-1].content))
    head = (Message("system", system),) if system else ()
    return (*head, *context.examples, *turns[:-1], last)


def read_text(path: Path) -> str:
    """A context file's text, without the white space around it.

    Raises:
        ContextError: there is no such file, or nothing in it.
    """
    if not path.is_file():
        raise ContextError(
            f"the context file {str(path)!r} is missing; the teacher would see nothing that the "
            "student does not. Correct the path"
        )
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ContextError(
            f"the context file {str(path)!r} is not UTF-8 ({error}); save it as UTF-8"
        ) from error
    if not text:
        raise ContextError(f"the context file {str(path)!r} is empty; write the context into it")
    return text


def read_examples(path: Path) -> tuple[Message, ...]:
    """Worked examples as turns: a user's `prompt`, the assistant's `response`.

    Raises:
        ContextError: a line is not such an object.
    """
    turns: list[Message] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        try:
            row = json.loads(line)
            if not all(isinstance(row[key], str) for key in ("prompt", "response")):
                raise TypeError("prompt and response must be texts")
            turns += [Message("user", row["prompt"]), Message("assistant", row["response"])]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ContextError(
                f"{path.name}, line {number}: not an example ({error!r}); write "
                '{"prompt": "...", "response": "..."}'
            ) from error
    return tuple(turns)


def _own_text(task: Task, who: str) -> str:
    if not task.context:
        raise ContextError(
            f"row {task.id!r} has no context, but context.{who} from there; fill the row's context "
            "column"
        )
    return task.context


def _lessons_of(config: Lessons, task: Task) -> Context:
    if not config.files:
        return Context()
    number = int(hashlib.sha256(task.id.encode()).hexdigest(), 16) % len(config.files)
    return lessons_context(config, read_text(config.files[number]))


def _place(template: str, slot: str, text: str, placement: str) -> Context:
    if placement == "system":
        return Context(system=template.replace(slot, text))
    # The text's own "{prompt}" is not a place for the prompt.
    return Context(user_template=template.replace(slot, text.replace("{prompt}", "{{prompt}}")))


def _fill(template: str, prompt: str) -> str:
    parts = re.split(r"(?<!\{)\{prompt\}(?!\})", template)
    return prompt.join(part.replace("{{prompt}}", "{prompt}") for part in parts)
