"""`opcd.teachers`: which weights a teacher has, and when they move."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config

from allocated import peak_bytes
from opcd import prefix_cache, teachers
from opcd.adapters import adapter_off, trainable, tune
from opcd.batching import Side, collate
from opcd.config import training
from opcd.config.training import Full, Lora
from opcd.models import hidden_states, output_head
from opcd.openings import Openings
from opcd.prefix_cache import token_bytes
from opcd.teachers import LocalTeacher, Shadow, build_teacher
from opcd.types import PromptPair, Rollout
from tiny import SHAPE, build, log_probs_of, nudge, pair_of, random_ids, rollout_of
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


SHARING = [pair_of(name, 4, 76 + n, seed=n, shared=70) for n, name in enumerate("ab")]
"""These share enough to be read once."""


def seen_by(teacher: LocalTeacher, pairs: Sequence[PromptPair] = PAIRS) -> Tensor:
    """The teacher's logits, `_TV`."""
    side = collate(pairs, ROLLOUTS).teacher
    return teacher.head(teacher.hidden(side)).detach()


@torch.no_grad()
def seen_by_model(model: Any, pairs: Sequence[PromptPair] = PAIRS) -> Tensor:
    side = collate(pairs, ROLLOUTS).teacher
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


OPENINGS = Openings([pair.teacher_ids for pair in SHARING])
PROBE = SHARING[0].teacher_ids


def test_a_shared_prefix_gives_the_same_hidden_states() -> None:
    """For the base under its adapter: the prefix is read with the adapter off as well."""
    student = student_of(Lora(rank=4))
    teacher = teacher_of(training.AdapterOff(), student)
    with adapter_off(student):
        whole = seen_by_model(student, SHARING)
    assert teacher.share(OPENINGS, PROBE) is None
    torch.testing.assert_close(seen_by(teacher, SHARING), whole, rtol=1e-3, atol=1e-4)
    nudge(student, 1, size=1.0)
    torch.testing.assert_close(seen_by(teacher, SHARING), whole, rtol=1e-3, atol=1e-4)
    assert (teacher.prefixes.reads, teacher.prefixes.dropped) == (1, 0)


