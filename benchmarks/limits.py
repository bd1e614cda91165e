"""What a step costs at the least: its products of matrices, over what a plain one reaches here.

    python benchmarks/limits.py

Only work that no method can leave out is counted: each token once through the frozen layers (and
once back, on the student's side), the head at response positions, and the teacher's attention over
the context. Norms, softmaxes, masks, optimiser and generation count for nothing.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SIDE = 2048
"""Of the square matrices that are multiplied."""
TRIALS = 12


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama that its products hang on."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int

    @staticmethod
    def read(config: Mapping[str, Any]) -> "Shape":
        """From a model folder's `config.json`."""
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return Shape(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            width,
            config["vocab_size"],
        )

    @property
    def linears(self) -> list[tuple[int, int]]:
        """In and out widths of one layer's projections."""
        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        into = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys)]
        return [
            *into,
            (queries, self.hidden),
            (self.hidden, self.inner),
            (self.hidden, self.inner),
            (self.inner, self.hidden),
        ]

    @property
    def weights(self) -> int:
        """Of all projections; embeddings and head apart."""
        return self.layers * sum(a * b for a, b in self.linears)

    def adapter_weights(self, rank: int) -> int:
        """Of an adapter on all projections."""
        return self.layers * rank * sum(a + b for a, b in self.linears)


@dataclass(frozen=True)
class Tokens:
    """What a step reads at the least."""

    student: int
    """Prompts and responses without their last tokens; what all rows open with, once."""
    teacher: int
    """The same after the context."""
    response: int
    context: int


def least_flops(shape: Shape, tokens: Tokens, rank: int) -> dict[str, float]:
    """Floating-point operations of the teacher's pass and of training, two for a multiply-add."""
    head = 2.0 * shape.vocabulary * shape.hidden * tokens.response
    attention = 4.0 * shape.layers * shape.heads * shape.head_width * tokens.context
    return {
        "teacher": tokens.teacher * (2.0 * shape.weights + attention) + head,
        "train": tokens.student * (4.0 * shape.weights + 6.0 * shape.adapter_weights(rank))
        + 2.0 * head,
    }


def measure_matmul() -> dict[str, float]:
    """The most operations a second that `torch` multiplies with, by dtype."""
    import torch

    found = {}
    for name in ("float32", "bfloat16"):
        left, right = (torch.randn(SIDE, SIDE).to(getattr(torch, name)) for _ in range(2))
        torch.matmul(left, right)
        best_s = float("inf")
        for _ in range(TRIALS):
            started = time.perf_counter()
            torch.matmul(left, right)
            best_s = min(best_s, time.perf_counter() - started)
        found[name] = 2.0 * SIDE**3 / best_s
    return found


if __name__ == "__main__":
    print(json.dumps(measure_matmul()))
