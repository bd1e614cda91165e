"""`opcd.rollouts.scripted`: the shipped fake behaves as an engine does."""

from opcd.rollouts.engine import Policy, Prompt, Sampling
from opcd.rollouts.scripted import ScriptedEngine
from opcd.types import Rollout


def script(policy: Policy, prompt: Prompt) -> list[int]:
    return [len(prompt.ids), 8 if policy == "base" else 9, 2]


def test_it_answers_in_order_and_remembers_what_it_was_asked() -> None:
    engine = ScriptedEngine(script)
    prompts = [Prompt("a", (1, 1), 5), Prompt("b", (1,), 3)]
    assert engine.generate(prompts, Sampling()) == [
        Rollout("a", (2, 9, 2), finished=True),
        Rollout("b", (1, 9, 2), finished=True),
    ]
    engine.use("base", 0)
    assert engine.generate(prompts[:1], Sampling())[0].response_ids == (2, 8, 2)
    assert engine.asked == [("student", "a"), ("student", "b"), ("base", "a")]


def test_it_cuts_at_max_new_tokens_as_an_engine_would() -> None:
    engine = ScriptedEngine(script)
    (rollout,) = engine.generate([Prompt("a", (1,), 2)], Sampling())
    assert rollout == Rollout("a", (1, 9), finished=False)
