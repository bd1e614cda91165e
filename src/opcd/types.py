"""The nouns of the method, as frozen values. Knows nothing of tokenizers, files or devices.

Shape suffixes, used on every tensor in this package:

    B  sequences          T  response tokens, flattened over the batch
    S  padded tokens      D  hidden width
    V  vocabulary         K  entries of a top-k support
    C  tokens of a chunk  P  tokens of a shared prefix

`hidden_TD` is therefore one hidden vector for each response token of the batch. Units are in
names too: `kl_nats_per_token`, `wall_s`, `peak_bytes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Origin = Literal["task", "anchor", "context_return"]
Condition = Literal["base", "in_context", "baked", "baked_in_context"]

CONDITIONS: tuple[Condition, ...] = ("base", "in_context", "baked")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt that the student is to answer, and what is known about the right answer."""

    id: str
    """Unique within its split; seeds the sampling of its responses."""
    messages: tuple[Message, ...]
    """The conversation that both sides see; its last turn is the user's."""
    answer: Any = None
    """What the grader compares with; `None` where there is nothing to grade."""
    context: str | None = None
    """This row's own context, for `context.type = "column"`."""
    group: str | None = None
    """The template or source the row comes from; a group never spans two splits."""


@dataclass(frozen=True, slots=True)
class Context:
    """What only the teacher sees."""

    system: str = ""
    """Text placed in the system message, before the task's own system text."""
    examples: tuple[Message, ...] = ()
    """Worked examples, placed as chat turns between the system message and the task."""
    user_template: str = "{prompt}"
    """What the last user turn becomes; `{prompt}` is the task's own text."""

    @property
    def is_empty(self) -> bool:
        """Whether teacher and student would see the same conversation."""
        return not self.system and not self.examples and self.user_template == "{prompt}"


@dataclass(frozen=True, slots=True)
class PromptPair:
    """One task as token ids, without and with the context."""

    task_id: str
    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    origin: Origin = "task"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response, as the ids that were sampled: never decoded and tokenised again."""

    task_id: str
    response_ids: tuple[int, ...]
    """Includes the end-of-sequence token where one was sampled."""
    finished: bool
    """Whether the response ended by itself, rather than at `max_new_tokens`."""
    hidden_TD: Any = field(default=None, compare=False, repr=False)
    """The states its tokens were chosen from, if they were to be kept (`Prompt.keep_hidden`)."""
    log_probs: tuple[float, ...] | None = field(default=None, compare=False, repr=False)
    """The student's log-probabilities of its tokens at temperature 1, if its engine is another
    program than the trainer: what the trainer makes of them tells whether their weights agree."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt pair with the response that both sides score."""

    pair: PromptPair
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class Score:
    """What a grader or a game found in one response; metrics are between 0 and 1, or counts."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    """Why it is not right, for people who read answers."""
