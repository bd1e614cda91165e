"""`opcd.attention`: which models' attention another function may stand in for."""

from typing import Any

import pytest
import torch
from transformers import DiffLlamaConfig, DogeConfig, GptOssConfig, LlamaConfig, NemotronConfig

from opcd.attention import why_no_prefix
from tiny import SHAPE, build

ROPE: Any = {"rope_theta": 1e4, "factor": 2.0}
LONG: Any = {
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
FULL: Any = {**SHAPE, "layer_types": ["full_attention"] * 2}
OTHER_ATTENTION = {
    "sinks": GptOssConfig(**FULL, num_local_experts=4),
    "a mask of its own": DogeConfig(**SHAPE),
    "values that are no cache's": DiffLlamaConfig(**SHAPE),
    "a decoder that hands nothing on": NemotronConfig(**SHAPE),
}
BY_LENGTH = {
    "dynamic": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", **ROPE}),
    "longrope": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "longrope", **ROPE, **LONG}),
}


@pytest.mark.parametrize("name", list(OTHER_ATTENTION))
def test_attention_with_something_of_its_own_is_left_to_it(name: str) -> None:
    """Nothing in these models' configurations tells; what comes out does."""
    model = build(OTHER_ATTENTION[name])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * (weight.dim() == 1))
    reason = why_no_prefix(model)
    assert reason is not None and "something of its own" in reason


@pytest.mark.parametrize("name", list(BY_LENGTH))
def test_angles_that_depend_on_the_longest_row_are_not_shared(name: str) -> None:
    """A prefix's would be those of its own length."""
    reason = why_no_prefix(build(BY_LENGTH[name]))
    assert reason is not None and name in reason
