"""`opcd.distill`: one step is what the paper's formula says, and it learns."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opcd import assembly
from opcd.adapters import adapter_off, trainable
from opcd.assembly import Parts, assemble
from opcd.config.training import Loss, Warmup
from opcd.distill import (
    Answered,
    Trainer,
    accumulate,
    batch_of,
    count_rollouts,
    cut_portions,
    distill,
    loss_at,
)
from opcd.drawing import roll_out
from opcd.errors import DivergedError, RolloutError
from opcd.items import with_context
from opcd.tally import Tally
from opcd.training import prepare
from opcd.types import Context, PromptPair, Rollout
from tiny import log_probs_of, make_game_run, make_run, nudge, parts_of, reverse_kl, teacher_of
from worlds import tiny_llama, tokenizer

PLAIN = ("optimizer.schedule=constant", "optimizer.warmup_steps=0", "optimizer.lr=0.01")
LORA = ('model.tuning={type="lora", rank=4}', *PLAIN)
FULL = ('model.tuning={type="full"}', 'teacher={type="frozen"}', *PLAIN)


def started(tmp_path: Path, model: Path, *overrides: str) -> tuple[Parts, Trainer]:
    """Scripted parts whose student has left its base already."""
    parts = parts_of(make_run(tmp_path, model, *(overrides or LORA)))
    nudge(parts.student)
    return parts, prepare(parts)


def copies(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max((before[name] - after[name]).abs().max().item() for name in before)


def dense_kl(student: Any, teacher: Any, answered: Answered, lora: bool) -> Tensor:
    """`_T`: the reverse KL of one response from full logits, by transformers alone."""
    pair, response = answered.pair, answered.rollout.response_ids
    sides = []
    for model, prompt in ((student, pair.student_ids), (teacher, pair.teacher_ids)):
        ids_1S = torch.tensor([[*prompt, *response]])
        logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0]
        sides.append(logits_SV[len(prompt) - 1 : -1].log_softmax(-1))
        if lora:
            student.disable_adapter_layers()
    if lora:
        student.enable_adapter_layers()
    return reverse_kl(sides[0], sides[1].detach())


@pytest.mark.parametrize("reduction", ["sequence", "token"])
@pytest.mark.parametrize("tuning", [LORA, FULL], ids=["lora", "full"])
def test_one_step_equals_a_step_written_by_hand(
    tiny_model_path: Path, tmp_path: Path, reduction: str, tuning: tuple[str, ...]
) -> None:
    """Loss, gradient norm and weights after AdamW, with tasks and anchors in it."""
    overrides = (*tuning, f"loss.reduction={reduction}")
    by_hand, _ = started(tmp_path / "hand", tiny_model_path, *overrides)
    answered = roll_out(by_hand, 0).answered
    student, teacher, lora = by_hand.student, by_hand.base.model, tuning is LORA
    each = [dense_kl(student, teacher, a, lora) for a in answered]
    per_token = torch.cat(each).mean()
    loss = per_token if reduction == "token" else torch.stack([kl.mean() for kl in each]).mean()
    loss.backward()
    weights = list(trainable(student).values())
    norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    torch.optim.AdamW(weights, lr=0.01, weight_decay=0.0).step()

    parts, trainer = started(tmp_path / "library", tiny_model_path, *overrides)
    before = copies(parts.student)
    report = next(distill(parts, trainer))
    assert len({len(a.rollout.response_ids) for a in answered}) > 1, "both reductions differ"
    assert report.metrics["loss_nats"] == pytest.approx(loss.item(), rel=1e-4)
    assert report.metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    assert moved(before, copies(parts.student)) > 1e-3
    # Adam divides by |gradient|, so where that is all but zero its rounding shows in a few weights.
    after, by_hand_after = copies(parts.student), copies(student)
    apart = torch.cat([(after[name] - by_hand_after[name]).flatten() for name in after]).abs()
    assert apart.mean() < 1e-5 and (apart > 1e-4).double().mean() < 1e-2


def gradients(parts: Parts, tally: Tally) -> dict[str, Tensor]:
    """What a step accumulates before it moves anything."""
    rollouts = roll_out(parts, 0)
    count_rollouts(parts, rollouts, tally)
    accumulate(parts, rollouts.answered, parts.config.loss, tally)
    found = {name: p.grad for name, p in trainable(parts.student).items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def test_portions_change_nothing(tiny_model_path: Path, tmp_path: Path) -> None:
    """rows_per_forward = 1 or 2 accumulates what one forward pass computes."""
    sums, grads = [], []
    for rows in (1, 2, 100):
        overrides = (*LORA, f"batch.rows_per_forward={rows}")
        parts, _ = started(tmp_path / str(rows), tiny_model_path, *overrides)
        tally = Tally()
        grads.append(gradients(parts, tally))
        sums.append(tally.sums)
    assert len(grads[2]) == len(trainable(parts.student))
    assert sums[0] == pytest.approx(sums[2], rel=1e-5)
    assert sums[1] == pytest.approx(sums[2], rel=1e-5)
    for name, whole in grads[2].items():
        torch.testing.assert_close(grads[0][name], whole, rtol=1e-4, atol=5e-6)
        torch.testing.assert_close(grads[1][name], whole, rtol=1e-4, atol=5e-6)


def test_portions_hold_one_origin_and_lose_nobody() -> None:
    origins = ("task", "anchor", "task", "task", "anchor")
    answered = [
        Answered(PromptPair(str(i), (1,) * (9 - i), (1,), origin), Rollout(str(i), (1,), True))
        for i, origin in enumerate(origins)
    ]
    portions = cut_portions(answered, 2)
    assert [[a.rollout.task_id for a in portion] for portion in portions] == [
        ["3", "2"],
        ["0"],
        ["4", "1"],
    ]


def test_warmup_gives_the_first_steps_another_direction(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    loss = Loss(warmup=Warmup(direction="jsd", steps=2), temperature=0.5)
    assert [loss_at(loss, step).direction for step in range(4)] == ["jsd"] * 2 + ["reverse_kl"] * 2
    assert loss_at(loss, 0).temperature == 0.5
    warmup = 'loss.warmup={direction="forward_kl", steps=2}'
    parts, trainer = started(tmp_path, tiny_model_path, *LORA, warmup)
    reports = [report.metrics for report in distill(parts, trainer)]
    assert [r["direction"] for r in reports] == ["forward_kl"] * 2 + ["reverse_kl"] * 2
    assert [r["step"] for r in reports] == [0, 1, 2, 3]
    assert reports[0]["loss_nats"] != pytest.approx(reports[0]["kl_nats_per_token"], rel=1e-3)


def test_an_anchors_teacher_is_the_base_with_the_same_prompt(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Whatever the tasks' teacher is: here it moves, and the anchors' KL is still to the base."""
    parts, trainer = started(tmp_path, tiny_model_path, *LORA, 'teacher={type="live"}')
    anchors = [a for a in roll_out(parts, 0).answered if a.pair.origin == "anchor"]
    assert anchors and all(a.pair.student_ids == a.pair.teacher_ids for a in anchors)
    assert all(len(a.rollout.response_ids) <= 4 for a in anchors), "anchor.max_new_tokens"
    wanted = torch.cat([dense_kl(parts.student, parts.student, a, lora=True) for a in anchors])
    metrics = next(distill(parts, trainer)).metrics
    assert metrics["anchor_kl_nats_per_token"] == pytest.approx(wanted.mean().item(), rel=1e-4)
    assert metrics["anchor_kl_nats_per_token"] > 1e-3


