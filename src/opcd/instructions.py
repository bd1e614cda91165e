"""Instructions for a model that writes: a conversation in a text file, with slots to be filled.

A file is a list of turns, each under a heading of its own:

    ### system                       at most one, first
    ### user
    ### assistant                    a demonstration; at the end of the file, how the answer opens:
                                     one of its lines for each draw, in turn
    ### each example, user           written once for each of the user's own examples
    ### each example, assistant

Slots are names in braces, such as `{context}`; braces around anything else stay as they are.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import cast

from opcd.errors import AuthoringError
from opcd.types import Message, Role

EACH = "each example, "
HEADINGS = ("system", "user", "assistant", f"{EACH}user", f"{EACH}assistant")

_HEADING = re.compile(r"^### (.+?) *$", re.MULTILINE)
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Instructions:
    """The turns of one file, slots and all."""

    turns: tuple[tuple[str, str], ...]
    """Heading and text."""
    openings: tuple[str, ...] = ("",)
    """How the answer begins, one for each draw in turn; empty where that is left to the model."""

    def fill(self, slots: Mapping[str, str], examples: Sequence[str] = ()) -> list[Message]:
        """The conversation, with these texts in its slots."""
        messages: list[Message] = []
        each = [turn for turn in self.turns if turn[0].startswith(EACH)]
        for number, (heading, text) in enumerate(self.turns):
            if not heading.startswith(EACH):
                messages.append(_message(heading, text, slots))
            elif self.turns[number] is each[0]:
                for example in examples:
                    filled = {**slots, "example": example}
                    messages += [_message(h.removeprefix(EACH), t, filled) for h, t in each]
        return messages

    @property
    def demonstrations(self) -> list[str]:
        """What the file itself shows as answers."""
        return [text for heading, text in self.turns if heading == "assistant"]


def load_instructions(
    name: str, slots: Sequence[str], folder: Path | None, shipped: str = "authoring_prompts"
) -> Instructions:
    """The instructions of a file in the user's folder, or of the shipped one.

    Args:
        name: of the file, such as `topics.md`.
        slots: those that the file must have.
        folder: the user's own; without one, the package's.
        shipped: the package's folder.

    Raises:
        AuthoringError: the file is missing or malformed, or lacks a slot.
    """
    source = (folder or resources.files("opcd") / shipped) / name
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AuthoringError(
            f"instructions {str(folder)!r}: {name} cannot be read ({error}); copy the shipped "
            f"files of {shipped} into the folder and change those"
        ) from error
    return parse_instructions(text, name, slots)


def parse_instructions(text: str, name: str, slots: Sequence[str]) -> Instructions:
    """The turns of a file's text.

    Raises:
        AuthoringError: a heading is unknown, turns are missing, or a slot is.
    """
    before, *parts = _HEADING.split(text)
    turns = tuple((h, t.strip()) for h, t in zip(parts[::2], parts[1::2], strict=True))
    unknown = [heading for heading, _ in turns if heading not in HEADINGS]
    if before.strip() or unknown:
        raise AuthoringError(
            f"{name}: {(unknown or [before.strip()[:60]])[0]!r} is no turn; every turn stands "
            f"under a heading of its own: ### and one of {', '.join(HEADINGS)}"
        )
    openings = ("",)
    if turns and turns[-1][0] == "assistant":
        openings = tuple(turns[-1][1].split("\n"))
        turns = turns[:-1]
    if not turns or turns[-1][0] != "user" or "system" in [heading for heading, _ in turns[1:]]:
        raise AuthoringError(
            f"{name}: the turns are {[heading for heading, _ in turns]}; at most the first is "
            "system, and the last is user, or an assistant's that only opens the answer"
        )
    missing = [slot for slot in slots if f"{{{slot}}}" not in turns[-1][1]]
    if missing:
        raise AuthoringError(
            f"{name}: the last user turn lacks {{{missing[0]}}}, so the model would not be told; "
            "put it in"
        )
    return Instructions(turns, openings)


def _message(heading: str, text: str, slots: Mapping[str, str]) -> Message:
    filled = _SLOT.sub(lambda found: slots.get(found[1], found[0]), text)
    return Message(cast(Role, heading), filled)
