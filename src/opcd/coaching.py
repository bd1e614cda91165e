"""Coach mode: the lesson of a sample is written from the student's very response to it.

A coach (the base model by default) reads a prompt, the response, and what is known about it: the
checker's feedback, the right answer, or the row's rubric. What it writes becomes the context of
that sample's teacher prompt, and the teacher then scores the same response ids. Where it writes no
item, the teacher has no context: the sample holds the student to its base, like an anchor, and is
counted as `coach_empty`. Knows nothing of losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opcd.assembly import Item, Parts
from opcd.config.inputs import Coach
from opcd.contexts import experience_context
from opcd.extraction import items_of
from opcd.instructions import load_instructions
from opcd.rendering import Renderer
from opcd.types import Answered, Context, Message, PromptPair, Task

SLOTS = ("prompt", "response", "feedback")


def is_coached(parts: Parts) -> bool:
    """Whether the run's context is written by a coach."""
    return isinstance(parts.config.context, Coach)
