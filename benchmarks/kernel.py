"""The loss alone, value and gradient: opcd's chunks, TRL's chunks and dense logits.

    python benchmarks/kernel.py [--trl-python .venv-trl/bin/python]

Each measurement is a process of its own, so that one peak does not hide another. What is counted
is the growth of the process over its state before loss and backward; the first pass is not timed.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOKENS = 512
SIZES = ((49_152, 576), (151_936, 1024))
"""Vocabulary and hidden width: SmolLM2-135M's and Qwen3-0.6B's."""
WAYS = ("opcd", "trl", "dense")
TIMED = 2
"""Passes that are timed in each process."""

Loss = Callable[..., Any]


def losses(way: str) -> Loss:
    """`f(student_TD, teacher_TD, weight_VD)`: the reverse KL of each token."""
    if way == "opcd":
        from opcd.chunking import chunked_stats
        from opcd.config.training import Loss as Settings
        from opcd.products import frozen_product

        def chunked(student_TD: Any, teacher_TD: Any, weight_VD: Any) -> Any:
            def head(hidden_CD: Any) -> Any:
                return frozen_product(hidden_CD, weight_VD)

            response_T = torch.zeros(len(student_TD), dtype=torch.long)
            found = chunked_stats(student_TD, head, teacher_TD, head, response_T, Settings())
            return found.divergence_T

        return chunked
    if way == "trl":
        from trl.kernels.chunked_divergence import (  # pyright: ignore[reportMissingImports]
            ChunkedDivergenceFunction,
        )

        def tiled(student_TD: Any, teacher_TD: Any, weight_VD: Any) -> Any:
            sides = (student_TD, weight_VD, None, teacher_TD, weight_VD, None)
            return ChunkedDivergenceFunction.apply(*sides, 1.0)[0]

        return tiled

    def dense(student_TD: Any, teacher_TD: Any, weight_VD: Any) -> Any:
        with torch.no_grad():
            teacher_TV = (teacher_TD @ weight_VD.t()).log_softmax(-1)
        student_TV = (student_TD @ weight_VD.t()).log_softmax(-1)
        return (student_TV.exp() * (student_TV - teacher_TV)).sum(-1)

    return dense


def measure(way: str, vocabulary: int, width: int) -> dict[str, Any]:
    """Time, memory, value and gradient of one way."""
    torch.manual_seed(0)
    # In place: a second copy, let go of again, would be room in which the loss's own peak hides.
    weight_VD = torch.randn(vocabulary, width).div_(width**0.5)
    student_TD = torch.randn(TOKENS, width, requires_grad=True)
    teacher_TD = torch.randn(TOKENS, width)
    loss = losses(way)
    before_bytes = peak_bytes()
    walls = []
    value = torch.zeros(())
    for _ in range(1 + TIMED):
        student_TD.grad = None
        started = time.perf_counter()
        value = loss(student_TD, teacher_TD, weight_VD).mean()
        value.backward()
        walls.append(time.perf_counter() - started)
    assert student_TD.grad is not None, "backward was run"
    return {
        "way": way,
        "vocabulary": vocabulary,
        "walls_s": walls[1:],
        "peak_bytes": peak_bytes() - before_bytes,
        "loss_nats": value.item(),
        "gradient_norm": student_TD.grad.norm().item(),
    }


def peak_bytes() -> int:
    """The most memory this process has held (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_all(trl_python: str, repetitions: int = 2) -> list[dict[str, Any]]:
    """All ways at all sizes, in turns; the passes of all repetitions together."""
    rows: list[dict[str, Any]] = []
    for vocabulary, width in SIZES:
        found: dict[str, dict[str, Any]] = {}
        for _ in range(repetitions):
            for way in WAYS:
                python = trl_python if way == "trl" else sys.executable
                sizes = (str(vocabulary), str(width))
                command = [python, str(Path(__file__)), "--way", way, *sizes]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                row = json.loads(result.stdout.splitlines()[-1])
                known = found.setdefault(way, {**row, "walls_s": []})
                known["walls_s"] += row["walls_s"]
                known["peak_bytes"] = max(known["peak_bytes"], row["peak_bytes"])
        rows += found.values()
    return rows


def main() -> None:
    """Measure everything and print it, or one way in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", default=".venv-trl/bin/python")
    parser.add_argument("--way", nargs=3, metavar=("WAY", "VOCABULARY", "WIDTH"))
    arguments = parser.parse_args()
    if arguments.way:
        way, vocabulary, width = arguments.way
        print(json.dumps(measure(way, int(vocabulary), int(width))))
        return
    for row in measure_all(arguments.trl_python):
        print(
            f"V = {row['vocabulary']:7,}  {row['way']:6} {statistics.median(row['walls_s']):6.2f} s"
            f"  {row['peak_bytes'] / 2**20:7,.0f} MiB  {row['loss_nats']:.6f} nats"
            f"  gradient {row['gradient_norm']:.6g}"
        )


if __name__ == "__main__":
    main()
