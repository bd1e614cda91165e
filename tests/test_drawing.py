"""`opcd.drawing`: whose prompts a step has, and who answers them."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from opcd.assembly import Parts
from opcd.drawing import answer_as_teacher, draw_pairs, roll_out
from opcd.errors import ConfigError
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.scripted import ScriptedEngine
from opcd.types import Rollout
from tiny import make_run, parts_of, scripted

LORA = ('model.tuning={type="lora", rank=4}',)


def started(tmp_path: Path, model: Path, *overrides: str) -> Parts:
    """Scripted parts."""
    return parts_of(make_run(tmp_path, model, *overrides))


def test_context_return_comes_in_every_so_many_steps(tiny_model_path: Path, tmp_path: Path) -> None:
    """As many rows on the whole, and the same ones; the other steps have none."""

    def returned(every: int) -> list[list[str]]:
        keys = ("anchor.context_return=0.25", f"anchor.return_every_steps={every}", "steps=4")
        parts = started(tmp_path / str(every), tiny_model_path, *LORA, *keys)
        pairs = [draw_pairs(parts, step)[0] for step in range(4)]
        return [[p.task_id for p in taught if p.origin == "context_return"] for taught in pairs]

    each, second = returned(1), returned(2)
    assert [len(ids) for ids in each] == [1, 1, 1, 1]
    assert [len(ids) for ids in second] == [2, 0, 2, 0]
    assert [*chain(*each)] == [*chain(*second)]


def test_anchors_without_a_system_message_where_only_tasks_should_change(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """`anchor.scope`: half of them, rounded down."""
    for scope, bare in (("all_prompts", 0), ("tasks", 1)):
        keys = (*LORA, f"anchor.scope={scope}", "anchor.share=0.75")
        parts = started(tmp_path / scope, tiny_model_path, *keys)
        anchors = [p for p in draw_pairs(parts, 0)[1] if p.origin == "anchor"]
        texts = [parts.renderer.decode(p.student_ids) for p in anchors]
        without = [text.startswith("user") for text in texts]
        assert (len(anchors), without.count(True)) == (3, bare)


def test_a_share_of_the_prompts_is_answered_by_their_teachers(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Off-policy rows are asked under "base" with the teacher's prompt, the rest as ever."""
    overrides = (*LORA, "rollout.teacher_fraction=0.67", "anchor.share=0.5")
    parts = started(tmp_path, tiny_model_path, *overrides)
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}

    def script(policy: str, prompt: Prompt) -> tuple[int, ...]:
        seen[prompt.task_id] = (policy, prompt.ids)
        return scripted(policy, prompt)

    parts.engine = parts.teacher_engine = ScriptedEngine(script)
    pairs = [answered.pair for answered in roll_out(parts, 0).answered]
    policies = [seen[pair.task_id][0] for pair in pairs]
    asked = [(policy, pair.origin) for policy, pair in zip(policies, pairs, strict=True)]
    assert asked == [(p, o) for p in ("base", "student") for o in ("task", "anchor")]
    for pair in pairs:
        policy, ids = seen[pair.task_id]
        assert ids == (pair.teacher_ids if policy == "base" else pair.student_ids)


def test_a_moving_teacher_cannot_answer(tiny_model_path: Path, tmp_path: Path) -> None:
    overrides = ('teacher={type="ema"}', "rollout.teacher_fraction=0.5")
    with pytest.raises(ConfigError, match=r"teacher_fraction = 0.5 .*teacher.type = 'ema'"):
        make_run(tmp_path, tiny_model_path, *overrides)


def test_a_task_drawn_twice_is_answered_twice_by_the_teacher(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Its answers for ten steps are made in one call, but each is a draw of its own."""
    parts = started(tmp_path, tiny_model_path, *LORA, "rollout.teacher_fraction=1.0", "steps=12")
    asked: list[tuple[str, str]] = []
    generate = parts.teacher_engine.generate

    def watched(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        asked.extend((prompt.task_id, prompt.draw) for prompt in prompts)
        return generate(prompts, sampling)

    parts.teacher_engine.generate = watched  # type: ignore[method-assign]
    steps = [answer_as_teacher(parts, step) for step in range(12)]
    assert [len(step) for step in steps] == [4] * 12, "three tasks and an anchor"
    assert len(set(asked)) == len(asked) == 48 > len({task for task, _ in asked})
    assert answer_as_teacher(parts, 5)[0].pair == steps[5][0].pair, "whatever step comes first"
