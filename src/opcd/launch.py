"""The processes of a run: what accelerate knows of them, and what they do together.

`opcd train` under `accelerate launch` or `torchrun` is one program in every process. Each has its
share of the prompts; gradients are summed by DDP, or by FSDP2 or DeepSpeed where accelerate is told
to use one. What it is told of those two is read here, and done by `sharding` and `zero`.
Files are the main process's. Knows nothing of prompts, models or losses.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
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
from opcd.zero import Zero

T = TypeVar("T")
ZERO = "ACCELERATE_USE_DEEPSPEED"
"""How accelerate's launcher says that it was told to use DeepSpeed."""
MORE = "and launch more processes if memory is short"
ZERO_TAKES = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "leave deepspeed_config_file out"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("3", "write zero_stage: 3"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
        "none",
        f"write offload_optimizer_device: none, {MORE}",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (
        "none",
        f"write offload_param_device: none, {MORE}",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1",
        "write gradient_accumulation_steps: 1, and batch.rows_per_forward in the run",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": (
        "none",
        "leave gradient_clipping out, and write optimizer.clip_norm in the run",
    ),
}
"""What accelerate may have been told of DeepSpeed, and what to write in place of anything else."""
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
    by_zero = read_zero()
    with _without_deepspeed():
        state: Any = PartialState(cpu=on_cpu, timeout=waits)
    dtype = weights.auto_dtype(config.model.dtype, torch.device("cpu") if on_cpu else state.device)
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    _check_precision(config, precision)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        # Its state is one for the whole process; a second run in it may want another precision.
        AcceleratorState._reset_state(reset_partial_state=False)
    # Models here have no buffers that training moves, and processes run a model at other times.
    still = DistributedDataParallelKwargs(broadcast_buffers=False)
    with _without_deepspeed():
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[still])
    if config.model.device not in ("auto", accelerator.device.type):
        raise ConfigError(
            f"model.device = {config.model.device!r}, but torch finds none here, and would compute "
            f"on {accelerator.device.type!r}; install a torch that is built for it, or leave "
            "model.device out"
        )
    check_processes(config, accelerator, dtype, by_zero)
    return accelerator


@contextmanager
def _without_deepspeed() -> Iterator[None]:
    # accelerate's own use of DeepSpeed steps with every backward pass and turns autocast off.
    told = os.environ.pop(ZERO, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[ZERO] = told


def _check_precision(config: Run, precision: str) -> None:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        raise ConfigError(
            f"accelerate's mixed_precision is {asked!r}, but model.dtype = {config.model.dtype!r} "
            f"computes in {precision!r} here, student and teacher alike; the run decides it: write "
            "mixed_precision: 'no' for accelerate, and set model.dtype"
        )


def check_processes(
    config: Run, accelerator: Accelerator, dtype: torch.dtype, by_zero: bool = False
) -> None:
    """Refuse a launch that the run cannot be spread over.

    Raises:
        ConfigError: naming the setting to change.
    """
    count, asked = accelerator.num_processes, config.tasks_per_step
    if count == 1 and by_zero:
        raise ConfigError(
            "accelerate was told to use DeepSpeed, but there is one process, so that nothing "
            "would be cut; launch more (num_processes), or start opcd without a launcher"
        )
    if count == 1:
        return
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


def sharding_of(
    config: Run, accelerator: Accelerator, dtype: torch.dtype
) -> Sharding | Zero | None:
    """How weights are cut, if accelerate was told to use FSDP or DeepSpeed.

    Raises:
        ConfigError: it was told what is not done here.
    """
    if read_zero():
        return Zero(accelerator.device, config.optimizer.clip_norm)
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


def read_zero() -> bool:
    """Whether accelerate was told to use DeepSpeed, ZeRO stage 3.

    Raises:
        ConfigError: it was told what is not done here, or DeepSpeed is not installed.
    """
    if os.environ.get(ZERO, "false").lower() not in ("true", "1"):
        return False
    for name, (wanted, instead) in ZERO_TAKES.items():
        # By itself accelerate takes stage 2, and of the others what is taken here.
        told = os.environ.get(name, "2" if name.endswith("STAGE") else wanted).lower()
        if told not in (wanted, "auto"):
            raise ConfigError(f"accelerate was told {name}={told!r} for DeepSpeed; {instead}")
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "accelerate was told to use DeepSpeed, which is not installed: pip install "
            "'opcd-lm[deepspeed]', or launch with recipes/accelerate/fsdp2.yaml"
        )
    return True


def check_shardable(config: Run, by_zero: bool = False) -> None:
    """Refuse what weights in shards cannot do.

    Raises:
        ConfigError: naming the setting to change.
    """
    if by_zero and config.teacher.type in ("ema", "refresh"):
        raise ConfigError(
            f"teacher.type is {config.teacher.type}, but accelerate was told to use DeepSpeed, "
            "which has no place for a second set of the student's weights; write "
            'teacher.type = "frozen" (or "adapter_off"), or launch with FSDP2 or DDP'
        )
    if config.model.tuning.type == "full" and config.teacher.type in ("ema", "refresh"):
        raise ConfigError(
            f"teacher.type is {config.teacher.type} and model.tuning is full, but accelerate was "
            "told to use FSDP: that teacher's head would be in pieces while the student runs; "
            'write teacher.type = "frozen" or model.tuning.type = "lora", or launch without FSDP'
        )


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
