"""The processes of a run: what accelerate knows of them, and what they do together.

`opcd train` under `accelerate launch` or `torchrun` is one program in every process. Each has its
share of the prompts; gradients are summed by DDP, or by FSDP2 where accelerate is told to use it.
Files are the main process's. Knows nothing of prompts, models or losses.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    gather_object,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy

from opcd import weights
from opcd.config import Run
from opcd.config.servers import check_waits
from opcd.errors import ConfigError, LaunchError, OpcdError, RolloutError, ServerError
from opcd.sharding import Sharding

T = TypeVar("T")
LOST = ("gloo", "NCCL", "Connection", "Timed out", "timed out", "process group", "Socket")
"""Words in the messages of a process whose others are gone."""


def build_accelerator(config: Run) -> Accelerator:
    """Accelerate's view of this process, in the run's precision.

    Raises:
        ConfigError: the launch and the run contradict each other.
    """
    on_cpu = config.model.device == "cpu" or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    # The first to ask opens the connections; later ones cannot say how long to wait on them.
    waits = timedelta(seconds=config.launch.timeout_s)
    state: Any = PartialState(cpu=on_cpu, timeout=waits)
    dtype = weights.auto_dtype(config.model.dtype, torch.device("cpu") if on_cpu else state.device)
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    _check_precision(config, precision)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # Its state is one for the whole process; a second run in it may want another precision.
        AcceleratorState._reset_state(reset_partial_state=False)
    # Models here have no buffers that training moves, and processes run a model at other times.
    still = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[still])
    check_processes(config, accelerator, dtype)
    return accelerator


def _check_precision(config: Run, precision: str) -> None:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise ConfigError(
            f"accelerate's mixed_precision is {asked!r}, but model.dtype = {config.model.dtype!r} "
            f"computes in {precision!r} here, student and teacher alike; the run decides it: write "
            "mixed_precision: 'no' for accelerate, and set model.dtype"
        )


def check_processes(config: Run, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Refuse a launch that the run cannot be spread over.

    Raises:
        ConfigError: naming the setting to change.
    """
    count, asked = accelerator.num_processes, config.tasks_per_step
    if count == 1:
        return
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigError(
            "accelerate was told to use DeepSpeed, which opcd does not train with: its rollouts "
            "and teachers need weights outside DeepSpeed's own forward pass. Launch with an FSDP2 "
            "config (recipes/accelerate/fsdp2.yaml), which cuts weights, gradients and optimiser "
            "as ZeRO-3 does"
        )
    if config.game is None:
        asked += config.anchors_per_step
    if count > asked:
        raise ConfigError(
            f"{count} processes share {asked} prompts a step, so some would have none; launch at "
            f"most {asked}, or raise batch.prompts_per_step (or lower anchor.context_return)"
        )
    if config.context.type == "coach":
        raise ConfigError(
            f"context.type is coach, whose coach reads all responses of a step in turn, but there "
            f"are {count} processes; launch one"
        )
    check_waits({"rollout": config.rollout, "teacher": config.teacher}, config.launch.timeout_s)
    check_dtypes(gather_object([str(dtype).removeprefix("torch.")]))


def check_dtypes(found: Sequence[str]) -> None:
    """Refuse processes that would compute in different precisions.

    Raises:
        ConfigError: naming the setting to change.
    """
    if len(names := sorted(set(found))) > 1:
        raise ConfigError(
            f'model.dtype = "auto" is {" in some processes and ".join(names)} in others, so that '
            "students and teachers would differ; set model.dtype to one of them"
        )


def sharding_of(accelerator: Accelerator, dtype: torch.dtype) -> Sharding | None:
    """How weights are cut, if accelerate was told to use FSDP.

    Raises:
        ConfigError: it was told what is not done here.
    """
    if (told := read_fsdp()) is None:
        return None
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    return Sharding(mesh, dtype, told.reshard_after_forward)


def read_fsdp() -> Any:
    """What accelerate was told of FSDP; `None` if nothing.

    Raises:
        ConfigError: it was told what is not done here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    plugin: Any = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError(
            "accelerate was told to use FSDP version 1; write fsdp_version: 2 in its config"
        )
    if plugin.activation_checkpointing:
        raise ConfigError(
            "accelerate was told to checkpoint activations, which the run decides: write "
            "fsdp_activation_checkpointing: false, and model.gradient_checkpointing = true"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError(
            "accelerate was told to keep shards in the host's memory, which is not done here; "
            "write fsdp_offload_params: false, and launch more processes if memory is short"
        )
    return plugin


def summed(accelerator: Accelerator, distiller: Any) -> Any:
    """A student as accelerate prepares it: in the run's precision, gradients summed by DDP."""
    with warnings.catch_warnings():
        # torch has a new name for what accelerate asks of it.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        return accelerator.prepare_model(distiller)


def own(accelerator: Any, rows: Sequence[T], after: int = 0) -> list[T]:
    """This process's share of some rows, dealt out in turn to all.

    Args:
        accelerator: knows which process this is.
        rows: the same in all processes.
        after: rows that were dealt out before, whose turn goes on.
    """
    count = accelerator.num_processes
    return list(rows[(accelerator.process_index - after) % count :: count])


def rejoin(accelerator: Any, share: Sequence[T]) -> list[T]:
    """The rows of all processes, in the order from which `own` dealt them out."""
    if accelerator.num_processes == 1:
        return list(share)
    return interleave(gather_object([list(share)]))


def interleave(shares: Sequence[Sequence[T]]) -> list[T]:
    """Rows that were dealt out in turn, in their first order."""
    rows: dict[int, T] = {}
    for index, one in enumerate(shares):
        rows |= {index + len(shares) * turn: row for turn, row in enumerate(one)}
    return [rows[place] for place in sorted(rows)]


def most(accelerator: Any, numbers: Sequence[float]) -> list[float]:
    """The largest of each number over the processes."""
    if accelerator.num_processes == 1:
        return list(numbers)
    found: list[Sequence[float]] = gather_object([list(numbers)])
    return [max(column) for column in zip(*found, strict=True)]


def on_main(accelerator: Any, action: Callable[[], T]) -> T:
    """What the main process gets from doing something, in all processes; or the error it meets."""
    if accelerator.num_processes == 1:
        return action()
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = action()
        except OpcdError as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def agreed(accelerator: Any, work: Callable[[], T]) -> T:
    """What a process makes, unless one of several processes met trouble.

    Raises:
        ServerError: a server is gone.
        RolloutError: in some process there was trouble; all of them are told.
    """
    if accelerator.num_processes == 1:
        return work()
    done: list[T] = []
    trouble = ""
    try:
        done.append(work())
    except (RolloutError, ServerError) as error:
        trouble = str(error)
    if first := next(filter(None, gather_object([trouble])), ""):
        raise RolloutError(first)
    return done[0]


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """Within it, a process whose others are gone says so.

    Raises:
        LaunchError: this process waited in vain.
    """
    try:
        yield
    except RuntimeError as error:
        alone = accelerator.num_processes == 1 or isinstance(error, OpcdError)
        if alone or not any(word in str(error) for word in LOST):
            raise
        first = str(error).strip().splitlines()[0]
        raise LaunchError(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost the others "
            f"({first[:160]}): one was killed or failed, see its own message. The last checkpoint "
            "is good: launch again with --resume, with as many processes as there are"
        ) from error
