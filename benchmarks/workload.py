"""What both sides of the comparison are given: the same texts, and the protocol they are driven by.

A side is a process that reads `step` from its standard input, does one training step, and answers
with one line of JSON. Knows nothing of torch; the texts are those of the support desk.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DESK = Path(__file__).parents[1] / "recipes" / "support_desk"
MARK = "@opcd "
"""Opens a line that is an answer; a library's own chatter has no such opening."""


@dataclass(frozen=True)
class Workload:
    """One setting, the same for all sides."""

    model: str
    """Folder of the plain model."""
    variant: str
    """`float32`, `bfloat16` (weights and products), or `mixed` (weights in float32, products in
    bfloat16 under autocast)."""
    context: str
    """Put before the prompt on the teacher's side; empty for none."""
    prompts: tuple[str, ...]
    new_tokens: int
    """Of every response: none ends sooner."""
    rank: int = 16
    lr: float = 1e-4

    def dump(self) -> str:
        """One line, as `load` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> "Workload":
        """The workload that `dump` wrote."""
        found = json.loads(text)
        return Workload(**{**found, "prompts": tuple(found["prompts"])})

    @property
    def template(self) -> str:
        """How context and prompt become the teacher's user turn."""
        return "{context}\n\n{prompt}" if self.context else "{context}{prompt}"


def read_prompts(count: int) -> tuple[str, ...]:
    """Messages of the support desk's test rows."""
    lines = (DESK / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["prompt"] for line in lines[:count])


def make_context(tokenizer: Any, tokens: int) -> str:
    """Messages with their answers, cut after so many tokens."""
    if not tokens:
        return ""
    lines = (DESK / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    text = "\n".join(f"{row['prompt']} -> {json.dumps(row['answer'])}" for row in rows)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < tokens:
        raise SystemExit(f"the desk's rows have {len(ids)} tokens, not {tokens}; ask for fewer")
    return tokenizer.decode(ids[:tokens])


def answer(**found: Any) -> None:
    """Tell the driver something."""
    print(MARK + json.dumps(found), flush=True)


def wait_for_step() -> bool:
    """Block until the driver asks for a step; `False` when it wants no more."""
    return sys.stdin.readline().strip() == "step"


def parse_answer(line: str) -> Mapping[str, Any] | None:
    """What `answer` told, or `None` for any other line."""
    return json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else None
