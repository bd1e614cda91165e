"""Coach mode: the lesson of a sample is written from the student's very response to it.

A coach (the base model by default) reads a prompt, the response, and what is known about it: the
checker's word, the right answer, or the row's rubric. What it writes becomes the context of that
sample's teacher prompt, and the teacher then scores the same response ids. Where it writes no
item, the teacher has no context: the sample holds the student to its base, as an anchor does, and
is counted as `coach_empty`. Knows nothing of losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from opcd.assembly import Parts
from opcd.config.experience import Experience
from opcd.config.inputs import Coach
from opcd.contexts import lessons_context
from opcd.drawing import Rollouts
from opcd.errors import OverLongError
from opcd.experience import experience_text
from opcd.extraction import SHIPPED, Request, build_extractor, items_of
from opcd.graders import feedback_on
from opcd.instructions import load_instructions
from opcd.items import Item
from opcd.types import Answered, Context, Message, PromptPair, Task

SLOTS = ("prompt", "response", "feedback")
UNKNOWN = "Nothing; judge for yourself."


class Graded(Protocol):
    """What `responses.respond` gives of a row."""

    @property
    def turns(self) -> tuple[Answered, ...]:
        """Every prompt with its response."""
        ...

    @property
    def text(self) -> str:
        """The last response."""
        ...

    @property
    def feedback(self) -> str:
        """What a game said at the end."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What the coach is shown."""

    task: Task
    prompt: str
    response: str
    said: str = ""
    """What a game said at the end."""


def coach_rollouts(parts: Parts, rollouts: Rollouts, step: int) -> Rollouts:
    """A step's responses, each task's with what the coach wrote on it in the teacher's prompt.

    The student's side and the response stay as they are, ids and all; so do anchors.
    """
    if not isinstance(parts.config.context, Coach):
        return rollouts
    tasks = _tasks(parts, rollouts)
    own = [n for n, a in enumerate(rollouts.answered) if a.pair.origin == "task"]
    seen: list[Seen] = []
    for given in (rollouts.answered[n] for n in own):
        task, said = tasks[given.pair.task_id]
        response = parts.renderer.decode(given.rollout.response_ids)
        seen.append(Seen(task, _told(task.messages), response, said))
    answered = list(rollouts.answered)
    contexts = write_lessons(parts, seen, f"step-{step}")
    for n, one, context in zip(own, seen, contexts, strict=True):
        teacher_ids = _pair(parts, one.task, context).teacher_ids
        answered[n] = replace(answered[n], pair=replace(answered[n].pair, teacher_ids=teacher_ids))
    return replace(rollouts, answered=answered)


def coach_items(parts: Parts, items: Sequence[Item], given: Sequence[Graded]) -> list[Item]:
    """Rows to be measured, each with what the coach wrote on the base model's response to it."""
    seen: list[Seen] = []
    for item, one in zip(items, given, strict=True):
        # The last prompt of a game tells all that happened before.
        last = parts.renderer.decode(one.turns[-1].pair.student_ids)
        prompt = last if item.game else _told(item.task.messages)
        seen.append(Seen(item.task, prompt, one.text, one.feedback))
    contexts = write_lessons(parts, seen, "measured")
    return [
        replace(item, pair=_pair(parts, item.task, context), context=context)
        for item, context in zip(items, contexts, strict=True)
    ]


def write_lessons(parts: Parts, seen: Sequence[Seen], name: str) -> list[Context]:
    """What the coach writes on each response, as a context; empty where it wrote no item.

    Args:
        parts: the run.
        seen: what it is shown.
        name: of the occasion; decides the draws.
    """
    config = parts.config.context
    assert isinstance(config, Coach), "asked in coach mode only"
    asked = load_instructions("coach.md", SLOTS, config.instructions, SHIPPED)
    requests = [
        Request(
            f"{name}/{number}/{one.task.id}",
            tuple(
                asked.fill(
                    {
                        "prompt": one.prompt,
                        "response": one.response,
                        "feedback": feedback_of(parts, config, one),
                    }
                )
            ),
            asked.openings[number % len(asked.openings)],
        )
        for number, one in enumerate(seen)
    ]
    if parts.coach is None:
        limits = {"temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
        parts.coach = build_extractor(parts, Experience(extractor=config.coach, **limits))
    written = parts.coach.write(requests) if requests else []
    texts = [experience_text(items_of(one.text, one.finished)[0]) for one in written]
    return [lessons_context(config.lessons, text) for text in texts]


def feedback_of(parts: Parts, config: Coach, seen: Seen) -> str:
    """What the coach is told of a response."""
    if config.feedback == "rubric":
        return f"A good answer is to be like this: {seen.task.context}"
    if config.feedback == "none":
        return UNKNOWN
    if parts.grader is None:
        return seen.said or UNKNOWN
    outcome = parts.grader(seen.task, seen.response).metrics.get("correct")
    return feedback_on(seen.task, outcome, config.feedback) or UNKNOWN


def count_empty(answered: Sequence[Answered]) -> int:
    """Task responses that the coach wrote nothing on: both sides are the same prompt."""
    pairs = [a.pair for a in answered if a.pair.origin == "task"]
    return sum(pair.student_ids == pair.teacher_ids for pair in pairs)


def _tasks(parts: Parts, rollouts: Rollouts) -> dict[str, tuple[Task, str]]:
    """The task behind each prompt of a step, by the prompt's id, and what a game said of it."""
    if parts.config.game:
        episodes = rollouts.played.episodes
        return {t.pair.task_id: (t.task, e.feedback) for e in episodes for t in e.turns}
    return {item.task.id: (item.task, "") for item in parts.items["train"]}


def _told(messages: Sequence[Message]) -> str:
    return "\n\n".join(message.content for message in messages)


def _pair(parts: Parts, task: Task, context: Context) -> PromptPair:
    """Both prompts; a lesson that does not fit is left out, where rows may be dropped."""
    try:
        return parts.renderer.pair(task, context)
    except OverLongError:
        if parts.config.rendering.over_long == "error":
            raise
        return parts.renderer.pair(task, Context())
