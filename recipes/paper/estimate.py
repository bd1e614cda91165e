"""What the runs of this folder need, from their TOML files alone; nothing here was measured.

Memory is the arithmetic of `opcd check RUN.toml --memory`.
Time, of `opcd compare` or of a round of `opcd experience`, is an estimate: floating-point
operations over `--tflops`, and for each decoded token the bytes that have to be read over
`--read-tb-s` plus a millisecond a layer for transformers' own loop. Every response is taken to be
as long as it may be, so that times are upper bounds.

Usage: ``python estimate.py RUN.toml [key.path=value ...] [--tflops 400] [--read-tb-s 2.4]``
"""

import argparse
import math
from dataclasses import dataclass

from opcd.config import Run, load_config
from opcd.memory import SHAPES, Layout, parts_of, peak_bytes

TASK_TOKENS = {"tasks": 250, "game": 600}
"""A student's prompt: a question, or the history of a game."""
CONDITIONS = 6
"""Times that the test rows are answered: three conditions of each of two runs."""


@dataclass(frozen=True)
class Speed:
    """What a GPU does, as far as an estimate needs it."""

    flops: float
    read_bytes_per_s: float


def memory_gb(run: Run) -> dict[str, float]:
    """Gigabytes by what they hold, on one GPU; `peak` is what is there at one time."""
    parts = parts_of(run, Layout(prompt_tokens=reach(run) - run.rollout.max_new_tokens))
    found = {part.name: part.bytes / 1e9 for part in parts}
    return found | {"peak": peak_bytes(parts) / 1e9}


def reach(run: Run) -> int:
    """The longest sequence of the student's: its prompt and its response."""
    return TASK_TOKENS["game" if run.game else "tasks"] + run.rollout.max_new_tokens


def rows_of(run: Run) -> int:
    """Prompts that are answered together in one step."""
    return run.batch.prompts_per_step


def decode_s(run: Run, rows: int, speed: Speed, turns: int, most: int | None = None) -> float:
    """Seconds to answer so many prompts, batch by batch, each turn after the other."""
    shape, most = SHAPES[run.model.path], most or run.rollout.max_new_tokens
    batch = min(rows, run.rollout.batch_rows)
    read = 2 * shape.parameters + batch * reach(run) / 2 * 2 * shape.kv_elements
    token_s = read / speed.read_bytes_per_s + 1e-3 * shape.layers
    return math.ceil(rows / batch) * most * turns * token_s


def hours(run: Run, speed: Speed) -> dict[str, float]:
    """Hours of each part, every response as long as it may be."""
    student = SHAPES[run.model.path].parameters
    other = getattr(run.teacher, "path", None)
    teacher = SHAPES[other].parameters if other else student
    turns = run.game.turns if run.game else 1
    # Prompts that were saved are answered once each, without the game.
    asked = 1 if run.experience and run.experience.train_on == "store" else turns
    tokens = rows_of(run) * asked * reach(run)
    # Forward and backward, the forward pass again for checkpointed layers, and the teacher's.
    passes_s = tokens * (8 * student + 2 * teacher) / speed.flops
    validations = math.ceil(run.steps / run.evaluation.every_steps)
    found = {
        "baked: training": run.steps * (decode_s(run, rows_of(run), speed, asked) + passes_s),
        "baked: validation": validations * decode_s(run, chosen_on(run), speed, turns),
    }
    found |= {name.replace("baked", "off_policy"): seconds for name, seconds in found.items()}
    found["test"] = CONDITIONS * decode_s(run, tested_on(run), speed, turns)
    if table := run.experience:
        traces = table.seeds * table.steps
        found["solving"] = decode_s(run, traces, speed, turns)
        # One that sees the items so far waits for them; its seeds go beside each other.
        calls, together = (table.steps, table.seeds) if table.with_previous else (1, traces)
        most = table.max_new_tokens
        found["extraction"] = calls * decode_s(run, together, speed, 1, most)
        if table.use == "selected":
            scored = table.seeds * math.ceil(table.steps / table.score_every) + 1
            rows = table.select_rows or chosen_on(run)
            found["selection"] = decode_s(run, scored * rows, speed, turns)
    return {name: seconds / 3600 for name, seconds in found.items()}


def chosen_on(run: Run) -> int:
    """Rows or games of one validation."""
    most = run.game.boards.validation * run.game.episodes if run.game else 1000
    return min(run.evaluation.validation_rows or most, most)


def tested_on(run: Run) -> int:
    """Rows or games of the test."""
    if run.game:
        return run.game.boards.test * run.game.episodes
    return run.evaluation.test_rows or 1000


def main() -> None:
    """Print both for one run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--tflops", type=float, default=400.0)
    parser.add_argument("--read-tb-s", type=float, default=2.4)
    given = parser.parse_args()
    run = load_config(given.run, given.overrides)
    speed = Speed(given.tflops * 1e12, given.read_tb_s * 1e12)
    for title, unit, parts in (
        ("memory", "GB", memory_gb(run)),
        ("time, estimated", "h", hours(run, speed)),
    ):
        print(f"{run.name}, {title}:")
        for name, value in parts.items():
            print(f"  {value:8.1f} {unit}  {name}")
    print(f"  {sum(hours(run, speed).values()):8.1f} h  together")


if __name__ == "__main__":
    main()