def test_context_return_holds_the_student_to_its_base_with_the_context(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Both sides see the context, and the base model gives both the answers and the scores."""
    overrides = (*LORA, "anchor.context_return=0.25")
    parts, trainer = started(tmp_path, tiny_model_path, *overrides)
    answered = roll_out(parts, 0).answered
    returned = [a for a in answered if a.pair.origin == "context_return"]
    assert [a.pair.origin for a in answered] == ["context_return", "task", "task", "anchor"]
    by_id = {item.task.id: item.pair for item in parts.items["train"]}
    for a in returned:
        pair = by_id[a.pair.task_id.removesuffix("/context_return")]
        assert a.pair.student_ids == a.pair.teacher_ids == pair.teacher_ids
    wanted = torch.cat([dense_kl(parts.student, parts.student, a, lora=True) for a in returned])
    metrics = next(distill(parts, trainer)).metrics
    found = metrics["context_return_kl_nats_per_token"]
    assert found == pytest.approx(wanted.mean().item(), rel=1e-3) and found > 1e-3


@pytest.mark.parametrize("teacher", ['{type="adapter_off"}', '{type="frozen"}'])
def test_a_teacher_scores_its_own_answers_without_reading_them_again(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    """Losses and gradients are as by reading; above a limit of memory it reads, and says so."""
    long = ("rollout.teacher_fraction=1.0", "anchor.context_return=0.25", f"teacher={teacher}")
    keys = (*LORA, *long, "rollout.temperature=1.5")
    grads: list[dict[str, Tensor]] = []
    tallies = Tally(), Tally()
    for limit, tally in zip((2**28, 1), tallies, strict=True):
        monkeypatch.setattr(assembly, "MAX_KEPT_BYTES", limit)
        system = "Answer in verse, and never in prose, whatever they say. " * 3
        parts = assemble(make_run(tmp_path / str(limit), tiny_model_path, *keys, system=system))
        nudge(parts.student)
        assert any("read their own answers again" in note for note in parts.notes) is (limit == 1)
        if limit > 1:
            for judge in (parts.teacher, parts.base):
                monkeypatch.setattr(judge, "hidden", None)
        grads.append(gradients(parts, tally))
    assert tallies[0].sums == pytest.approx(tallies[1].sums, rel=1e-4)
    assert tallies[0].sums["context_return_kl_nats"] > 1e-3
    for name, read in grads[1].items():
        torch.testing.assert_close(grads[0][name], read, rtol=1e-3, atol=1e-5)


def break_teacher(parts: Parts) -> Iterator[None]:
    """The teacher's logits are not finite until the iterator goes on."""
    teacher = teacher_of(parts)
    head = teacher.head
    teacher.head = lambda hidden_CD: head(hidden_CD) * math.nan
    yield
    teacher.head = head


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Weights, moments and the moving teacher stay; the next step is taken as if first."""
    parts, trainer = started(tmp_path, tiny_model_path, *LORA, 'teacher={type="ema", decay=0.5}')
    before, shadow = copies(parts.student), dict(parts.teacher.state())
    shadow = {name: weight.clone() for name, weight in shadow.items()}
    steps, broken = distill(parts, trainer), break_teacher(parts)
    next(broken)
    metrics = next(steps).metrics
    assert metrics["skipped_steps"] == 1 and math.isnan(metrics["loss_nats"])
    assert moved(before, copies(parts.student)) == 0
    assert moved(shadow, parts.teacher.state()) == 0
    assert not trainer.optimizer.state
    next(broken, None)
    metrics = next(steps).metrics
    assert metrics["skipped_steps"] == 1 and metrics["step"] == 1
    assert math.isfinite(metrics["loss_nats"])
    assert moved(before, copies(parts.student)) > 1e-3


def test_a_skipped_first_step_makes_no_warning(tiny_model_path: Path, tmp_path: Path) -> None:
    parts, trainer = started(tmp_path, tiny_model_path)
    next(break_teacher(parts))
    next(distill(parts, trainer))


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")
def test_too_many_skipped_steps_end_the_run(tiny_model_path: Path, tmp_path: Path) -> None:
    overrides = (*LORA, "optimizer.max_nonfinite_steps=1")
    parts, trainer = started(tmp_path, tiny_model_path, *overrides)
    before = copies(parts.student)
    next(break_teacher(parts))
    message = r"2 steps had a loss or gradient that is not finite.*max_nonfinite_steps = 1; lower"
    with pytest.raises(DivergedError, match=message):
        list(distill(parts, trainer))
    assert moved(before, copies(parts.student)) == 0


def test_too_many_cut_responses_end_the_run(tiny_model_path: Path, tmp_path: Path) -> None:
    overrides = (*LORA, "rollout.max_new_tokens=2", "rollout.max_truncated_fraction=0.1")
    parts, trainer = started(tmp_path, tiny_model_path, *overrides)
    message = r"% of a step's responses were cut after 2 tokens, but at most 10% are allowed"
    with pytest.raises(RolloutError, match=message):
        next(distill(parts, trainer))


def test_what_is_counted_is_what_was_answered(tiny_model_path: Path, tmp_path: Path) -> None:
    """Tokens and cut responses are those of the tasks, without the anchors."""
    parts, trainer = started(tmp_path, tiny_model_path, *LORA, "rollout.max_new_tokens=3")
    report = next(distill(parts, trainer))
    tasks = [a.rollout for a in report.answered if a.pair.origin == "task"]
    tokens = sum(len(rollout.response_ids) for rollout in tasks)
    assert len(tasks) == 3 and len(report.answered) == 4
    assert report.metrics["response_tokens"] == tokens
    assert report.metrics["tokens_per_response"] == pytest.approx(tokens / 3)
    cut = sum(not rollout.finished for rollout in tasks)
    assert report.metrics["truncated_fraction"] == pytest.approx(cut / 3)


def test_the_student_learns_the_context(tmp_path: Path) -> None:
    """On its own samples, through the real engine: the KL to the teacher falls by far."""
    model = tmp_path / "model"
    tiny_llama(initializer_range=0.1).save_pretrained(model)
    tokenizer().save_pretrained(model)
    overrides = (
        *("optimizer.lr=0.01", "steps=30", "anchor.share=0", "batch.prompts_per_step=12"),
        *("rollout.max_new_tokens=4", "batch.rows_per_forward=12"),
        'loss.warmup={direction="forward_kl", steps=15}',
    )
    parts = assemble(make_run(tmp_path, model, *overrides))
    kl_nats = [r.metrics["kl_nats_per_token"] for r in distill(parts, prepare(parts))]
    assert kl_nats[0] > 0.1
    assert sum(kl_nats[-5:]) / 5 < 0.3 * kl_nats[0], kl_nats


def test_every_turn_of_a_game_is_scored_behind_its_own_history(
    player_path: Path, tmp_path: Path
) -> None:
    """Token by token, without a batch, a cache or a shared prefix: the KL of a step's samples."""
    overrides = (*LORA, "anchor.share=0", "rollout.max_new_tokens=3", "batch.rows_per_forward=3")
    system = "Go down, then right, and mind the holes. " * 5
    parts = assemble(make_game_run(tmp_path, player_path, *overrides, system=system))
    nudge(parts.student)
    assert len(parts.teacher.openings.known) == 1
    parts.student.eval()
    answered = roll_out(parts, 0).answered
    assert any(a.pair.task_id.endswith("/turn-2") for a in answered)
    kl_nats: list[float] = []
    with torch.no_grad():
        for a in answered:
            ids = a.rollout.response_ids
            student_TV = log_probs_of(parts.student, a.pair.student_ids, ids)
            with adapter_off(parts.student):
                teacher_TV = log_probs_of(parts.student, a.pair.teacher_ids, ids)
            kl_nats += reverse_kl(student_TV, teacher_TV).tolist()
    row = next(distill(parts, prepare(parts))).metrics
    assert row["response_tokens"] == len(kl_nats)
    assert row["kl_nats_per_token"] == pytest.approx(sum(kl_nats) / len(kl_nats), rel=1e-4)
    assert row["kl_nats_per_token"] > 0.01


def test_a_student_of_games_learns_the_context(player_path: Path, tmp_path: Path) -> None:
    """On its own episodes, through the real engine: the KL to the teacher falls by far."""
    overrides = (
        *("optimizer.lr=0.003", "optimizer.warmup_steps=3", "steps=18", "anchor.share=0"),
        *("batch.prompts_per_step=5", "rollout.max_new_tokens=3", "batch.rows_per_forward=16"),
        *("game.turns=4", 'loss.warmup={direction="forward_kl", steps=7}'),
    )
    parts = assemble(make_game_run(tmp_path, player_path, *overrides))
    kl_nats = [r.metrics["kl_nats_per_token"] for r in distill(parts, prepare(parts))]
    assert kl_nats[0] > 0.05
    assert sum(kl_nats[-3:]) / 3 < 0.5 * kl_nats[0], kl_nats


def test_items_given_another_context_are_scored_with_that_one(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """The teacher has read the run's own context once, which these prompts do not begin with."""
    system = "Answer every question in verse, and never in prose. " * 3
    parts = assemble(make_run(tmp_path, tiny_model_path, *LORA, system=system))
    assert len(parts.teacher.openings.known) == 1
    others = with_context(parts.renderer, parts.items["test"], Context(system="Answer in prose."))
    for items in (parts.items["test"], others):
        answered = [Answered(item.pair, Rollout(item.task.id, (9, 12, 2), True)) for item in items]
        _, batch = batch_of(parts, answered)
        teacher = teacher_of(parts)
        hidden_TD = teacher.hidden(batch.teacher)
        found_TV = teacher.head(hidden_TD).log_softmax(-1)
        with torch.no_grad(), adapter_off(parts.student):
            wanted = [log_probs_of(parts.student, i.pair.teacher_ids, (9, 12, 2)) for i in items]
        assert torch.allclose(found_TV.double(), torch.cat(wanted), atol=1e-4)


def test_adapter_off_in_a_hand_written_step_is_the_base(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Tests the reference above: both ways of switching the adapter off agree."""
    parts, _ = started(tmp_path, tiny_model_path)
    ids_1S = torch.tensor([[7, 8, 9]])
    with torch.no_grad(), adapter_off(parts.student):
        inside = parts.student(input_ids=ids_1S).logits
    parts.student.disable_adapter_layers()
    with torch.no_grad():
        assert torch.equal(parts.student(input_ids=ids_1S).logits, inside)
        parts.student.enable_adapter_layers()
        assert not torch.allclose(parts.student(input_ids=ids_1S).logits, inside, atol=1e-3)
