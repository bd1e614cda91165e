"""What is tuned in a model: an adapter or all of its weights; merged, shared, saved, given back."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opcd.config.training import Full, Lora
from opcd.errors import ModelError
from opcd.norms import speed_up_norms
from opcd.products import Adapter, adapted_product, gated_product, product


def tune(model: Any, tuning: Lora | Full, seed: int) -> Any:
    """Make a model trainable: with a LoRA adapter (float32) in it, or in all its weights.

    Raises:
        ModelError: the model has none of the named modules.
    """
    if isinstance(tuning, Full):
        return model.requires_grad_(True)
    targets = tuning.targets if isinstance(tuning.targets, str) else list(tuning.targets)
    layers = model.config.get_text_config().num_hidden_layers
    if tuning.last_layers and not any(".layers.0." in name for name, _ in model.named_modules()):
        raise ModelError(
            f"model.tuning.last_layers = {tuning.last_layers}, but {type(model).__name__} does not "
            'call its blocks "layers", so they cannot be told apart; leave last_layers out'
        )
    left_out = "|".join(map(str, range(layers - (tuning.last_layers or layers))))
    lora = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        exclude_modules=rf".*\.layers\.({left_out})\..*" if left_out else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tuned: Any = get_peft_model(model, lora)
        except ValueError as error:
            raise ModelError(
                f"model.tuning.targets = {tuning.targets!r}: {error}; name modules of this model, "
                'or write "all-linear"'
            ) from error
    base = tuned.get_base_model()
    shared = (base.get_output_embeddings(), base.get_input_embeddings())
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and any(isinstance(module, LoraLayer) for module in shared):
        raise ModelError(
            f"model.tuning.targets = {tuning.targets!r} adapts the output head or the input "
            "embeddings, but the one shares its weights with the other, so it cannot be merged; "
            'write "all-linear"'
        )
    speed_up(base)
    speed_up_norms(base)
    return tuned


def speed_up(model: nn.Module) -> None:
    """Let the LoRA layers of a model, and its gated blocks of them, compute in fewer steps."""
    for layer in model.modules():
        if type(layer) is LoraLinear and type(layer.base_layer) is nn.Linear:
            layer.forward = partial(_adapted_forward, layer)
    for block in model.modules():
        if _is_gated(block):
            block.forward = partial(_gated_forward, block)


def _adapted_forward(layer: Any, x: Tensor, *extra: Any, **named: Any) -> Tensor:
    base = layer.base_layer
    if not extra and not named and x.dtype == base.weight.dtype:
        if layer.disable_adapters and not x.requires_grad and _is_plain(layer):
            return product(x, base.weight, base.bias)
        if adapter := _only_adapter(layer):
            return adapted_product(x, base.weight, base.bias, adapter)
    return type(layer).forward(layer, x, *extra, **named)


def _gated_forward(block: Any, x: Tensor) -> Tensor:
    layer = block.down_proj
    base, adapter = layer.base_layer, _only_adapter(layer)
    gate, value = block.gate_proj(x), block.up_proj(x)
    if adapter and gate.dtype == value.dtype == base.weight.dtype:
        return gated_product(gate, value, base.weight, base.bias, adapter)
    return layer(block.act_fn(gate) * value)


@torch.no_grad()
def _is_gated(block: Any) -> bool:
    """Whether a block is `down(silu(gate(x)) * up(x))`, by its parts and by what it computes."""
    names = ("gate_proj", "up_proj", "down_proj")
    layers = [getattr(block, name, None) for name in names]
    if {name for name, _ in block.named_children()} != {*names, "act_fn"}:
        return False
    if not all(type(layer) is LoraLinear for layer in layers):
        return False
    weight = block.gate_proj.base_layer.weight
    x = torch.linspace(-1.0, 1.0, weight.shape[1]).to(weight).unsqueeze(0)
    opened = nn.functional.silu(block.gate_proj(x)) * block.up_proj(x)
    # As in training: some blocks drop a part of what comes out, which they do nowhere else.
    was_training, block.training = block.training, True
    try:
        return torch.equal(block(x), block.down_proj(opened))
    finally:
        block.training = was_training


def _is_plain(layer: Any) -> bool:
    """Whether nothing but a frozen product is asked of a layer without its adapter."""
    weight = layer.base_layer.weight
    return not (layer.merged or weight.requires_grad) and weight.dtype == _autocast_dtype(weight)


def _only_adapter(layer: Any) -> Adapter | None:
    """A layer's one adapter; `None` where there is more to do than PEFT's plain sum.

    With dropout, DoRA, several adapters or none, a weight in training or mixed dtypes, PEFT's own
    `forward` knows what to do.
    """
    names, names_in_use = list(layer.lora_A), layer.active_adapters
    if layer.disable_adapters or names != names_in_use or len(names) != 1 or layer.lora_variant:
        return None
    (name,) = names
    if not _is_plain(layer) or type(layer.lora_dropout[name]) is not nn.Identity:
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _autocast_dtype(weight: Tensor) -> torch.dtype:
    """What autocast, if it is on, would turn this weight into."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def writes_to(model: Any) -> int:
    """How often what is trained has been written to: weights may also be loaded between steps."""
    return sum(weight._version for weight in trainable(model).values())


