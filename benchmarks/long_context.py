"""Peak memory behind long contexts: scoring, decoding and a pool of contexts, as rows are added.

    python benchmarks/long_context.py [--contexts 16384 32768] [--rows 8 32] [--out FILE.json]

A random Llama of 4 layers with small heads, float32. Each measurement runs in a process of its own;
what is counted is the growth of its resident memory over the state before. A context's keys
and values, and what one copy of them for each row would be, stand beside it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opcd.batching import collate
from opcd.openings import Openings
from opcd.prefix_cache import read_prefix, token_bytes
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.hf import HFEngine
from opcd.teachers import LocalTeacher
from opcd.types import PromptPair, Rollout

VOCABULARY, OWN_TOKENS, RESPONSE_TOKENS, POOL = 512, 8, 64, 4
WAYS = ("read", "score", "score, the teacher moves", "decode", f"score, {POOL} contexts")


def build(positions: int) -> Any:
    """The same random model in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def random_ids(count: int, seed: int) -> tuple[int, ...]:
    """Tokens of a context or of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())


def work(way: str, model: Any, context_tokens: int, rows: int) -> Callable[[], object]:
    """What is measured."""
    contexts = [
        random_ids(context_tokens, 900 + n) for n in range(POOL if "contexts" in way else 1)
    ]
    if way == "read":
        return lambda: read_prefix(model, contexts[0])
    prompts = [contexts[n % len(contexts)] + random_ids(OWN_TOKENS, n) for n in range(rows)]
    if way == "decode":
        asked = [Prompt(str(n), ids, RESPONSE_TOKENS) for n, ids in enumerate(prompts)]
        engine = HFEngine(model, model, torch.float32, frozenset({-1}), rows)
        engine.use("base", 0)
        return lambda: engine.generate(asked, Sampling())
    pairs = [PromptPair(str(n), random_ids(OWN_TOKENS, n), ids) for n, ids in enumerate(prompts)]
    rollouts = [Rollout(str(n), random_ids(RESPONSE_TOKENS, 50 + n), True) for n in range(rows)]
    side = collate(pairs, rollouts).teacher
    teacher = LocalTeacher(model, nullcontext, nullcontext, moves="moves" in way)
    # Not `share`, which compares with an uncached pass: that one's memory is not the question.
    teacher.openings = Openings([] if teacher.moves else prompts)
    return lambda: teacher.hidden(side)


def measure(way: str, context_tokens: int, rows: int) -> None:
    """Print one measurement as JSON."""
    model = build(context_tokens + 2 * RESPONSE_TOKENS)
    work(way, model, 300, rows)()  # whatever torch sets up once
    run = work(way, model, context_tokens, rows)
    before_bytes = resident_bytes()
    reset_peak()
    started = time.perf_counter()
    run()
    copies = POOL if "contexts" in way else 1
    found = {
        "way": way,
        "context_tokens": context_tokens,
        "rows": rows,
        "peak_bytes": peak_bytes() - before_bytes,
        "prefix_bytes": copies * context_tokens * token_bytes(model),
        "copied_bytes": rows * context_tokens * token_bytes(model),
        "wall_s": time.perf_counter() - started,
    }
    print(json.dumps(found))


def resident_bytes() -> int:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def reset_peak() -> None:
    """Forget the most that was held before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The most that was held since."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def apart(way: str, context_tokens: int, rows: int) -> dict[str, Any]:
    """The same in a process of its own."""
    given = ["--one", way, str(context_tokens), str(rows)]
    ran = subprocess.run(
        [sys.executable, __file__, *given], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise RuntimeError(f"{way}, {context_tokens} tokens, {rows} rows: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """Measure all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[16384, 32768])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, context_tokens, rows = arguments.one
        return measure(way, int(context_tokens), int(rows))
    print("| | context | rows | peak, MiB | keys and values, MiB | a copy for each row, MiB | s |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for way in WAYS:
        for context_tokens in arguments.contexts:
            for rows in arguments.rows if way != "read" else [1]:
                row = apart(way, context_tokens, rows)
                found.append(row)
                sizes = (row[f"{name}_bytes"] / 2**20 for name in ("peak", "prefix", "copied"))
                mib = " | ".join(f"{size:,.0f}" for size in sizes)
                print(f"| {way} | {context_tokens:,} | {rows} | {mib} | {row['wall_s']:.1f} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