@torch.no_grad()
def wanted_of(model: Any, pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> Tensor:
    """Log-probabilities `_TV` by transformers alone, row by row."""
    rows = zip(pairs, rollouts, strict=True)
    return torch.cat([log_probs_of(model, p.teacher_ids, r.response_ids) for p, r in rows])


def pool_of(contexts: int, rows: int, alone: int = 0) -> tuple[list[PromptPair], list[Rollout]]:
    """Rows behind several contexts, taking turns, and some that share theirs with nobody."""
    heads = [random_ids(70 + 30 * n, 40 + n) for n in range(contexts)]
    prompts = [
        heads[n] + random_ids(3 + row, 100 * n + row)
        for row in range(rows)
        for n in range(contexts)
    ] + [random_ids(80 + n, 60 + n) for n in range(alone)]
    pairs = [PromptPair(str(n), random_ids(5, n), ids) for n, ids in enumerate(prompts)]
    return pairs, [rollout_of(pair.task_id, 2 + n % 5, n) for n, pair in enumerate(pairs)]


@pytest.mark.parametrize("room", [10**6, 140, 10], ids=["all", "some", "one at a time"])
@pytest.mark.parametrize("known", [True, False], ids=["openings of the run", "of the batch"])
def test_a_pool_of_contexts_scores_as_full_prompts_do(room: int, known: bool) -> None:
    """Each row behind its own, whatever fits into the budget; those without one in full."""
    pairs, rollouts = pool_of(contexts=3, rows=3, alone=2)
    model = tiny_llama()
    most_bytes = room * token_bytes(model)
    teacher = build_teacher(training.Frozen(), None, model, nullcontext, most_bytes)
    if known:
        openings = Openings([pair.teacher_ids for pair in pairs])
        assert (len(openings.known), openings.without) == (3, 2)
        assert teacher.share(openings, pairs[0].teacher_ids) is None
    hidden_TD = teacher.hidden(collate(pairs, rollouts).teacher)
    found_TV = teacher.head(hidden_TD).double().log_softmax(-1)
    torch.testing.assert_close(found_TV, wanted_of(model, pairs, rollouts), rtol=0, atol=1e-4)
    assert teacher.prefixes.bytes <= max(most_bytes, 130 * token_bytes(model))
    again_TD = teacher.hidden(collate(pairs, rollouts).teacher)
    assert torch.equal(again_TD, hidden_TD), "whatever it had read and dropped before"


def test_the_same_prompt_may_have_several_responses() -> None:
    """Whose first tokens agree: what is shared ends before the response begins."""
    pair = pair_of("a", 4, 90, seed=3)
    rollouts = [Rollout("a", (9, 8, 7, end), True) for end in (3, 4)]
    model = tiny_llama()
    teacher = teacher_of(training.Frozen(), None, model)
    side = collate([pair, pair], rollouts).teacher
    found_TV = teacher.head(teacher.hidden(side)).double().log_softmax(-1)
    wanted_TV = wanted_of(model, [pair, pair], rollouts)
    torch.testing.assert_close(found_TV, wanted_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("whole_tokens", [1, 200])
def test_long_rows_without_an_opening_are_read_few_at_a_time(
    whole_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, rollouts = pool_of(contexts=0, rows=0, alone=5)
    model = tiny_llama()
    wanted_TV, read = wanted_of(model, pairs, rollouts), teachers.hidden_states
    rows: list[int] = []

    def watched(of: Any, side: Side) -> Tensor:
        rows.append(len(side.ids_BS))
        return read(of, side)

    monkeypatch.setattr(teachers, "hidden_states", watched)
    monkeypatch.setattr(teachers, "WHOLE_TOKENS", whole_tokens)
    teacher = teacher_of(training.Frozen(), None, model)
    hidden_TD = teacher.hidden(collate(pairs, rollouts).teacher)
    found_TV = teacher.head(hidden_TD).double().log_softmax(-1)
    torch.testing.assert_close(found_TV, wanted_TV, rtol=0, atol=1e-4)
    assert rows == ([1] * 5 if whole_tokens == 1 else [2, 2, 1])


@pytest.mark.parametrize(
    "config", [training.Ema(), training.Live(), training.Refresh(every_steps=1)]
)
def test_moving_teachers_read_a_context_once_a_step(config: Any) -> None:
    """With the weights of the moment, however many portions a step has; also when given back."""
    student = student_of(Lora(rank=4))
    teacher = teacher_of(config, student)
    assert teacher.share(OPENINGS, PROBE) is None
    for seed in range(3):
        nudge(student, seed)
        if seed < 2:
            teacher.after_step(seed)
        else:
            teacher.load_state(teacher.state())
        with teacher.as_teacher():
            wanted_TV = seen_by_model(student, SHARING)
        reads = teacher.prefixes.reads
        for _ in range(2):
            torch.testing.assert_close(seen_by(teacher, SHARING), wanted_TV, rtol=1e-3, atol=1e-4)
        assert teacher.prefixes.reads == reads + 1


def test_a_live_teacher_notices_weights_that_are_written_between_steps() -> None:
    """As when a run is measured with its best ones."""
    student = student_of(Lora(rank=4))
    teacher = teacher_of(training.Live(), student)
    assert teacher.share(OPENINGS, PROBE) is None
    before_TV = seen_by(teacher, SHARING)
    nudge(student, 5, size=1.0)
    found_TV = seen_by(teacher, SHARING)
    torch.testing.assert_close(found_TV, seen_by_model(student, SHARING), rtol=1e-3, atol=1e-4)
    assert (found_TV - before_TV).abs().max() > 0.1


def test_a_refreshed_teacher_reads_a_context_when_it_is_renewed() -> None:
    student = student_of(Lora(rank=4))
    teacher = teacher_of(training.Refresh(every_steps=2), student)
    teacher.share(OPENINGS, PROBE)
    reads = []
    for step in range(4):
        nudge(student, step)
        seen_by(teacher, SHARING)
        teacher.after_step(step)
        reads.append(teacher.prefixes.reads)
    assert reads == [1, 1, 2, 2]


@pytest.mark.parametrize("config", [training.AdapterOff(), training.Ema()], ids=["still", "moving"])
def test_no_teacher_copies_a_long_context_for_each_row(config: Any) -> None:
    """Scoring 16 rows behind 4,096 tokens takes little more than scoring 2."""
    student = tune(tiny_llama(positions=5000), Lora(rank=4), 0)
    teacher, context = teacher_of(config, student), random_ids(4096, 8)
    pairs = [PromptPair(str(n), random_ids(4, n), context + random_ids(9, n)) for n in range(16)]
    rollouts = [rollout_of(pair.task_id, 8, n) for n, pair in enumerate(pairs)]
    few, many = (
        peak_bytes(partial(teacher.hidden, collate(pairs[:n], rollouts[:n]).teacher))
        for n in (2, 16)
    )
    one_copy = 4096 * token_bytes(student)
    assert many - few < 2 * one_copy < 14 * one_copy


def test_models_that_cannot_share_a_prefix_say_why() -> None:
    model = build(Gemma2Config(**SHAPE, sliding_window=8))
    teacher = teacher_of(training.Frozen(), model, model)
    reason = teacher.share(OPENINGS, PROBE)
    assert reason is not None and "window of 8 tokens" in reason
    torch.testing.assert_close(
        seen_by(teacher, SHARING), seen_by_model(model, SHARING), rtol=0, atol=0
    )


def test_a_prefix_that_is_not_exact_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe decides, whatever the architecture claims: here the merge forgets the prefix."""
    attend = prefix_cache._attend_prefix

    def wrong(*sides: Tensor) -> tuple[Tensor, Tensor]:
        out_hNd, lse_hN = attend(*sides)
        return out_hNd, lse_hN - 1.0

    monkeypatch.setattr(prefix_cache, "_attend_prefix", wrong)
    teacher = teacher_of(training.Frozen(), None, tiny_llama())
    reason = teacher.share(OPENINGS, PROBE)
    assert reason is not None and "nats away from reading it every time" in reason
    wanted_TV = seen_by_model(teacher.model, SHARING)
    torch.testing.assert_close(seen_by(teacher, SHARING), wanted_TV, rtol=0, atol=0)
    assert teacher.prefixes.bytes == 0


def test_weights_that_will_be_cut_have_read_their_openings_before() -> None:
    """From then on a batch is read in one pass: behind openings all known, or in full."""
    pairs = [pair_of(f"{i}", 5, 90 + i, seed=i, shared=80) for i in range(3)]
    apart = pair_of("other", 5, 90, seed=9)
    plain, inside = (teacher_of(training.Frozen(), None, tiny_llama()) for _ in range(2))
    openings = Openings([pair.teacher_ids for pair in pairs])
    assert len(openings.known) == 1
    assert inside.share(openings, pairs[0].teacher_ids) is None
    passes: list[int] = []

    def counted(work: Callable[[], Tensor]) -> Tensor:
        passes.append(inside.prefixes.reads)
        return work()

    inside.prefixes.clear()
    inside.go_inside(counted)
    reads = inside.prefixes.reads
    for rows in (pairs, [*pairs, apart]):
        batch = collate(rows, [rollout_of(pair.task_id, 4, seed=3) for pair in rows])
        found, wanted = inside.hidden(batch.teacher), plain.hidden(batch.teacher)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert passes == [reads] * 2 and inside.prefixes.reads == reads, "nothing is read any more"