def in_shards(model: nn.Module) -> bool:
    """Whether this process holds only a part of a model's weights."""
    layers = (module for module in model.modules() if isinstance(module, FSDPModule))
    return next(layers, None) is not None or any(map(partitioned, model.parameters()))


def partitioned(weight: Tensor) -> bool:
    """Whether DeepSpeed cut a weight: its own data are there only while it is used."""
    return hasattr(weight, "ds_tensor")


@contextmanager
def put_together(weights: Iterable[Tensor]) -> Iterator[None]:
    """Within it, weights that DeepSpeed cut are whole; every process has to ask for the same."""
    cut: list[Any] = [weight for weight in weights if partitioned(weight)]
    # Those that persist are whole already, and would be in pieces afterwards.
    cut = [weight for weight in cut if not weight.ds_persist]
    if not cut:
        yield
        return
    with import_module("deepspeed.runtime.zero").GatheredParameters(cut):
        yield


def adapter_off(model: Any) -> AbstractContextManager[Any, Any]:
    """Within it, a LoRA model answers as its base model."""
    return _disabled(model) if isinstance(model, PeftModel) else nullcontext()


@contextmanager
def _disabled(model: Any) -> Iterator[None]:
    # Not PEFT's own context: it stops the adapter's weights from being trained and starts it again,
    # which weights in shards do not get over.
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before: list[bool] = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within it, a model answers as it does when nothing is trained: without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def causal_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def merged_weights(model: Any, policy: str = "student") -> Iterator[tuple[str, Tensor]]:
    """Each weight of the model inside, adapters merged in float32, one at a time.

    Names are those of the untouched base model, so that a plain copy of it can take them. Those of
    the policy `base` are its own, without the adapter.
    """
    deltas: dict[str, Any] = {
        _adapted_weight(name, layer): layer
        for name, layer in causal_model(model).named_modules()
        if isinstance(layer, LoraLayer) and policy == "student"
    }
    for name, weight in causal_model(model).named_parameters():
        if ".lora_" in name:
            continue
        layer = deltas.get(name)
        with put_together([weight, *(layer.parameters() if layer else ())]):
            merged = _merged(layer, weight.detach()) if layer else weight.detach()
            yield _bare(name), merged


def _adapted_weight(name: str, layer: Any) -> str:
    """The name of the weight that a layer adapts: of several experts' weights, each has its own."""
    inner = layer
    while hasattr(inner, "base_layer"):
        name, inner = f"{name}.base_layer", inner.base_layer
    return f"{name}.{getattr(layer, 'parameter_name', 'weight')}"


def _bare(name: str) -> str:
    """A weight's name in the untouched base model."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _merged(layer: Any, weight_OI: Tensor) -> Tensor:
    """A layer's weight with its adapter's part, in float32."""
    adapter = _only_adapter(layer) if type(layer) is LoraLinear else None
    if adapter and type(weight_OI) is Tensor and not layer.fan_in_fan_out:
        down_RI, up_OR, scale = adapter
        wide_OI = weight_OI.to(torch.float32, copy=True)
        return wide_OI.addmm_(up_OR.detach().float(), down_RI.detach().float(), alpha=scale)
    return weight_OI.float() + layer.get_delta_weight("default").detach().to(weight_OI.device)


def share_frozen(model: Any, plain: Any) -> None:
    """Let a plain model of the same architecture use the weights that training leaves alone.

    Only those of its own dtype that are whole here; names are those of the untouched base model.
    """
    moving = trainable(causal_model(model)).keys()
    adapted = {name.partition(".lora_")[0] for name in moving}
    own = dict(plain.named_parameters())
    for name, weight in causal_model(model).named_parameters():
        bare = _bare(name)
        if name in moving or bare.rpartition(".")[0] in adapted or own[bare].dtype != weight.dtype:
            continue
        if isinstance(weight, DTensor) or (partitioned(weight) and not weight.ds_persist):
            continue
        module, _, leaf = bare.rpartition(".")
        setattr(plain.get_submodule(module), leaf, weight)
    plain.tie_weights()


def merge(model: Any) -> Any:
    """The plain transformers model, the adapter merged into its weights for good."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def save_weights(model: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write what was trained: a PEFT adapter that vLLM serves, or a whole transformers folder.

    Args:
        model: the model.
        folder: is made.
        weights: what was trained, if the model does not hold it as a whole.

    Raises:
        OSError: it could not be written, as on a full disk; part of it may be there.
    """
    try:
        model.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors' own files may be read by nobody else, whatever the user's mask says.
    usual = next(folder.glob("*config.json")).stat().st_mode
    for file in folder.glob("*.safetensors"):
        with suppress(PermissionError):  # a file system without such modes
            file.chmod(usual)


def load_weights(model: Any, folder: Path) -> None:
    """Give a model the weights that `save_weights` wrote.

    Raises:
        ModelError: the folder holds other weights than the model has.
    """
    try:
        if isinstance(model, PeftModel):
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        else:
            saved = type(model).from_pretrained(folder, dtype=torch.float32)
            model.load_state_dict(saved.state_dict())
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} does not hold this run's weights ({error})") from error
