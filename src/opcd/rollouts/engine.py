"""What a rollout engine is: prompts in, responses of the current policy out, all as token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from opcd.types import Rollout

Policy = Literal["student", "base"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Whose prompt it is, its token ids, and how long the response may be."""

    task_id: str
    ids: tuple[int, ...]
    max_new_tokens: int
    draw: str = ""
    """Tells apart the draws of one task within one call."""
    keep_hidden: bool = False
    """Whether the rollout should hold the states its tokens were chosen from: a teacher that scores
    its own answer need not read it again. An engine without them leaves them out."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Of what `top_k` leaves."""
    seed: str = ""
    """With the task id, decides every draw: not the batch a prompt happens to be in."""
    top_k: int | None = None
    """`None` leaves the whole vocabulary."""

    def seed_of(self, prompt: Prompt) -> int:
        """The number that decides how a prompt is answered; below 2**63."""
        digest = hashlib.sha256(f"{self.seed}{prompt.draw}/{prompt.task_id}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def uniforms(self, prompt: Prompt, count: int) -> Tensor:
        """One number in [0, 1) for each of the response's first `count` tokens."""
        generator = torch.Generator().manual_seed(self.seed_of(prompt))
        return torch.rand(count, generator=generator, dtype=torch.float64)


class RolloutEngine(Protocol):
    """Generates responses with the weights it was last told to use."""

    def use(self, policy: Policy, version: int) -> None:
        """Answer as the student of this version (a step number), or as the base model."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """One response for each prompt, in their order."""
        ...


@runtime_checkable
class Resting(Protocol):
    """An engine that can do with less memory while nobody asks it."""

    def rest(self) -> None:
        """Nothing is asked until the next `use`; what that makes anew need not be kept."""
        ...
