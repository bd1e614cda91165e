"""Checkpoints: bitwise, whole or not at all, and never trusted blindly."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opcd import checkpoint
from opcd.checkpoint import (
    Snapshot,
    apart,
    complete,
    latest,
    load,
    pack_optimizer,
    save,
    unpack_optimizer,
)
from opcd.errors import CheckpointError

FACTS = {"scheduler": {"last_epoch": 3, "_last_lr": [0.1 + 0.2]}, "best": {}, "skipped_steps": 0}


def snapshot(step: int = 3) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors: dict[str, dict[str, Tensor]] = {
        "model": {
            "layer.weight": torch.randn(7, 5, generator=generator),
            "head": torch.randn(4, generator=generator).bfloat16(),
            "special": torch.tensor([float("inf"), -0.0, float("nan"), 1e-45]),
        },
        "teacher": {},
        "random": {"cpu": torch.get_rng_state()},
    }
    return Snapshot(step, tensors, FACTS)


def bits(tensors: Any) -> dict[str, dict[str, bytes]]:
    """Every tensor as its bytes, so that NaN equals NaN and -0 is not 0."""
    return {
        stem: {
            name: bytes(str((t.dtype, tuple(t.shape))), "ascii")
            + t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            for name, t in part.items()
        }
        for stem, part in tensors.items()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing


def test_a_checkpoint_comes_back_bitwise(tmp_path: Path) -> None:
    saved = snapshot()
    found = load(save(tmp_path, saved, keep=2))
    assert bits(found.tensors) == bits(saved.tensors)
    assert (found.step, found.facts) == (3, FACTS)


def test_tied_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    """Safetensors refuses shared memory; a tied head shares the embedding's."""
    weight = torch.arange(12.0).reshape(3, 4)
    tied = Snapshot(1, {"model": {"a": weight, "b": weight, "c": weight.T}}, {})
    found = load(save(tmp_path, tied, keep=1)).tensors["model"]
    assert torch.equal(found["b"], weight)
    assert torch.equal(found["c"], weight.T)


def test_nothing_written_is_a_pickle(tmp_path: Path) -> None:
    """A checkpoint from a stranger must not be able to run code."""
    path = save(tmp_path, snapshot(), keep=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for file in path.iterdir():
        head = file.read_bytes()[:2]
        assert head != b"PK" and not head.startswith(b"\x80"), file.name


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """In order of their number: 10 is newer than 9."""
    for step in (8, 9, 10):
        save(tmp_path, snapshot(step), keep=2)
    assert names(tmp_path) == ["step-10", "step-9"]
    assert latest(tmp_path).name == "step-10"
    assert [path.name for path in complete(tmp_path)] == ["step-9", "step-10"]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, snapshot(), keep=2)
    again = Snapshot(3, {"model": {"a": torch.ones(1)}}, {"again": True})
    assert load(save(tmp_path, again, keep=2)).facts == {"again": True}
    assert names(tmp_path) == ["step-3"]


def test_without_a_checkpoint_there_is_no_latest(tmp_path: Path) -> None:
    (tmp_path / ".step-5.123").mkdir()
    (tmp_path / "step-x").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        latest(tmp_path)


def full_disk_at(part: str) -> Callable[[dict[str, Tensor], Path], None]:
    """`save_file` on a disk that fills up while `part` is written."""

    def write(tensors: dict[str, Tensor], path: Path) -> None:
        if path.stem == part:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(tensors, path)

    return write


@pytest.mark.parametrize("part", ["model", "random"])
def test_a_full_disk_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    older = [snapshot(1), snapshot(2)]
    for one in older:
        save(tmp_path, one, keep=2)
    monkeypatch.setattr(checkpoint, "save_file", full_disk_at(part))
    with pytest.raises(CheckpointError, match=r"step-3 could not be .*No space left") as caught:
        save(tmp_path, snapshot(3), keep=2)
    assert "['step-1', 'step-2']. Free space on the disk" in str(caught.value)
    assert names(tmp_path) == ["step-1", "step-2"]
    assert bits(load(latest(tmp_path)).tensors) == bits(older[1].tensors)


def test_a_full_disk_at_the_first_checkpoint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_file", full_disk_at("model"))
    with pytest.raises(CheckpointError, match="still there: none"):
        save(tmp_path / "checkpoints", snapshot(), keep=2)


def test_a_full_disk_while_saving_a_step_again_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, snapshot(3), keep=2)
    monkeypatch.setattr(checkpoint, "save_file", full_disk_at("model"))
    with pytest.raises(CheckpointError):
        save(tmp_path, snapshot(3), keep=2)
    assert load(tmp_path / "step-3").step == 3


