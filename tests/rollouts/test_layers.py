"""`opcd.rollouts.layers`: layers called one by one give what transformers gives."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from opcd.prefix_cache import SharedPrefix, read_prefix
from opcd.rollouts.layers import ROOM_TOKENS, LayerRows, find_layers
from opcd.rollouts.packing import load_weights, pack_linears
from tiny import SHAPE, build, random_ids

OPENING = random_ids(9, 50)
ROWS = [
    (*OPENING, *random_ids(5, 1)),
    random_ids(3, 2),
    (*OPENING, *random_ids(2, 3)),
    (*OPENING, *random_ids(5, 1)),
]
"""Different lengths, three that open alike, two that are the same."""
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
KNOWN = {
    "llama": LlamaConfig(**SHAPE),
    "llama, all heads its own": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "llama, yarn": LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
}


def stir(model: Any) -> Any:
    """Biases and norms that are not what they are made as, so that none can be left out."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.requires_grad_(False)


@torch.no_grad()
def read_alone(model: Any, ids: Sequence[int]) -> Tensor:
    """Transformers' hidden state at the last token."""
    return model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]


@torch.no_grad()
def compare(
    model: Any, plain: Any, tolerance: float, contexts: Sequence[tuple[int, ...]] = ()
) -> None:
    """Read, write past the room that there is, let rows leave, write on."""
    layers = find_layers(model)
    assert layers, "its layers are known"
    read = {ids: read_prefix(model, ids) for ids in contexts}
    prefixes: list[SharedPrefix] = [read[ids] for ids in contexts]
    rows = LayerRows(layers, prefixes)
    texts = [list(ids) for ids in ROWS]
    hidden_BD = rows.read(ROWS)
    left = list(range(len(ROWS)))
    for step in range(ROOM_TOKENS + 8):
        for row, hidden_D in zip(left, hidden_BD, strict=True):
            if step in (0, 1, 2, ROOM_TOKENS + 6, ROOM_TOKENS + 7):
                before = contexts[row] if contexts else ()
                wanted_D = read_alone(plain, (*before, *texts[row]))
                assert (hidden_D - wanted_D).norm() <= tolerance * wanted_D.norm(), (step, row)
        if step == 1:
            rows.keep([0, 2, 3])
            left = [0, 2, 3]
        tokens = random_ids(len(left), 100 + step)
        for row, token in zip(left, tokens, strict=True):
            texts[row].append(token)
        hidden_BD = rows.write(torch.tensor(tokens))


@pytest.mark.parametrize("config", KNOWN.values(), ids=KNOWN.keys())
def test_hidden_states_are_those_of_transformers(config: Any) -> None:
    """Rows of one batch against each row alone, read whole."""
    model = stir(build(config, 3))
    compare(model, model, 1e-5)


@pytest.mark.parametrize("config", [KNOWN["llama"], KNOWN["qwen2"]], ids=["llama", "qwen2"])
def test_packed_weights_change_nothing(config: Any) -> None:
    """With neighbours multiplied at once, their biases with them."""
    plain = stir(build(config, 3))
    model = build(config, 4).requires_grad_(False)
    packed = pack_linears(model, set())
    load_weights(model, packed, plain.named_parameters())
    compare(model, plain, 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rows_behind_prefixes(name: str) -> None:
    """Rows that open alike behind different contexts are not taken for the same."""
    model = stir(build(KNOWN[name], 3))
    one, two = random_ids(20, 8), random_ids(31, 9)
    compare(model, model, 1e-5, [one, one, one, two])


def test_bfloat16_is_as_far_from_float32_as_transformers_is() -> None:
    plain = stir(build(KNOWN["llama"], 3))
    model = build(KNOWN["llama"], 3)
    model.load_state_dict(plain.state_dict())
    model = model.to(torch.bfloat16).requires_grad_(False)
    layers = find_layers(model)
    assert layers
    found_BD = LayerRows(layers).read(ROWS).float()
    wanted_BD = torch.stack([read_alone(plain, ids) for ids in ROWS])
    theirs_BD = torch.stack([read_alone(model, ids) for ids in ROWS]).float()
    assert found_BD.dtype == torch.float32
    assert (found_BD - wanted_BD).norm() < 1.5 * (theirs_BD - wanted_BD).norm()


OTHERS = {
    "scaled residuals": GraniteConfig(**SHAPE, residual_multiplier=0.5),
    "scaled embeddings": GemmaConfig(**SHAPE),
    "a window": MistralConfig(**SHAPE, sliding_window=8),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_models_that_compute_otherwise_are_left_alone(config: Any) -> None:
    """All of them have the same parts; what comes out tells them apart."""
    assert find_layers(build(config, 3)) is None


FAR: Any = {**YARN, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1}
HARDLY: Any = {**SHAPE, "initializer_range": 0.005}
UNSEEN = {
    "queries that are scaled from some position on": Ministral3Config(
        **SHAPE, sliding_window=None, rope_parameters=FAR
    ),
    "no positions, in a model that hardly attends": SmolLM3Config(
        **HARDLY, no_rope_layer_interval=2
    ),
}


@pytest.mark.parametrize("config", UNSEEN.values(), ids=UNSEEN.keys())
def test_what_a_few_tokens_do_not_show_is_left_alone(config: Any) -> None:
    """Same parts, same hidden states where it is looked, and others elsewhere."""
    assert find_layers(build(config, 3).to(torch.bfloat16)) is None


def test_other_dtypes_are_left_alone() -> None:
    assert find_layers(build(KNOWN["llama"]).to(torch.float64)) is None
