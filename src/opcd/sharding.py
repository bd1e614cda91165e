"""Weights cut into shards over the processes, and made whole where they have to be.

The layers of a model are cut, each a unit that is put together while it runs. What stands outside
the layers is cut only where it is trained: the head has to be whole for every slice of tokens, and
a head that is not trained is kept in float32 besides. `Sharding` cuts by FSDP2, `opcd.zero` by
DeepSpeed; the functions here know what either has cut. Knows nothing of prompts or losses.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad

from opcd.adapters import causal_model, in_shards, partitioned, put_together, trainable
from opcd.errors import ModelError


@dataclass(frozen=True, slots=True)
class Sharding:
    """How weights are cut: over which processes, and what is kept between uses."""

    mesh: DeviceMesh
    dtype: torch.dtype
    """In which the layers are put together."""
    reshard_after_forward: bool = True
    """Whether a layer is taken apart again between the forward and the backward pass."""

    @property
    def _options(self) -> dict[str, Any]:
        # A layer takes its inputs as they come: the sums of its residual stay in float32, as they
        # do under autocast in one process.
        policy = MixedPrecisionPolicy(self.dtype, torch.float32, cast_forward_inputs=False)
        return {
            "mesh": self.mesh,
            "mp_policy": policy,
            "reshard_after_forward": self.reshard_after_forward,
        }

    def shard(self, distiller: Any, autocast: Callable[..., AbstractContextManager[Any]]) -> None:
        """Cut a student in place. Outside the distiller's `forward` and `run` it is in pieces.

        Args:
            distiller: holds the student.
            autocast: the precision that its `forward` runs in from now on.

        Raises:
            ModelError: the model does not say what its layers are.
        """
        run_in(distiller, autocast)
        student = distiller.student
        self._shard_layers(student)
        outside = [p for p in student.parameters() if not isinstance(p, DTensor)]
        whole_ones = {p for p in outside if not p.requires_grad}
        # Never left whole after a pass: a moving teacher's weights would not take their place.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        options = self._options | {"mp_policy": policy, "reshard_after_forward": True}
        fully_shard(distiller, **options, ignored_params=whole_ones)
        register_fsdp_forward_method(distiller, "run")

    def shard_frozen(self, model: Any) -> None:
        """Cut a model that is never trained, in place; its decoder puts it together as it runs.

        Raises:
            ModelError: the model does not say what its layers are.
        """
        self._shard_layers(model)
        whole_ones = {p for p in model.parameters() if not isinstance(p, DTensor)}
        fully_shard(causal_model(model).get_decoder(), **self._options, ignored_params=whole_ones)

    def _shard_layers(self, model: Any) -> None:
        for layer in layers_of(model):
            fully_shard(layer, **self._options)


def run_in(distiller: Any, autocast: Callable[..., AbstractContextManager[Any]]) -> None:
    """Let a distiller's `forward` run in a precision from now on."""
    forward = distiller.forward

    def forward_in_precision(*inputs: Any) -> Any:
        with autocast():
            return forward(*inputs)

    distiller.forward = forward_in_precision


def layers_of(model: Any) -> list[nn.Module]:
    """The modules of a model that are cut as one, and put together as one.

    Raises:
        ModelError: the model does not say what its layers are.
    """
    plain = causal_model(model)
    names = set(getattr(plain, "_no_split_modules", None) or ())
    layers = [module for module in plain.modules() if type(module).__name__ in names]
    if not layers:
        raise ModelError(
            f"{type(plain).__name__} does not say which of its modules are layers, so its "
            "weights cannot be cut over processes; launch without FSDP or DeepSpeed"
        )
    return layers


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process has to ask for it at the same time."""
    if partitioned(tensor):
        with put_together([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the memory where it is kept."""
    if not isinstance(tensor, DTensor):
        return tensor
    shard: Any = tensor.detach()
    return shard.to_local()


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which every process has, the part that goes with another one's."""
    tensor = tensor.to(like.device)
    if partitioned(like):
        return _zero_part(tensor, like)
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def give(target: Tensor, values: Tensor) -> None:
    """Put the values of a whole tensor, which every process has, in the place of another's."""
    part = part_like(values, target)
    if not partitioned(target):
        target.copy_(part)
        return
    cut: Any = target
    cut.ds_tensor.copy_(part)
    import_module("deepspeed.utils").safe_set_local_fp32_param(cut, part)
    if cut.ds_persist:
        cut.data.copy_(values)


def _zero_part(tensor: Tensor, like: Any) -> Tensor:
    """Of a whole tensor the part that DeepSpeed gives to this process: flat, filled up with 0."""
    if tensor.shape != like.ds_shape:
        return tensor
    size = like.ds_tensor.numel()
    part = tensor.flatten()[distributed.get_rank() * size :][:size]
    return pad(part, (0, size - part.numel()))


@contextmanager
def summing_later(distiller: Any) -> Iterator[None]:
    """Within it, gradients of the processes are not summed yet.

    Where all weights are trained in shards they are: else each process would hold the whole sum.
    DeepSpeed sums them with every pass in any case.
    """
    if not in_shards(distiller):
        with getattr(distiller, "no_sync", _nothing)():
            yield
        return
    if not hasattr(distiller, "set_requires_gradient_sync"):
        yield
        return
    later = any(not p.requires_grad for p in distiller.parameters())
    distiller.set_requires_gradient_sync(not later)
    try:
        yield
    finally:
        distiller.set_requires_gradient_sync(True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@torch.no_grad()
def weights_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights of a model, whole, in the main process; all have to ask together."""
    return collected(trainable(model).items())


@torch.no_grad()
def collected(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors made whole for the process that writes files; nothing in the others.

    Every process has to ask at the same time. One after the other is put together, and moved to the
    host's memory before the next: a device never holds two.
    """
    keeps = not distributed.is_initialized() or distributed.get_rank() == 0
    found: dict[str, Tensor] = {}
    for name, tensor in named:
        one = whole(tensor).detach()
        if keeps:
            found[name] = one.cpu()
    return found
