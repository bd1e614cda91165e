"""Prompts under other system messages, whose teacher is the base model with that same prompt.

They hold the rest of the behaviour still while one behaviour is baked in. The shipped set is
`anchors.json`; a set of the user's has the same form, with `train` (used in steps) and `test`
(used by the `kept` suite) apart.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from opcd.errors import TaskError
from opcd.types import Message, Task


@dataclass(frozen=True, slots=True)
class AnchorSet:
    """System messages and prompts of one split; every combination is an anchor."""

    systems: tuple[str, ...]
    prompts: tuple[str, ...]
    name: str
    answers: Mapping[str, str] = field(default_factory=dict)
    """Prompt -> a text that a right answer holds, where there is one."""

    def draw(self, count: int, seed: str, bare: int = 0) -> list[Task]:
        """`count` combinations, a function of `seed` alone; no prompt twice while they last.

        The last `bare` of them have no system message.
        """
        random_source = random.Random(seed)
        systems = _cycle(self.systems, count, random_source)
        prompts = _cycle(self.prompts, count, random_source)
        tasks: list[Task] = []
        for index, (system, prompt) in enumerate(zip(systems, prompts, strict=True)):
            messages = Message("system", system), Message("user", prompt)
            tasks.append(
                Task(
                    id=f"{self.name}-{seed}-{index}",
                    messages=messages[1:] if index >= count - bare else messages,
                    answer=self.answers.get(prompt),
                )
            )
        return tasks


def load_anchors(path: Path | None = None) -> tuple[AnchorSet, AnchorSet]:
    """The train and the test anchors of a file, or of the shipped set.

    Raises:
        TaskError: the file is malformed, or the two splits share a text.
    """
    source = path or resources.files("opcd") / "anchors.json"
    try:
        tree = json.loads(source.read_text(encoding="utf-8"))
        train, test = (
            AnchorSet(
                tuple(part["systems"]),
                tuple(part["prompts"]),
                f"anchor-{s}",
                part.get("answers", {}),
            )
            for s, part in ((s, tree[s]) for s in ("train", "test"))
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise TaskError(
            f"anchor.path = {str(path)!r} is not an anchor set ({error!r}); write "
            '{"train": {"systems": [...], "prompts": [...]}, "test": {...}}'
        ) from error
    shared = (set(train.systems) & set(test.systems)) | (set(train.prompts) & set(test.prompts))
    if shared:
        raise TaskError(
            f"the anchor set has {min(shared)!r} in train and in test, so `kept` would be "
            "measured on what was trained on; remove it from one of them"
        )
    if not all((train.systems, train.prompts, test.systems, test.prompts)):
        raise TaskError("the anchor set has an empty list; each split needs systems and prompts")
    return train, test


def _cycle(texts: Sequence[str], count: int, random_source: random.Random) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += random_source.sample(texts, min(len(texts), count - len(drawn)))
    return drawn
