"""A rollout engine that answers from a script: for tests of tasks and loops, without a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opcd.rollouts.engine import Policy, Prompt, Sampling
from opcd.types import Rollout

Script = Callable[[Policy, Prompt], Sequence[int]]


@dataclass
class ScriptedEngine:
    """Answers each prompt with the token ids that `script` gives; remembers what it was asked."""

    script: Script
    """`(policy, prompt) -> response ids`, the end-of-sequence token included."""
    policy: Policy = "student"
    asked: list[tuple[Policy, str]] = field(default_factory=list)

    def use(self, policy: Policy, version: int) -> None:
        """Answer as this policy from now on."""
        del version
        self.policy = policy

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """The script's responses, cut at `max_new_tokens` as an engine would."""
        del sampling
        self.asked.extend((self.policy, prompt.task_id) for prompt in prompts)
        return [
            Rollout(
                prompt.task_id,
                tuple(ids[: prompt.max_new_tokens]),
                finished=len(ids) <= prompt.max_new_tokens,
            )
            for prompt in prompts
            for ids in [self.script(self.policy, prompt)]
        ]
