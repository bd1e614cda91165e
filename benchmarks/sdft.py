"""opcd beside TRL's `SDFTTrainer`, in one run on one machine; writes docs/performance.md.

    make bench                                   # everything, about 45 minutes
    python benchmarks/sdft.py --quick            # contexts of 0 and 1,000 tokens, two repetitions

Both sides train the same model with the same adapter on the same prompts, with the same context on
the teacher's side, responses of one fixed length, and take turns step by step; each repetition is
in processes of its own. First float32 against float32, then each side in the precision in which it
is fastest (tried in this run). Then the loss alone (`kernel`), and what a step needs at the least
(`limits`).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kernel
import limits
import page
from sides import Side, join_rows, measure_limits
from transformers import AutoTokenizer
from workload import Workload, make_context, read_prompts

from opcd.weights import locate

ROOT = Path(__file__).parents[1]
CONTEXTS = (0, 250, 1000, 4000)
QUICK = (0, 1000)
ROWS, NEW_TOKENS = 8, 32
VARIANTS = {"opcd": ("float32", "bfloat16"), "sdft": ("float32", "mixed", "bfloat16")}
TRIAL_CONTEXT, TRIAL_STEPS = 1000, 2
"""Where each side's fastest precision is found, in turns."""
WARM_STEPS = 1
LONG = 4000
"""From this context on there are two repetitions: SDFT takes minutes for one."""


class Bench:
    """One run of the comparison."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Find the model and what both sides are given."""
        self.model = locate(arguments.model)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
        self.pythons = {"opcd": sys.executable, "sdft": str(arguments.trl_python)}
        self.repetitions: int = arguments.repetitions

    def side(self, name: str, variant: str, context_tokens: int) -> Side:
        """A side that is ready."""
        context = make_context(self.tokenizer, context_tokens)
        load = Workload(self.model, variant, context, read_prompts(ROWS), NEW_TOKENS)
        return Side(f"side_{name}.py", self.pythons[name], load).start()

    def fastest(self, name: str) -> tuple[str, dict[str, float]]:
        """In which precision a side is fastest, and the seconds of a step in each."""
        sides = {v: self.side(name, v, TRIAL_CONTEXT) for v in VARIANTS[name]}
        for step in range(WARM_STEPS + TRIAL_STEPS):
            for side in sides.values():
                side.step(counts=step >= WARM_STEPS)
        found = {}
        for variant, side in sides.items():
            side.stop()
            found[variant] = statistics.median(step["wall_s"] for step in side.steps)
            say(f"{name} {variant}: {found[variant]:.2f} s a step")
        return min(found, key=lambda variant: found[variant]), found

    def turns(self, variants: dict[str, str], context_tokens: int) -> list[dict[str, Any]]:
        """Both sides' steps in one setting, one after the other.

        A process's memory hangs on how its allocator happened to go, so that a second step of the
        same process tells nothing about it.
        """
        repetitions = 2 if context_tokens >= LONG else self.repetitions
        started = [self.repeat(variants, context_tokens, number) for number in range(repetitions)]
        rows = [join_rows(side, context_tokens) for side in zip(*started, strict=True)]
        for row in rows:
            tell(row)
        return rows

    def repeat(self, variants: dict[str, str], context_tokens: int, number: int) -> list[Side]:
        """One step of each side that counts, in new processes; each goes first every other time."""
        sides = [self.side(name, variant, context_tokens) for name, variant in variants.items()]
        check_alike(sides)
        for turn in range(WARM_STEPS + 1):
            for side in sides if (number + turn) % 2 else reversed(sides):
                side.step(counts=turn >= WARM_STEPS)
        for side in sides:
            side.stop()
        return sides


def check_alike(sides: Sequence[Side]) -> None:
    """Refuse to compare sides that do not read the same.

    Raises:
        SystemExit: their prompts have different lengths.
    """
    names = ("student_prompt_tokens", "teacher_prompt_tokens")
    counts = [tuple(side.about[name] for name in names) for side in sides]
    if len(set(counts)) > 1:
        raise SystemExit(f"the sides' prompts have {counts} tokens; they must be the same")


def tell(row: dict[str, Any]) -> None:
    """One side's seconds and memory in one setting."""
    walls = ", ".join(f"{step['wall_s']:.2f}" for step in row["steps"])
    peaks = ", ".join(f"{step['peak_bytes'] / 2**30:.2f}" for step in row["steps"])
    name = f"{row['context_tokens']:5,} tokens, {row['side']} {row['variant']}"
    say(f"{name}: {walls} s; {peaks} GiB")


def say(text: str) -> None:
    """Tell how far the run is."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def describe() -> dict[str, Any]:
    """Machine and versions."""
    names = ("torch", "transformers", "peft")
    return {
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {**{name: version(name) for name in names}, "trl": "1.16.0"},
    }


def processor() -> str:
    """The name and the number of this machine's processors, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    started = time.perf_counter()
    bench = Bench(arguments)
    say("what a plain product reaches")
    matmul = measure_limits(sys.executable)
    say("each side's fastest precision")
    trials = {name: bench.fastest(name) for name in ("opcd", "sdft")}
    best = {name: variant for name, (variant, _) in trials.items()}
    pairings = {"float32": dict.fromkeys(best, "float32"), "best": best}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in pairings}
    for context_tokens in arguments.contexts:
        for name, variants in pairings.items():
            rows[name] += bench.turns(variants, context_tokens)
    loss: list[dict[str, Any]] = []
    if not arguments.without_kernel:
        say("the loss alone")
        loss = kernel.measure_all(str(arguments.trl_python))
    return {
        **describe(),
        "model": arguments.model,
        "shape": json.loads((Path(bench.model) / "config.json").read_text()),
        "rows": ROWS,
        "new_tokens": NEW_TOKENS,
        "rank": Workload.rank,
        "matmul_flops_per_s": matmul,
        "matmul_side": limits.SIDE,
        "trials": {name: seconds for name, (_, seconds) in trials.items()},
        "best": best,
        "settings": rows,
        "kernel": loss,
        "kernel_tokens": kernel.TOKENS,
        "run_s": time.perf_counter() - started,
    }


def main() -> None:
    """Measure, keep the results, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--without-kernel", action="store_true")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/sdft.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md")
    parser.add_argument("--draw", action="store_true", help="the page from results that are there")
    arguments = parser.parse_args()
    arguments.contexts = arguments.contexts or (QUICK if arguments.quick else CONTEXTS)
    if arguments.quick:
        arguments.repetitions = 2
    if not arguments.draw:
        found = run(arguments)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page.write(arguments.page, json.loads(arguments.results.read_text(encoding="utf-8")))
    say(f"{arguments.results} and {arguments.page} are written")


if __name__ == "__main__":
    main()
