"""Small tasks that a prompt explains by worked examples: can a model still follow a prompt?

They are in `other_contexts.json`, and never trained on.
"""

import json
from importlib import resources

from opcd.types import Message, Task


def load_other_contexts() -> dict[str, list[Task]]:
    """Name -> its rows, each a whole conversation with the examples in it."""
    text = (resources.files("opcd") / "other_contexts.json").read_text(encoding="utf-8")
    return {
        name: [
            Task(f"{name}-{i}", (*_opening(entry), Message("user", question)), answer)
            for i, (question, answer) in enumerate(entry["rows"])
        ]
        for name, entry in json.loads(text)["tasks"].items()
    }


def _opening(entry: dict[str, object]) -> tuple[Message, ...]:
    turns = [Message("system", str(entry["system"]))]
    for question, answer in entry["examples"]:  # type: ignore[union-attr]
        turns += [Message("user", question), Message("assistant", answer)]
    return tuple(turns)
