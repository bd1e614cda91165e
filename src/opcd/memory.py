"""What a run keeps in the memory of each process, part by part: arithmetic on shapes, no model.

    held      weights, gradients, optimiser, adapter, teacher, copies and heads: there all the time
    passing   keys and values, activations, slices of logits: the largest of them comes on top

Sharded over processes (FSDP2, ZeRO-3) are the layers, and all that is trained. What a process has
loaded besides, its libraries and its allocator's slack, is not in it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opcd.config import Run
from opcd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's size depends on, from its public configuration."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    head_width: int = 128
    tied: bool = False
    """Whether the head's weights are those of the embeddings."""
    positions: int = 0
    """Tokens that a sequence may have; 0 where that is not known."""

    @property
    def linear(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each linear map of a layer."""
        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        attention = ((self.hidden, queries), *[(self.hidden, keys)] * 2, (queries, self.hidden))
        wide = ((self.hidden, self.intermediate),) * 2
        return (*attention, *wide, (self.intermediate, self.hidden))

    @property
    def of_layers(self) -> int:
        """Parameters of all layers' linear maps."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear)

    @property
    def embedding(self) -> int:
        """Parameters of the embeddings, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; norms and biases are left out, being a few in ten thousand."""
        return self.of_layers + self.embedding * (1 if self.tied else 2)

    @property
    def kv_elements(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.key_heads * self.head_width


SHAPES = {
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, 64, tied=True, positions=8192),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(32, 4096, 14336, 32, 8, 128256),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(28, 3072, 8192, 24, 8, 128256, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": Shape(28, 3584, 18944, 28, 4, 152064),
    "Qwen/Qwen2.5-3B-Instruct": Shape(36, 2048, 11008, 16, 2, 151936, tied=True),
    "Qwen/Qwen3-8B": Shape(36, 4096, 12288, 32, 8, 151936),
    "Qwen/Qwen3-4B-Instruct-2507": Shape(36, 2560, 9728, 32, 8, 151936, tied=True),
    "Qwen/Qwen3-1.7B": Shape(28, 2048, 6144, 16, 8, 151936, tied=True),
}
"""Models whose shapes need no file."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""How a model's configuration says that its layers have several gated MLPs."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a run is done, as far as its memory depends on it."""

    processes: int = 1
    sharded: bool = False
    """FSDP2 or ZeRO-3 rather than DDP."""
    element: int = 2
    """Bytes of a number that is not trained: 2 in bfloat16, 4 in float32."""
    prompt_tokens: int = 250
    context_tokens: int = 0
    """Of all contexts together."""


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the sum."""

    name: str
    bytes: float
    passing: bool = False
    """Whether it is there at times only; the largest of these counts."""


def shape_of(path: str) -> Shape:
    """The shape of a model, from the `config.json` of its folder or from the known ids.

    Raises:
        ConfigError: it is neither.
    """
    if path in SHAPES:
        return SHAPES[path]
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"the shape of {path!r} is not known without loading it; give the folder of a model "
            f"(with its config.json), or one of {sorted(SHAPES)}"
        )
    return read_shape(json.loads(file.read_text(encoding="utf-8")), path)


def read_shape(found: Mapping[str, Any], path: str) -> Shape:
    """The shape in a model's `config.json`.

    Raises:
        ConfigError: it lacks a number; this is no model of plain attention and a gated MLP.
    """
    found = found.get("text_config") or found
    if any((found.get(name) or 0) > 1 for name in EXPERTS):
        raise ConfigError(
            f"{path} is a mixture of experts, of which the memory cannot be told: its size depends "
            "on more than is counted here; leave --memory out"
        )
    try:
        heads = found["num_attention_heads"]
        return Shape(
            found["num_hidden_layers"],
            found["hidden_size"],
            found["intermediate_size"],
            heads,
            found.get("num_key_value_heads") or heads,
            found["vocab_size"],
            found.get("head_dim") or found["hidden_size"] // heads,
            found.get("tie_word_embeddings", False),
            found.get("max_position_embeddings") or 0,
        )
    except KeyError as error:
        raise ConfigError(
            f"{path}/config.json has no {error}, so that the memory of such a model cannot be told"
        ) from error


def adapter_parameters(run: Run, shape: Shape) -> float:
    """Of a LoRA adapter on all linear maps, or on a share of them by the names that are listed."""
    tuning = run.model.tuning
    if tuning.type != "lora":
        return 0.0
    layers = min(tuning.last_layers or shape.layers, shape.layers)
    each = tuning.rank * sum(inputs + outputs for inputs, outputs in shape.linear)
    named = len(shape.linear) if isinstance(tuning.targets, str) else len(tuning.targets)
    return layers * each * min(named / len(shape.linear), 1.0)


def held(run: Run, at: Layout) -> list[Part]:
    """What is there all the time, in each process."""
    shape, full = shape_of(run.model.path), run.model.tuning.type == "full"
    share = 1 / at.processes if at.sharded else 1.0
    if full:
        trained = shape.parameters * share
        parts = [
            Part("weights, float32", 4 * trained),
            Part("gradients", 4 * trained),
            Part("AdamW", 8 * trained),
            Part("copy that answers", at.element * shape.parameters * _answers_here(run)),
            Part("base model", _frozen_bytes(shape, share, at.element)),
        ]
    else:
        adapter = adapter_parameters(run, shape)
        # An engine shares with the student what no adapter changes, unless that is in shards.
        tuning: Any = run.model.tuning
        copied = shape.of_layers * (
            1 if at.sharded else (tuning.last_layers or shape.layers) / shape.layers
        )
        parts = [
            Part("weights", _frozen_bytes(shape, share, at.element)),
            Part("adapter, its gradients, AdamW", 16 * adapter * share),
            Part("copy that answers", at.element * copied * _answers_here(run)),
        ]
    if at.processes > 1 and not at.sharded:
        trained = shape.parameters if full else adapter_parameters(run, shape)
        parts.append(Part("gradients on their way (DDP)", 4 * trained))
    parts += _teacher(run, at, share)
    moving = run.teacher.type in ("ema", "refresh")
    if moving:
        shadowed = shape.parameters if full else adapter_parameters(run, shape)
        parts.append(Part("the teacher's own weights", 4 * shadowed * share))
    other = getattr(run.teacher, "path", None)
    apart = run.teacher.type == "frozen" and (other or not full)
    heads = [shape] * (2 if full else 1)
    heads += [shape_of(other or run.model.path)] if apart else []
    if at.element < 4:
        parts.append(Part("heads in float32", sum(4.0 * one.embedding for one in heads)))
    prefix = at.context_tokens * shape_of(other or run.model.path).kv_elements * at.element
    kept = min(prefix, run.batch.prefix_gib * 2**30)
    return [*parts, Part("contexts, each read once", kept)]


def _frozen_bytes(shape: Shape, share: float, element: int) -> float:
    """Of a model that is not trained: its layers may be in shards, the rest is whole."""
    outside = shape.parameters - shape.of_layers
    return element * (shape.of_layers * share + outside)


def _answers_here(run: Run) -> bool:
    """Whether the trainer draws answers itself; else servers do."""
    return run.rollout.type == "hf"


def _teacher(run: Run, at: Layout, share: float) -> list[Part]:
    other = getattr(run.teacher, "path", None)
    # Of all weights in training, the first ones are the base model, which is counted already.
    if run.teacher.type != "frozen" or (run.model.tuning.type == "full" and not other):
        return []
    shape = shape_of(other or run.model.path)
    return [Part("teacher", _frozen_bytes(shape, share, at.element))]


def passing(run: Run, at: Layout) -> list[Part]:
    """What is there at times: while answers are drawn, while a portion is trained, at the step."""
    shape, full = shape_of(run.model.path), run.model.tuning.type == "full"
    rows = min(run.rollout.batch_rows, -(-run.batch.prompts_per_step // at.processes))
    reach = at.prompt_tokens + run.rollout.max_new_tokens
    share = 1 / at.processes if at.sharded else 1.0
    # Probabilities, and their sums in float64, of each row at one time.
    drawing = rows * (reach * shape.kv_elements * at.element + 20 * shape.vocabulary)
    drawing *= _answers_here(run)
    trained = shape.parameters if full else adapter_parameters(run, shape)
    parts = [
        Part("drawing answers: keys and values", drawing, passing=True),
        Part("training a portion: activations", training_bytes(run, shape, at), passing=True),
        Part("a step of AdamW", 4 * trained * share, passing=True),
    ]
    if at.sharded and full:
        largest = 4 * max(shape.embedding, shape.hidden * shape.intermediate)
        parts.append(Part("a checkpoint: one weight made whole", largest, passing=True))
    return parts


def checkpoint_bytes(run: Run) -> float:
    """What the main process has in the host's memory while it writes a checkpoint.

    Weights, and both of AdamW's moments, in float32; the teacher's too, where it has its own.
    """
    shape = shape_of(run.model.path)
    full = run.model.tuning.type == "full"
    trained = shape.parameters if full else adapter_parameters(run, shape)
    return (16 if run.teacher.type in ("ema", "refresh") else 12) * trained


def training_bytes(run: Run, shape: Shape, at: Layout) -> float:
    """Of one portion's forward and backward pass, with the slice of logits that is there."""
    tokens = run.batch.rows_per_forward * (at.prompt_tokens + run.rollout.max_new_tokens)
    queries = shape.heads * shape.head_width
    wide = queries + 2 * shape.key_heads * shape.head_width
    if run.model.tuning.type == "lora":
        # Of a layer, in the run's dtype: what its norms and products were given, and what attends.
        given = 4 * shape.hidden + queries + 2 * shape.intermediate
        of_layer = at.element * (given + wide)
    else:
        # transformers' own norms keep theirs in float32; the products of the gate count, too.
        given = 3 * shape.hidden + 3 * wide + 4 * shape.intermediate
        of_layer = 16 * shape.hidden + at.element * given
    if not run.model.gradient_checkpointing:
        activations = shape.layers * of_layer
    else:
        activations = shape.layers * 4 * shape.hidden + of_layer
    # Both sides' logits and log-probabilities, their exponents, and the gradient.
    chunk = 4 * 8 * min(run.loss.chunk_tokens, tokens) * shape.vocabulary
    # Autocast keeps weights that it has turned to bfloat16 until the pass is over.
    trained = shape.parameters if run.model.tuning.type == "full" else 0
    casts = at.element * trained if at.element < 4 and not at.sharded else 0
    unsharded = 2 * at.element * shape.of_layers / shape.layers if at.sharded else 0
    return tokens * activations + chunk + casts + unsharded


def parts_of(run: Run, at: Layout) -> list[Part]:
    """All parts of one process's memory."""
    return [*held(run, at), *passing(run, at)]


def peak_bytes(parts: Iterable[Part]) -> float:
    """What is held and the largest of what passes."""
    listed = list(parts)
    most = max((part.bytes for part in listed if part.passing), default=0.0)
    return sum(part.bytes for part in listed if not part.passing) + most


def memory_lines(run: Run, at: Layout) -> list[str]:
    """The parts for people, in gigabytes."""
    how = "sharded (FSDP2, ZeRO-3)" if at.sharded else "each with all weights (DDP)"
    where = "one process" if at.processes == 1 else f"each of {at.processes} processes, {how}"
    parts = parts_of(run, at)
    found = [f"memory of {where}, {8 * at.element} bits a number, estimated:"]
    for part in parts:
        mark = "  at times: " if part.passing else "  "
        found.append(f"{part.bytes / 1e9:9.2f} GB{mark}{part.name}")
    found.append(f"{peak_bytes(parts) / 1e9:9.2f} GB  together, with the largest of those at times")
    if at.sharded:
        loading = peak_loading(run, at)
        found.append(f"{loading / 1e9:9.2f} GB  while loading, before weights are cut")
    found.append(
        f"{checkpoint_bytes(run) / 1e9:9.2f} GB  in the memory of the host, in the main process "
        "alone, while it writes a checkpoint"
    )
    return found


def peak_loading(run: Run, at: Layout) -> float:
    """What a process holds before its weights are cut into shards: all of them, still untrained."""
    alone = replace(at, sharded=False)
    built = ("weights", "weights, float32", "base model", "teacher")
    return sum(part.bytes for part in held(run, alone) if part.name in built)
