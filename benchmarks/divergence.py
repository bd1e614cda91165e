"""Peak memory and time of the exact divergence: in chunks, and with dense logits.

    python benchmarks/divergence.py [--tokens 4096] [--vocabulary 151936] [--width 64]

Each measurement runs in a process of its own, so that one peak does not hide another. What is
counted is the growth of the process over its state before loss and backward.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opcd.chunking import chunked_stats
from opcd.config.training import Loss
from opcd.divergence import divergence


def measure(way: str, tokens: int, vocabulary: int, width: int, chunk_tokens: int) -> None:
    """Print one measurement as JSON."""
    torch.manual_seed(0)
    student_head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    teacher_head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    student_TD = torch.randn(tokens, width, requires_grad=True)
    teacher_TD = torch.randn(tokens, width)
    response_T = torch.zeros(tokens, dtype=torch.long)
    before_bytes = peak_bytes()
    started = time.perf_counter()
    if way == "chunked":
        loss = Loss(chunk_tokens=chunk_tokens)
        stats = chunked_stats(student_TD, student_head, teacher_TD, teacher_head, response_T, loss)
        divergence_T = stats.divergence_T
    else:
        with torch.no_grad():
            teacher_TV = teacher_head(teacher_TD).log_softmax(-1)
        divergence_T = divergence(
            student_head(student_TD).log_softmax(-1), teacher_TV, "reverse_kl"
        )
    divergence_T.mean().backward()
    assert student_TD.grad is not None
    found = {
        "way": way,
        "peak_bytes": peak_bytes() - before_bytes,
        "wall_s": time.perf_counter() - started,
        "loss_nats": divergence_T.mean().item(),
        "gradient_norm": student_TD.grad.norm().item(),
    }
    print(json.dumps(found))


def peak_bytes() -> int:
    """The most memory this process has held (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, str(Path(__file__)), "--way", way]
    for name in ("tokens", "vocabulary", "width", "chunk_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Measure both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=("chunked", "dense"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.way:
        sizes = (arguments.tokens, arguments.vocabulary, arguments.width, arguments.chunk_tokens)
        measure(arguments.way, *sizes)
        return
    chunked, dense = run("chunked", arguments), run("dense", arguments)
    print(f"T = {arguments.tokens:,}, V = {arguments.vocabulary:,}, D = {arguments.width}, fp32")
    for found in (chunked, dense):
        gib = found["peak_bytes"] / 2**30
        print(
            f"{found['way']:8} peak {gib:7.3f} GiB   {found['wall_s']:6.1f} s   "
            f"loss {found['loss_nats']:.6f} nats   gradient {found['gradient_norm']:.6g}"
        )
    print(f"chunked takes {chunked['peak_bytes'] / dense['peak_bytes']:.1%} of the dense peak")


if __name__ == "__main__":
    main()
