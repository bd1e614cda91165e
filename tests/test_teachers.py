"""`opcd.teachers`: which weights a teacher has, and when they move."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config

from opcd import prefix_cache
from opcd.adapters import trainable, tune
from opcd.batching import collate
from opcd.config import training
from opcd.config.training import Full, Lora
from opcd.models import hidden_states, output_head
from opcd.teachers import LocalTeacher, Shadow, build_teacher
from tiny import SHAPE, build, nudge, pair_of, random_ids, rollout_of
from worlds import tiny_llama

PREFIX = 24
PAIRS = [
    pair_of("a", 4, PREFIX + 5, seed=1, shared=PREFIX),
    pair_of("b", 6, PREFIX + 9, seed=2, shared=PREFIX),
]
ROLLOUTS = [rollout_of("a", 5, 1), rollout_of("b", 3, 2)]
WITH_HEAD = Lora(rank=4, targets=("q_proj", "lm_head"))
TUNINGS = pytest.mark.parametrize(
    "tuning", [Lora(rank=4), WITH_HEAD, Full()], ids=["lora", "lora on the head too", "full"]
)


def teacher_of(config: Any, student: Any, frozen: Any = None) -> LocalTeacher:
    return build_teacher(config, student, frozen, nullcontext)


def student_of(tuning: Any) -> Any:
    student = tune(tiny_llama(), tuning, 0)
    nudge(student)
    return student


def seen_by(teacher: LocalTeacher, prefix_tokens: int = 0) -> Tensor:
    """The teacher's logits, `_TV`."""
    side = collate(PAIRS, ROLLOUTS, prefix_tokens).teacher
    return teacher.head(teacher.hidden(side)).detach()


@torch.no_grad()
def seen_by_model(model: Any) -> Tensor:
    side = collate(PAIRS, ROLLOUTS).teacher
    return output_head(model)(hidden_states(model.eval(), side))


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainable(model).items()}


@pytest.mark.parametrize("tuning", [Lora(rank=4), WITH_HEAD], ids=["lora", "on the head too"])
def test_adapter_off_is_the_base_whatever_the_adapter(tuning: Any) -> None:
    student = student_of(tuning)
    teacher = teacher_of(training.AdapterOff(), student)
    base = seen_by_model(tiny_llama())
    for seed in range(2):
        nudge(student, seed, size=1.0)
        assert torch.equal(seen_by(teacher), base)
    assert (seen_by_model(student) - base).abs().max() > 0.1
    assert not teacher.moves and not teacher.state()


def test_a_frozen_teacher_does_not_move() -> None:
    student, frozen = student_of(Full()), tiny_llama(seed=4)
    teacher = teacher_of(training.Frozen(), student, frozen)
    before = seen_by(teacher)
    nudge(student, 1, size=1.0)
    teacher.after_step(0)
    assert torch.equal(seen_by(teacher), before)
    assert torch.equal(before, seen_by_model(tiny_llama(seed=4)))


@TUNINGS
def test_a_live_teacher_is_the_student_of_this_step(tuning: Any) -> None:
    student = student_of(tuning)
    teacher = teacher_of(training.Live(), student)
    nudge(student, 1)
    assert torch.equal(seen_by(teacher), seen_by_model(student))
    assert teacher.moves


@TUNINGS
def test_an_ema_teacher_is_the_closed_form(tuning: Any) -> None:
    """After n steps: d^n w0 + (1 - d) sum of d^(n - i) wi."""
    student, decay = student_of(tuning), 0.7
    teacher = teacher_of(training.Ema(decay=decay), student)
    history = [weights_of(student)]
    for step in range(3):
        nudge(student, step + 1)
        history.append(weights_of(student))
        teacher.after_step(step)
    factors = [decay**3, *((1 - decay) * decay ** (3 - i) for i in (1, 2, 3))]
    for name, found in teacher.state().items():
        wanted = sum(f * w[name].double() for f, w in zip(factors, history, strict=True))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    twin = student_of(tuning)
    with torch.no_grad():
        for name, weight in trainable(twin).items():
            weight.copy_(teacher.state()[name])
    torch.testing.assert_close(seen_by(teacher), seen_by_model(twin))


