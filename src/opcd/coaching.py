"""Coach mode: the lesson of a sample is written from the student's very response to it.

A coach (the base model by default) reads a prompt, the response, and what is known about it: the
checker's word, the right answer, or the row's rubric. What it writes becomes the context of that
sample's teacher prompt, and the teacher then scores the same response ids. Where it writes no
item, the teacher has no context: the sample holds the student to its base, as an anchor does, and
is counted as `coach_empty`. Knows nothing of losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opcd.assembly import Item, Parts
from opcd.config.inputs import Coach
from opcd.contexts import lessons_context
from opcd.drawing import Rollouts
from opcd.errors import OverLongError
from opcd.extraction import build_extractor, items_of
from opcd.instructions import load_instructions
from opcd.rendering import Renderer
from opcd.types import Answered, Context, PromptPair, Task

SLOTS = ("prompt", "response", "feedback")


@dataclass(frozen=True, slots=True)
class Seen:
    """A response that the coach is shown."""

    task: Task
    response: str
    said: str = ""
    """What a game said at the end."""


def coach_responses(parts: Parts, rollouts: Rollouts, step: int) -> list[Answered]:
    """A step's responses, each task's with what the coach wrote on it in the teacher's prompt.

    The student's side and the response stay as they are, ids and all; so do anchors.
    """
    if not isinstance(parts.config.context, Coach):
        return rollouts.answered
    shown = _shown(parts, rollouts)
    own = [n for n, a in enumerate(rollouts.answered) if a.pair.origin == "task"]
    seen = [shown[rollouts.answered[n].pair.task_id] for n in own]
    seen = [
        replace(one, response=parts.renderer.decode(rollouts.answered[n].rollout.response_ids))
        for n, one in zip(own, seen, strict=True)
    ]
    found = list(rollouts.answered)
    for n, one, context in zip(own, seen, write_lessons(parts, seen, f"{step}"), strict=True):
        pair = found[n].pair
        teacher_ids = _pair(parts.renderer, one.task, context).teacher_ids
        found[n] = replace(found[n], pair=replace(pair, teacher_ids=teacher_ids))
    return found


def coach_items(parts: Parts, items: Sequence[Item], seen: Sequence[Seen]) -> list[Item]:
    """Rows to be measured, each with what the coach wrote on the base model's response to it."""
    contexts = write_lessons(parts, seen, "evaluation")
    pairs = [
        _pair(parts.renderer, item.task, context)
        for item, context in zip(items, contexts, strict=True)
    ]
    return [
        replace(item, pair=pair, context=context)
        for item, pair, context in zip(items, pairs, contexts, strict=True)
    ]


def write_lessons(parts: Parts, seen: Sequence[Seen], seed: str) -> list[Context]:
    """What the coach writes on each response, as a context; empty where it wrote no item."""
    config = parts.config.context
    assert isinstance(config, Coach), "asked in coach mode only"
    instructions = load_instructions("coach.md", SLOTS, config.instructions, "experience_prompts")
    prompts = [
        instructions.fill(
            {
                "prompt": "\n\n".join(m.content for m in one.task.messages),
                "response": one.response,
                "feedback": feedback_of(parts, one),
            }
        )
        for one in seen
    ]
    if not prompts:
        return []
    coach = build_extractor(parts, config.coach, config.temperature, config.max_new_tokens, seed)
    texts = ["\n".join(f"- {item}" for item in items_of(a)[0]) for a in coach.write(prompts)]
    return [lessons_context(config.lessons, text) for text in texts]


def feedback_of(parts: Parts, seen: Seen) -> str:
    """What the coach is told of a response."""
    config = parts.config.context
    assert isinstance(config, Coach), "asked in coach mode only"
    if config.feedback == "rubric":
        return f"A good answer is to be like this: {seen.task.context}"
    if config.feedback == "none":
        return "Nothing; judge for yourself."
    if seen.said or parts.grader is None:
        return seen.said
    right = parts.grader(seen.task, seen.response).metrics.get("correct") == 1.0
    said = f"The answer is {'right' if right else 'wrong'}."
    return f"{said} The right answer: {seen.task.answer}" if config.feedback == "answer" else said


def count_empty(answered: Sequence[Answered]) -> int:
    """Task responses that the coach wrote nothing on: both sides are the same prompt."""
    pairs = [a.pair for a in answered if a.pair.origin == "task"]
    return sum(pair.student_ids == pair.teacher_ids for pair in pairs)


def _shown(parts: Parts, rollouts: Rollouts) -> dict[str, Seen]:
    """The task behind each prompt of a step, by the prompt's id."""
    if parts.config.game:
        episodes = rollouts.played.episodes
        return {t.pair.task_id: Seen(t.task, "", e.feedback) for e in episodes for t in e.turns}
    return {item.task.id: Seen(item.task, "") for item in parts.items["train"]}


def _pair(renderer: Renderer, task: Task, context: Context) -> PromptPair:
    """Both prompts; a lesson that does not fit is left out, where rows may be dropped."""
    try:
        return renderer.pair(task, context)
    except OverLongError:
        if renderer.config.over_long == "error":
            raise
        return renderer.pair(task, Context())
