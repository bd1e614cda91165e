"""Everything a bitwise resume needs, written whole or not at all, and checked when read.

A checkpoint is a folder `step-N` of safetensors files, `facts.json`, and `manifest.json` with the
size and SHA-256 of each. It is written under another name and renamed at the end, so a folder
called `step-N` is complete; the manifest tells if it was changed afterwards. No pickle is ever
written or read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opcd.errors import CheckpointError
from opcd.sharding import collected, part_like

MANIFEST = "manifest.json"
FACTS = "facts.json"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run after `step` steps."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File stem (`model`, `optimizer`, `teacher`, `random`) -> its tensors."""
    facts: Mapping[str, Any]
    """What is not a tensor, as JSON values."""


def save(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write `folder/step-N` and delete all but the newest `keep`.

    Raises:
        CheckpointError: it could not be written; those from before are untouched.
    """
    target = folder / f"step-{snapshot.step}"
    draft = folder / f".{target.name}.{os.getpid()}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(draft, snapshot)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(draft, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        kept = [path.name for path in complete(folder)]
        raise CheckpointError(
            f"{target.name} could not be written ({error}); still there: {kept or 'none'}. Free "
            "space on the disk, then continue with --resume"
        ) from error
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load(path: Path) -> Snapshot:
    """Read a checkpoint after checking every file against the manifest.

    Raises:
        CheckpointError: a file is missing, cut off or changed; it is named.
    """
    files = _read_manifest(path)
    for name, (size, digest) in files.items():
        _check_file(path, name, size, digest)
    facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    stems = [Path(name).stem for name in files if name.endswith(".safetensors")]
    tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in stems}
    return Snapshot(int(path.name.removeprefix("step-")), tensors, facts)


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    steps = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(steps, key=lambda path: int(path.name[5:]))


def latest(folder: Path) -> Path:
    """The newest checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if not (paths := complete(folder)):
        raise CheckpointError(f"{folder} has no checkpoint to resume from; start the run anew")
    return paths[-1]


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """An optimiser's state as named tensors, and its parameter groups as JSON values.

    Tensors are whole, whatever the processes hold of them, so that any number of others can go on
    from here; the main process has them, and all have to ask at the same time.
    """
    state = optimizer.state_dict()
    named = (
        (f"{index}/{name}", torch.as_tensor(value))
        for index, entry in state["state"].items()
        for name, value in entry.items()
    )
    return collected(named), state["param_groups"]


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: Any
) -> None:
    """Give an optimiser the state that `pack_optimizer` took from it."""
    state: dict[int, dict[str, Tensor]] = {}
    moved = [weight for group in optimizer.param_groups for weight in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        own = part_like(value, moved[int(index)]) if value.dim() else value
        state.setdefault(int(index), {})[name] = own
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators."""
    state = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        state[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    return state


def random_states(accelerator: Any) -> dict[str, Tensor]:
    """The same of all processes; the first one's names are plain, others' have its number."""
    if accelerator.num_processes == 1:
        return random_state()
    found: dict[str, Tensor] = {}
    for process, state in enumerate(gather_object([random_state()])):
        found |= {f"{process}/{name}" if process else name: t for name, t in state.items()}
    return found


def restore_random(states: Mapping[str, Tensor], process: int = 0) -> None:
    """Set torch's generators to a saved state; those of devices that are gone are left alone.

    A process that was not there when it was saved starts from the state of the first.
    """
    prefix = f"{process}/" if f"{process}/cpu" in states else ""
    state = {name.removeprefix(prefix): t for name, t in states.items() if name.startswith(prefix)}
    torch.set_rng_state(state["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: of those that share memory, all but the first as copies.

    Copies of all would be as much memory again as the optimiser's state.
    """
    own: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in tensors.items():
        one = tensor.detach().cpu().contiguous()
        memory = one.untyped_storage().data_ptr()
        own[name] = one.clone() if memory in known else one
        known.add(memory)
    return own


def _write(draft: Path, snapshot: Snapshot) -> None:
    for stem, tensors in snapshot.tensors.items():
        save_file(apart(tensors), draft / f"{stem}.safetensors")
    (draft / FACTS).write_text(json.dumps(snapshot.facts, indent=1), encoding="utf-8")
    files = {path.name: (path.stat().st_size, _digest(path)) for path in sorted(draft.iterdir())}
    manifest = {"step": snapshot.step, "files": files}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in draft.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        step, entries = manifest["step"], manifest["files"]
        files = {name: (int(size), str(digest)) for name, (size, digest) in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _untrusted(path, MANIFEST, f"it cannot be read ({error!r})") from error
    if path.name != f"step-{step}":
        raise _untrusted(path, MANIFEST, f"it is of step {step}")
    unlisted = {file.name for file in path.iterdir()} - files.keys() - {MANIFEST}
    if unlisted:
        raise _untrusted(path, MANIFEST, f"it does not list {sorted(unlisted)}")
    return files


def _check_file(path: Path, name: str, size: int, digest: str) -> None:
    file = path / name
    if not file.is_file():
        raise _untrusted(path, name, "it is missing")
    if (found := file.stat().st_size) != size:
        raise _untrusted(path, name, f"it has {found:,} bytes instead of {size:,}")
    if _digest(file) != digest:
        raise _untrusted(path, name, "its contents were changed after it was written")


def _untrusted(path: Path, name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name}/{name} cannot be trusted: {reason}. Delete {path} to resume from the "
        "checkpoint before it, or start the run anew"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
