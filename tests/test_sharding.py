"""`opcd.sharding`: one process's share of a tensor, and the whole of it.

What two processes do with shards is in `test_launch.py`; here one process is all of them.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opcd.adapters import in_shards, merged_weights, share_frozen, trainable
from opcd.batching import collate
from opcd.chunking import Hidden
from opcd.config.training import Full, Lora, Loss
from opcd.errors import ModelError
from opcd.models import Distiller, hidden_states, output_head
from opcd.sharding import (
    Sharding,
    collected,
    give,
    own_part,
    part_like,
    summing_later,
    weights_by_name,
    whole,
)
from tiny import LORA, pair_of, rollout_of, tuned
from worlds import tiny_llama


@pytest.fixture(scope="module")
def sharding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharding]:
    """A group of one process, in which everything happens that happens in many."""
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield Sharding(init_device_mesh("cpu", (1,)), torch.float32)
    distributed.destroy_process_group()


def test_a_part_and_the_whole(sharding: Sharding) -> None:
    whole_one = torch.arange(12.0).reshape(6, 2)
    part = distribute_tensor(torch.zeros(6, 2), sharding.mesh, [Shard(0)])
    assert whole(whole_one) is whole_one and own_part(whole_one) is whole_one
    give(part, whole_one)
    assert torch.equal(whole(part), whole_one)
    own_part(part).add_(1.0)
    assert torch.equal(whole(part), whole_one + 1.0), "the part is the memory itself"
    assert isinstance(part_like(whole_one, part), DTensor)
    scalar = torch.tensor(3.0)
    assert part_like(scalar, part) is scalar, "what has another shape is not cut"


def test_what_is_made_whole_is_kept_by_the_main_process_alone(
    sharding: Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others take part in each, and let it go before the next."""
    part = distribute_tensor(torch.arange(6.0), sharding.mesh, [Shard(0)])
    found = collected([("a", part), ("b", torch.ones(2))])
    assert found.keys() == {"a", "b"} and torch.equal(found["a"], torch.arange(6.0))
    assert not any(isinstance(one, DTensor) for one in found.values())
    asked: list[str] = []

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "ab":
            asked.append(name)
            yield name, torch.ones(2)

    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    assert collected(named()) == {} and asked == ["a", "b"]


@pytest.mark.parametrize("tuning", [LORA, Full()], ids=["lora", "full"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_student_in_shards_has_the_same_loss_gradient_and_weights(
    sharding: Sharding, tuning: Lora | Full, tied: bool
) -> None:
    """Forward and backward, its other passes through `run`, and what an engine copies."""
    pairs = [pair_of(f"{i}", 4 + i, 9, seed=i) for i in range(2)]
    batch = collate(pairs, [rollout_of(f"{i}", 3, seed=i) for i in range(2)])
    teacher = tiny_llama()
    teacher_TD, head = hidden_states(teacher, batch.teacher).detach(), output_head(teacher)
    found = []
    for cut in (False, True):
        student = tuned(tuning, tie_word_embeddings=tied)
        distiller = Distiller(student)
        if cut:
            sharding.shard(distiller, nullcontext)
            assert in_shards(student)
        stats = distiller(batch, Hidden(teacher_TD, head), Loss())
        stats.divergence_T.sum().backward()
        read_TD = distiller.run(partial(hidden_states, student, batch.student))
        gradients = {n: whole(p.grad) for n, p in trainable(student).items() if p.grad is not None}
        merged = {name: whole(weight) for name, weight in merged_weights(student)}
        base = {name: whole(weight) for name, weight in merged_weights(student, "base")}
        found.append([stats.divergence_T, read_TD, gradients, merged, base])
        assert weights_by_name(student).keys() == gradients.keys()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_only_trained_weights_and_layers_are_cut(sharding: Sharding) -> None:
    """A frozen head is needed by every slice; a copy that answers may share it, but no shard."""
    student = tuned(LORA)
    sharding.shard(Distiller(student), nullcontext)
    cut = {name for name, p in student.named_parameters() if isinstance(p, DTensor)}
    assert all(".layers." in name for name in cut) and len(cut) > 20
    copy = tiny_llama()
    share_frozen(student, copy)
    assert copy.lm_head.weight is student.get_base_model().lm_head.weight
    assert not any(isinstance(p, DTensor) for p in copy.parameters())


def test_a_frozen_model_in_shards_answers_alike(sharding: Sharding) -> None:
    pair = pair_of("a", 4, 9)
    batch = collate([pair], [rollout_of("a", 3)])
    plain, cut = tiny_llama().requires_grad_(False), tiny_llama().requires_grad_(False)
    sharding.shard_frozen(cut)
    assert in_shards(cut) and not in_shards(plain)
    pieces = {name for name, p in cut.named_parameters() if isinstance(p, DTensor)}
    assert pieces == {name for name, _ in cut.named_parameters() if ".layers." in name}
    assert all(isinstance(layer, FSDPModule) for layer in cut.model.layers), "one at a time"
    with torch.no_grad():
        ours, wanted = (hidden_states(model, batch.teacher) for model in (cut, plain))
        torch.testing.assert_close(output_head(cut)(ours), output_head(plain)(wanted))


def test_gradients_are_summed_later_unless_each_process_would_hold_them_all(
    sharding: Sharding,
) -> None:
    """Of all weights in shards, a sum is cut at once."""
    asked: list[bool] = []
    for tuning, waits in ((LORA, True), (Full(), False)):
        distiller: Any = Distiller(tuned(tuning))
        sharding.shard(distiller, nullcontext)
        asked.clear()
        distiller.set_requires_gradient_sync = asked.append
        with summing_later(distiller):
            assert asked == [not waits]
        assert asked == [not waits, True]
    with summing_later(Distiller(tuned(LORA))):
        """One process that cuts nothing has nothing to wait for."""


def test_a_model_that_names_no_layers_is_refused(sharding: Sharding) -> None:
    student = tuned(Full())
    student._no_split_modules = None
    with pytest.raises(ModelError, match="launch without FSDP"):
        sharding.shard(Distiller(student), nullcontext)