def test_a_crash_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed process cannot clean up: what it leaves must not be taken for a checkpoint."""
    save(tmp_path, snapshot(1), keep=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, snapshot(2), keep=1)
    assert [path.name for path in complete(tmp_path)] == ["step-1"]
    assert load(latest(tmp_path)).step == 1
    save(tmp_path, snapshot(2), keep=1)
    assert names(tmp_path) == ["step-2"]


# --- reading


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "random.safetensors", "facts.json"])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [(truncate, "bytes instead of"), (flip, "contents were changed"), (Path.unlink, "is missing")],
)
def test_a_harmed_file_is_refused_by_name(
    tmp_path: Path, name: str, harm: Callable[[Path], None], reason: str
) -> None:
    path = save(tmp_path, snapshot(), keep=1)
    harm(path / name)
    with pytest.raises(CheckpointError, match=rf"step-3/{name} cannot be trusted: .*{reason}"):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"step": 3}', '{"step": 3, "files": 5}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, snapshot(), keep=1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-3/manifest\.json cannot be trusted.*Delete"):
        load(path)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, snapshot(), keep=1)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be trusted"):
        load(path)


def change_step(manifest: dict[str, Any]) -> None:
    manifest["step"] = 7


def drop_step(manifest: dict[str, Any]) -> None:
    del manifest["step"]


def drop_facts(manifest: dict[str, Any]) -> None:
    del manifest["files"]["facts.json"]


def drop_files(manifest: dict[str, Any]) -> None:
    manifest["files"] = {}


def garble_entry(manifest: dict[str, Any]) -> None:
    manifest["files"]["model.safetensors"] = 5


@pytest.mark.parametrize("change", [change_step, drop_step, drop_facts, drop_files, garble_entry])
def test_a_tampered_manifest_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = save(tmp_path, snapshot(), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step-3/manifest\.json"):
        load(path)


# --- optimiser and generators


def trained(steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, 0.95))
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def test_an_optimizer_goes_on_bitwise(tmp_path: Path) -> None:
    """Three steps, a checkpoint on disk, two steps more: the weights of five steps in one go."""
    model, optimizer = trained(3)
    packed, groups = pack_optimizer(optimizer)
    saved = Snapshot(3, {"model": model.state_dict(), "optimizer": packed}, {"groups": groups})
    found = load(save(tmp_path, saved, keep=1))

    resumed, other = trained(0)
    resumed.load_state_dict(dict(found.tensors["model"]))
    unpack_optimizer(other, found.tensors["optimizer"], found.facts["groups"])
    for step in (3, 4):
        train_step(resumed, other, step)

    straight, whole = trained(5)
    assert bits({"w": resumed.state_dict()}) == bits({"w": straight.state_dict()})
    assert bits({"o": pack_optimizer(other)[0]}) == bits({"o": pack_optimizer(whole)[0]})


def test_an_optimizer_before_its_first_step_is_packed() -> None:
    _, optimizer = trained(0)
    packed, groups = pack_optimizer(optimizer)
    assert packed == {}
    unpack_optimizer(trained(2)[1], packed, groups)


def test_parameter_groups_are_json(tmp_path: Path) -> None:
    _, groups = pack_optimizer(trained(1)[1])
    assert json.loads(json.dumps(groups))[0]["lr"] == 0.05


def test_packing_copies_nothing_that_a_later_step_changes(tmp_path: Path) -> None:
    """What is on disk is the state at the moment of saving."""
    model, optimizer = trained(2)
    packed, groups = pack_optimizer(optimizer)
    path = save(tmp_path, Snapshot(2, {"optimizer": packed}, {"groups": groups}), keep=1)
    before = bits({"optimizer": packed})
    train_step(model, optimizer, 2)
    assert bits(load(path).tensors) == before


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        torch.rand(3)
        path = save(tmp_path, Snapshot(1, {"random": checkpoint.random_state()}, {}), keep=1)
        expected = torch.rand(4)
        torch.manual_seed(6)
        checkpoint.restore_random(load(path).tensors["random"])
        assert torch.equal(torch.rand(4), expected)


def test_only_what_shares_memory_is_copied_to_be_written(tmp_path: Path) -> None:
    """Tied weights, which safetensors refuses; copies of all would be an optimiser's state more."""
    one, other = torch.arange(4.0), torch.ones(2)
    own = apart({"embeddings": one, "head": one, "other": other, "half": one[::2]})
    assert own["embeddings"].data_ptr() == one.data_ptr()
    assert own["other"].data_ptr() == other.data_ptr()
    assert own["head"].data_ptr() != one.data_ptr()
    found = load(save(tmp_path, Snapshot(1, {"model": own}, {}), keep=1)).tensors["model"]
    assert torch.equal(found["head"], one) and torch.equal(found["half"], torch.tensor([0.0, 2.0]))
