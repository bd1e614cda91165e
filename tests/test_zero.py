"""`opcd.zero`: processes whose weights DeepSpeed cuts give what one gives that has them all.

Skipped where DeepSpeed is not installed (`pip install 'opcd-lm[deepspeed]'`); the config that is
shipped for it is read in `test_launch.py` in any case.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import distributed

from opcd.adapters import in_shards, merged_weights, share_frozen, trainable
from opcd.batching import collate
from opcd.checkpoint import pack_optimizer, unpack_optimizer
from opcd.chunking import Hidden
from opcd.config.training import Full, Lora, Loss
from opcd.models import Distiller, hidden_states, output_head
from opcd.sharding import give, layers_of, summing_later, weights_by_name
from opcd.zero import SETTINGS, Zero
from test_launch import (
    BFLOAT16,
    FULL,
    LORA,
    UNEVEN,
    Ends,
    assert_one_goes_on,
    assert_same_first_step,
    assert_same_numbers,
    assert_two_go_on,
    load_best,
    rows_of,
    run_all,
)
from tiny import LORA as LORA_TABLE
from tiny import pair_of, rollout_of, tuned
from worlds import tiny_llama

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.filterwarnings(
    # DeepSpeed uses what torch has new names for.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)

ODD = ('model.tuning={type="lora", rank=3}', "optimizer.lr=0.003")
"""Some of its weights have an odd number of elements: the last process's part is filled up."""
RUNS = {
    "zero_lora": (*ODD, *UNEVEN),
    "zero_full": (*FULL, *UNEVEN, "model.gradient_checkpointing=true"),
    "zero_live": (*FULL, 'teacher={type="live"}', "optimizer.clip_norm=0.01"),
    "zero_full16": (*FULL, *BFLOAT16),
    "zero_lora16": (*LORA, *BFLOAT16),
    "zero_stopped": FULL,
    "zero_resumed": (*ODD, *UNEVEN),
    "zero_killed": (*LORA, "launch.timeout_s=60"),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return run_all(tmp_path_factory, RUNS)


@pytest.mark.parametrize("name", ["zero_lora", "zero_full", "zero_live"])
def test_two_processes_give_what_one_gives(ends: Ends, name: str) -> None:
    """Losses, norms, validations, weights, optimiser, and what was kept as the best."""
    assert ends.of(name) == [{"steps": 4, "interrupted_by": None}] * 2, ends.said
    assert_same_numbers(ends.folder_of(name, 2), ends.folder_of(name, 1))
    best, other = (load_best(ends.folder_of(name, count)) for count in (2, 1))
    assert best.keys() == other.keys()
    for key, weight in best.items():
        torch.testing.assert_close(weight, other[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["zero_full16", "zero_lora16"])
def test_bfloat16_stays_near_one_process(ends: Ends, name: str) -> None:
    assert_same_first_step(*(rows_of(ends.folder_of(name, n))[0] for n in (2, 1)))


def test_a_signal_stops_both_and_their_checkpoint_resumes_in_one(ends: Ends) -> None:
    assert_one_goes_on(ends, "zero_stopped")


def test_a_checkpoint_of_one_resumes_in_two(ends: Ends) -> None:
    assert_two_go_on(ends, "zero_resumed")


def test_when_one_is_killed_the_other_says_so(ends: Ends) -> None:
    (left,) = ends.of("zero_killed")
    assert left["error"].startswith("LaunchError: process 0 of 2 lost the others")


# --- one process that is all of them


@pytest.fixture(scope="module")
def zero(ends: Ends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zero]:
    """A group of one, after the runs above: DeepSpeed connects to it and stays so."""
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield Zero(torch.device("cpu"), clip_norm=0.05)
    distributed.destroy_process_group()


def adamw(student: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(trainable(student).values()), lr=0.003)


def cut(zero: Zero, tuning: Lora | Full) -> tuple[Any, Any, Any]:
    student = tuned(tuning)
    engine, optimizer = zero.shard(Distiller(student), adamw(student), nullcontext)
    return student, engine, optimizer


def pass_over(distiller: Any, factor: float = 1.0) -> None:
    """One forward and backward pass; DeepSpeed's engine has its own."""
    pairs = [pair_of(f"{i}", 4 + i, 9, seed=i) for i in range(2)]
    batch = collate(pairs, [rollout_of(f"{i}", 3, seed=i) for i in range(2)])
    teacher = tiny_llama()
    scored = Hidden(hidden_states(teacher, batch.teacher).detach(), output_head(teacher))
    loss = distiller(batch, scored, Loss()).divergence_T.sum() * factor
    getattr(distiller, "backward", lambda one: one.backward())(loss)


@pytest.mark.parametrize("tuning", [LORA_TABLE, Full()], ids=["lora", "full"])
def test_layers_are_let_go_of_between_passes(zero: Zero, tuning: Lora | Full) -> None:
    """What stands outside them stays whole: a head is needed for every slice of tokens."""
    student, engine, optimizer = cut(zero, tuning)
    begun: list[bool] = []
    for layer in layers_of(student):
        layer.register_forward_pre_hook(
            lambda layer, _: begun.append(all(p.numel() for p in layer.parameters()))
        )
    for moment in ("cut", "passed", "stepped"):
        if moment == "passed":
            pass_over(engine)
        if moment == "stepped":
            optimizer.step()
        there = {name: p.numel() for name, p in student.named_parameters()}
        assert {name for name, count in there.items() if not count} == {
            name for name in there if ".layers." in name
        }, moment
    assert in_shards(student)
    assert begun == [True] * 3, "a layer is put together at one go, before it runs"
    copy = tiny_llama()
    share_frozen(student, copy)
    shared = copy.lm_head.weight is student.get_output_embeddings().weight
    assert shared == (tuning != Full()) and all(p.numel() for p in copy.parameters())
    with summing_later(engine):
        """DeepSpeed sums with every pass, and would refuse to wait."""


@pytest.mark.parametrize("tuning", [LORA_TABLE, Full()], ids=["lora", "full"])
def test_a_step_and_its_checkpoint_are_those_of_adamw(
    zero: Zero, tuning: Lora | Full, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes a step, clipped; then on from the one's checkpoint in the other."""
    monkeypatch.setitem(SETTINGS["zero_optimization"], "sub_group_size", 5000)
    plain = tuned(tuning)
    alone, distiller = adamw(plain), Distiller(plain)
    student, engine, optimizer = cut(zero, tuning)
    for _ in range(2):
        for _ in range(2):
            pass_over(distiller)
            pass_over(engine)
        norm = torch.nn.utils.clip_grad_norm_(trainable(plain).values(), zero.clip_norm)
        assert optimizer.grad_norm() == pytest.approx(float(norm), rel=1e-5)
        alone.step()
        alone.zero_grad()
        optimizer.step()
        torch.testing.assert_close(
            weights_by_name(student), weights_by_name(plain), rtol=1e-5, atol=1e-5
        )
    merged = [dict(merged_weights(model)) for model in (student, plain)]
    torch.testing.assert_close(*merged, rtol=1e-5, atol=1e-5)
    side = collate([pair_of("a", 4, 9)], [rollout_of("a", 3)]).student
    with torch.no_grad():  # as teachers read, outside the engine's own forward
        read = [hidden_states(model, side) for model in (student, plain)]
    torch.testing.assert_close(*read, rtol=1e-5, atol=1e-5)
    (tensors, groups), (wanted, others) = pack_optimizer(optimizer), pack_optimizer(alone)
    assert groups == others
    assert len(engine.optimizer.fp32_partitioned_groups_flat) > 1, "a step goes group by group"
    torch.testing.assert_close(tensors, wanted, rtol=1e-5, atol=1e-5)

    other, second, fresh = cut(zero, tuning)
    for name, weight in weights_by_name(plain).items():
        give(trainable(other)[name], weight)
    unpack_optimizer(fresh, wanted, others)
    pass_over(second)
    fresh.step()
    pass_over(engine)
    optimizer.step()
    torch.testing.assert_close(
        weights_by_name(other), weights_by_name(student), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        pack_optimizer(fresh)[0], pack_optimizer(optimizer)[0], rtol=1e-5, atol=1e-5
    )


def test_a_gradient_that_is_not_finite_is_seen_and_left_out(zero: Zero) -> None:
    student, engine, optimizer = cut(zero, Full())
    before = weights_by_name(student)
    pass_over(engine, factor=float("inf"))
    assert not torch.isfinite(torch.tensor(optimizer.grad_norm()))
    optimizer.zero_grad()
    torch.testing.assert_close(weights_by_name(student), before, rtol=0, atol=0)
    pass_over(engine)
    _, second, fresh = cut(zero, Full())
    pass_over(second)
    assert optimizer.grad_norm() == pytest.approx(fresh.grad_norm(), rel=1e-5)


def test_a_frozen_model_answers_alike(zero: Zero) -> None:
    batch = collate([pair_of("a", 4, 9)], [rollout_of("a", 3)])
    plain, frozen = tiny_llama().requires_grad_(False), tiny_llama().requires_grad_(False)
    zero.shard_frozen(frozen)
    assert in_shards(frozen) and not in_shards(plain)
    with torch.no_grad():
        for _ in range(3):
            ours, wanted = (hidden_states(model, batch.teacher) for model in (frozen, plain))
            torch.testing.assert_close(output_head(frozen)(ours), output_head(plain)(wanted))
            assert not any(p.numel() for n, p in frozen.named_parameters() if ".layers." in n)