@TUNINGS
def test_a_refreshed_teacher_changes_only_at_the_multiples(tuning: Any) -> None:
    student = student_of(tuning)
    teacher = teacher_of(training.Refresh(every_steps=3), student)
    held = weights_of(student)
    for step in range(7):
        nudge(student, step)
        teacher.after_step(step)
        if step in (2, 5):
            held = weights_of(student)
        state = teacher.state()
        assert all(torch.equal(weight, held[name]) for name, weight in state.items()), step


@TUNINGS
def test_a_teachers_state_survives_a_resume(tuning: Any) -> None:
    student = student_of(tuning)
    teacher = teacher_of(training.Ema(decay=0.5), student)
    nudge(student, 1)
    teacher.after_step(0)
    saved = {name: weight.clone() for name, weight in teacher.state().items()}
    other = teacher_of(training.Ema(decay=0.5), student)
    assert not torch.equal(seen_by(other), seen_by(teacher))
    other.load_state(saved)
    assert torch.equal(seen_by(other), seen_by(teacher))
    other.after_step(1)
    assert all(torch.equal(weight, teacher.state()[name]) for name, weight in saved.items())


def test_scoring_leaves_the_student_as_it_was() -> None:
    """Weights, mode and gradient switch; the teacher itself runs without dropout."""
    student = tune(tiny_llama(), Lora(rank=4, dropout=0.5), 0).train()
    nudge(student)
    before = weights_of(student)
    teacher = teacher_of(training.Ema(), student)
    assert torch.equal(seen_by(teacher), seen_by(teacher)), "no dropout"
    assert not seen_by(teacher).requires_grad
    assert student.training
    assert all(torch.equal(weight, before[name]) for name, weight in trainable(student).items())


def test_a_shadow_goes_away_after_an_exception() -> None:
    student = student_of(Lora(rank=4))
    shadow = Shadow(student, lambda *_: None)
    nudge(student, 1)
    before = weights_of(student)
    held = {name: weight.clone() for name, weight in shadow.weights.items()}

    def fail() -> None:
        with shadow.in_place():
            assert all(torch.equal(w, held[n]) for n, w in trainable(student).items())
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        fail()
    assert all(torch.equal(weight, before[name]) for name, weight in trainable(student).items())
    assert all(torch.equal(weight, held[name]) for name, weight in shadow.weights.items())


def test_a_shared_prefix_gives_the_same_hidden_states() -> None:
    """For the base under its adapter: the prefix is read with the adapter off as well."""
    student = student_of(Lora(rank=4))
    teacher = teacher_of(training.AdapterOff(), student)
    whole = seen_by(teacher)
    ids = PAIRS[0].teacher_ids
    assert teacher.share_prefix(ids[:PREFIX], ids[PREFIX:]) is None
    assert teacher.prefix_tokens == PREFIX
    torch.testing.assert_close(seen_by(teacher, PREFIX), whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen_by(teacher), whole, rtol=0, atol=0)
    nudge(student, 1, size=1.0)
    torch.testing.assert_close(seen_by(teacher, PREFIX), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [training.Ema(), training.Live(), training.Refresh()])
def test_moving_teachers_read_every_prompt(config: Any) -> None:
    teacher = teacher_of(config, student_of(Lora(rank=4)))
    ids = PAIRS[0].teacher_ids
    assert teacher.share_prefix(ids[:PREFIX], ids[PREFIX:]) == "the teacher's weights move"
    assert teacher.prefix_tokens == 0


def test_models_that_cannot_share_a_prefix_say_why() -> None:
    model = build(Gemma2Config(**SHAPE, sliding_window=8))
    teacher = teacher_of(training.Frozen(), model, model)
    reason = teacher.share_prefix(random_ids(PREFIX, 1), random_ids(5, 2))
    assert reason is not None and "window of 8 tokens" in reason
    assert teacher.prefix_tokens == 0


def test_a_prefix_that_is_not_exact_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe decides, whatever the architecture claims: here the merge forgets the prefix."""
    attend = prefix_cache._attend_prefix

    def wrong(*sides: Tensor) -> tuple[Tensor, Tensor]:
        out_hNd, lse_hN = attend(*sides)
        return out_hNd, lse_hN - 1.0

    monkeypatch.setattr(prefix_cache, "_attend_prefix", wrong)
    teacher = teacher_of(training.Frozen(), None, tiny_llama())
    reason = teacher.share_prefix(random_ids(PREFIX, 1), random_ids(5, 2))
    assert reason is not None and "nats away from reading it every time" in reason
    assert teacher.prefix_tokens == 0
