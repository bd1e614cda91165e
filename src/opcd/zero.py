"""Weights, gradients and optimiser cut over the processes by DeepSpeed (ZeRO stage 3).

DeepSpeed is loaded only where a launch asks for it. Its engine owns the optimiser's step, so
`ZeroOptimizer` is what training sees of it: the same names and the same checkpoint as of AdamW.
Layers are put together one at a time; what stands outside them is whole in every process, though
its gradient and optimiser are cut. Knows nothing of prompts or losses.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed

from opcd.adapters import causal_model, trainable
from opcd.sharding import layers_of, run_in

SETTINGS: Mapping[str, Any] = {
    # Gradients add up until the trainer steps; the loss is divided by the trainer.
    "train_micro_batch_size_per_gpu": 1,
    "managed_gradient_accumulation": False,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": None,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 50_000_000,
        # A step has a copy of the gradients, and AdamW's own terms, of so many weights at a time.
        "sub_group_size": 50_000_000,
        # Passes of student and teacher differ from step to step, so nothing is fetched ahead.
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    },
}
"""What DeepSpeed is told."""


@dataclass(frozen=True, slots=True)
class Zero:
    """How DeepSpeed cuts the models of a run."""

    device: torch.device
    clip_norm: float
    """Of the gradient, clipped within the engine's step."""

    def shard(
        self,
        distiller: Any,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[..., AbstractContextManager[Any]],
    ) -> tuple[Any, "ZeroOptimizer"]:
        """Cut a student and its optimiser: the engine to call in its place, and the optimiser.

        Raises:
            ModelError: the model does not say what its layers are.
        """
        run_in(distiller, partial(_uncached, autocast))
        own = list(trainable(distiller.student).values())
        engine = self._cut(distiller, distiller.student, optimizer=optimizer)
        return engine, ZeroOptimizer(engine, optimizer, own)

    def shard_frozen(self, model: Any) -> None:
        """Cut a model that is never trained, in place.

        Raises:
            ModelError: the model does not say what its layers are.
        """
        # An engine that nobody holds takes its hooks away; as a module's child it would be a loop.
        model.__dict__["zero_engine"] = self._cut(causal_model(model), model)

    def _cut(self, module: Any, model: Any, **more: Any) -> Any:
        layers = layers_of(model)
        inside = {id(weight) for layer in layers for weight in layer.parameters()}
        outside = [weight for weight in model.parameters() if id(weight) not in inside]
        deepspeed = load_deepspeed(self.device)
        settings = {**SETTINGS, "gradient_clipping": self.clip_norm}
        engine, *_ = deepspeed.initialize(
            model=module, config=settings, dist_init_required=False, **more
        )
        # Else DeepSpeed would fetch a layer's weights one by one, as each is read.
        for layer in layers:
            for weight in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, weight)
        keep_whole(engine, outside)
        return engine


def load_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, for this kind of device, and quiet."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # torch has new names for what DeepSpeed asks of it, hundreds of times a step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed = import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def keep_whole(engine: Any, weights: list[Any]) -> None:
    """Let weights be put together for good: a head is needed for every slice of tokens."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    for weight in weights:
        # The one is put together again after each step, the other is not let go of in between.
        weight.ds_persist = weight.is_external_param = True
        offload.persistent_parameters.append(weight)
    if weights:
        weights[0].all_gather(weights)


@contextmanager
def _uncached(autocast: Callable[..., AbstractContextManager[Any]]) -> Iterator[None]:
    # The cache would hold every layer's weights in bfloat16 until the pass is over.
    with autocast():
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(before)


class ZeroOptimizer:
    """AdamW within DeepSpeed's engine: each process moves its part of the weights."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, weights: list[Any]) -> None:
        """Take note of both.

        Args:
            engine: holds the gradients.
            optimizer: the one that the engine steps, of one group.
            weights: those it moves, in its order before they were cut.
        """
        self._engine, self._optimizer, self._weights = engine, optimizer, weights

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As AdamW's own, to be read: the engine takes the weights out of those."""
        (group,) = self._optimizer.param_groups
        return [{**group, "params": self._weights}]

    def grad_norm(self) -> float:
        """Of the gradient as it is summed over passes and processes, not yet clipped."""
        own_part: Any = import_module("deepspeed.utils").safe_get_local_grad
        parts = [own_part(weight) for weight in self._weights]
        square = torch.nn.utils.get_total_norm(parts).square()
        distributed.all_reduce(square)
        return float(square.sqrt())

    def step(self) -> None:
        """Clip, and move the weights."""
        self._engine.step()

    def zero_grad(self) -> None:
        """Let the next pass begin a new sum."""
        self._engine.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """As AdamW's own, its tensors whole and in the main process; all have to ask together."""
        whole: Any = import_module("deepspeed.utils").safe_get_full_optimizer_state
        (group,) = self.param_groups
        keeps = distributed.get_rank() == 0
        found: dict[int, dict[str, Any]] = {}
        kept = next(iter(self._optimizer.state.values()), {})
        for place, weight in enumerate(self._weights) if kept else ():
            for name, value in kept.items():
                one = whole(weight, name) if value.dim() else value
                if keeps:
                    found.setdefault(place, {})[name] = one.cpu()
        places = list(range(len(self._weights)))
        return {"state": found, "param_groups": [{**group, "params": places}]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, of each tensor this process's part."""
        give: Any = import_module("deepspeed.utils").safe_set_local_optimizer_state
        (group,) = self._optimizer.param_groups
        group |= {key: value for key, value in saved["param_groups"][0].items() if key != "params"}
        first: Mapping[str, Tensor] = saved["state"].get(0, {})
        for flat in self._engine.optimizer.fp32_partitioned_groups_flat if first else ():
            self._optimizer.state[flat] = {
                name: torch.zeros_like(flat) if value.dim() else value.clone()
                for name, value in first.items()
            }
        for place, values in saved["state"].items():
            for name, value in values.items():
                if value.dim():
                    give(self._weights[place], value, name)
