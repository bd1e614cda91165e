"""Conversations become token ids, on the student's side without the context, on the teacher's with.

The chat template of the model's own tokenizer does the work; nothing is ever cut. What a template
adds by itself (a default system message, a thinking marker) is shown by `preamble` and checked
by `pair`. Takes a tokenizer; knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from opcd.config.training import Rendering
from opcd.contexts import add_context
from opcd.errors import OverLongError, RenderingError
from opcd.types import Context, Message, Origin, PromptPair, Task

MARK = "\u2042opcd\u2042"  # a text that no template contains, to see what a template does with it


@dataclass(frozen=True)
class Renderer:
    """A tokenizer's chat template, and what may be rendered with it."""

    tokenizer: Any
    config: Rendering
    max_prompt_tokens: int
    """A prompt with more tokens than this does not fit."""

    def pair(self, task: Task, context: Context, origin: Origin = "task") -> PromptPair:
        """One task as token ids, for both sides.

        Raises:
            OverLongError: a prompt does not fit.
            RenderingError: the sides open the answer differently.
        """
        with_context = add_context(task, context)
        student = self.text(task.messages, self.config.student_thinking)
        teacher = self.text(with_context, self.config.teacher_thinking)
        self._check_openings(
            self._opening(task.messages, self.config.student_thinking),
            self._opening(with_context, self.config.teacher_thinking),
        )
        student_ids, teacher_ids = self.encode(student), self.encode(teacher)
        for side, ids in (("student", student_ids), ("teacher", teacher_ids)):
            if len(ids) > self.max_prompt_tokens:
                raise OverLongError(
                    f"row {task.id!r}: its {side} prompt has {len(ids)} tokens, but at most "
                    f"{max(0, self.max_prompt_tokens)} fit: what the model takes less "
                    "rollout.max_new_tokens, or rendering.max_prompt_tokens; make room, shorten "
                    "the prompt or its context, or, if such rows are few, set "
                    'rendering.over_long = "drop_row"'
                )
        return PromptPair(task.id, student_ids, teacher_ids, origin)

    def text(self, messages: Sequence[Message], thinking: bool | None = None) -> str:
        """A conversation as the text the model reads, ending where its answer begins."""
        if messages[0].role == "system" and not self.has_system_role:
            messages = _fold_system(messages)
        return self._apply(messages, thinking)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of rendered text; special tokens in it count as such."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens and outer white space."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    @property
    def has_system_role(self) -> bool:
        """Whether the template shows a system message; if not, it joins the first user turn."""
        try:
            return MARK in self._apply([Message("system", MARK), Message("user", "x")], None)
        except RenderingError:
            return False

    @property
    def preamble(self) -> str:
        """What the template itself puts before a first user message."""
        return self._apply([Message("user", MARK)], None).partition(MARK)[0]

    def _opening(self, messages: Sequence[Message], thinking: bool | None) -> str:
        """What the template puts between the last user turn and the answer."""
        marked = (*messages[:-1], Message("user", MARK))
        return self.text(marked, thinking).rpartition(MARK)[2]

    def _apply(self, messages: Sequence[Message], thinking: bool | None) -> str:
        if not self.tokenizer.chat_template:
            raise RenderingError(
                f"the tokenizer of {self.tokenizer.name_or_path!r} has no chat template, so a "
                "conversation cannot be rendered; use an instruct model, or put a "
                "chat_template.jinja into its folder"
            )
        extra = {} if thinking is None else {"enable_thinking": thinking}
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **extra
            )
        except TemplateError as error:
            raise RenderingError(f"the chat template refuses this conversation: {error}") from error

    def _check_openings(self, student: str, teacher: str) -> None:
        deliberate = None not in (self.config.student_thinking, self.config.teacher_thinking)
        if student != teacher and not deliberate:
            raise RenderingError(
                f"the student's answer opens after {student!r}, the teacher's after {teacher!r}: "
                "every first token would be scored in the wrong place. Set "
                "rendering.student_thinking and rendering.teacher_thinking, both"
            )


def render_pairs(
    renderer: Renderer, tasks: Sequence[Task], contexts: Sequence[Context], origin: Origin = "task"
) -> tuple[list[PromptPair], list[str]]:
    """All tasks as pairs, and the ids of the rows that were dropped for their length.

    Raises:
        OverLongError: a row does not fit and `rendering.over_long` is `error`, or none fits.
    """
    pairs: list[PromptPair] = []
    dropped: list[str] = []
    for task, context in zip(tasks, contexts, strict=True):
        try:
            pairs.append(renderer.pair(task, context, origin))
        except OverLongError:
            if renderer.config.over_long == "error":
                raise
            dropped.append(task.id)
    check_some_fit(renderer, len(pairs), len(dropped))
    return pairs, dropped


def check_some_fit(renderer: Renderer, kept: int, dropped: int) -> None:
    """Refuse to go on without a row.

    Raises:
        OverLongError: all were dropped.
    """
    if not kept:
        raise OverLongError(
            f"all {dropped} rows are longer than {renderer.max_prompt_tokens} tokens; "
            "shorten the context or use a model that holds more"
        )


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all sequences begin with; their last token never counts.

    The last prompt token is left to each sequence because its logits predict the response.
    """
    if not sequences:
        return 0
    first, last = min(sequences), max(sequences)
    limit = min(len(s) for s in sequences) - 1
    for index in range(limit):
        if first[index] != last[index]:
            return index
    return limit


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system, first, *rest = messages
    return [Message(first.role, f"{system.content}\n\n{first.content}"), *rest]
