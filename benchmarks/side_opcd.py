"""One side of the comparison: opcd's own step, driven over standard input (see `workload`).

    python benchmarks/side_opcd.py FOLDER < commands

A real configuration, exact reverse KL over the whole vocabulary, the base model as teacher with
its context read once.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import workload

from opcd.assembly import Parts, assemble
from opcd.config import load_config
from opcd.distill import distill
from opcd.openings import Openings
from opcd.rendering import common_prefix
from opcd.rollouts.hf import HFEngine
from opcd.tally import peak_bytes
from opcd.teachers import LocalTeacher
from opcd.training import prepare
from opcd.weights import flushed_denormals

PORTION_ROWS = {"float32": 4, "mixed": 4, "bfloat16": 8}
"""Rows in one forward and backward pass, of whose activations the memory is, by precision."""
STEPS = 100_000
"""More than will be asked for, so that the schedule does not end."""


def write_run(folder: Path, load: workload.Workload) -> Path:
    """The run's TOML and its rows."""
    rows = [{"id": str(i), "prompt": prompt} for i, prompt in enumerate(load.prompts)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "context.txt").write_text(load.context or "Without one, see `assemble_parts`.")
    template = load.template.replace("{context}", "{document}")
    (folder / "run.toml").write_text(
        f"""name = "side"
steps = {STEPS}
[model]
path = {json.dumps(load.model)}
dtype = "{load.variant}"
device = "cpu"
tuning = {{ type = "lora", rank = {load.rank}, alpha = {load.rank * 2} }}
[context]
type = "document"
path = "context.txt"
placement = "user"
template = {json.dumps(template)}
[tasks]
train = "train.jsonl"
[rollout]
max_new_tokens = {load.new_tokens}
[loss]
chunk_tokens = 32
[optimizer]
lr = {load.lr}
schedule = "constant"
warmup_steps = 0
[batch]
prompts_per_step = {len(load.prompts)}
rows_per_forward = {PORTION_ROWS[load.variant]}
[anchor]
share = 0.0
"""
    )
    return folder / "run.toml"


def assemble_parts(folder: Path, load: workload.Workload) -> Parts:
    """The parts of the run; no token ends a response."""
    parts = assemble(load_config(write_run(folder, load)))
    rows = parts.config.rollout.batch_rows
    parts.engine = HFEngine(parts.student, parts.base.model, parts.dtype, frozenset(), rows)
    if not load.context:
        parts.items["train"] = [
            replace(item, pair=replace(item.pair, teacher_ids=item.pair.student_ids))
            for item in parts.items["train"]
        ]
        teacher_of(parts).openings = Openings()
    return parts


def teacher_of(parts: Parts) -> LocalTeacher:
    """The teacher, which is no server's."""
    assert isinstance(parts.teacher, LocalTeacher), "it is on a server"
    return parts.teacher


def count_tokens(parts: Parts) -> dict[str, int]:
    """How many tokens the prompts of a step have."""
    pairs = [item.pair for item in parts.items["train"]]
    return {
        "student_prompt_tokens": sum(len(pair.student_ids) for pair in pairs),
        "teacher_prompt_tokens": sum(len(pair.teacher_ids) for pair in pairs),
        "student_shared_tokens": common_prefix([pair.student_ids for pair in pairs]),
        "teacher_shared_tokens": common_prefix([pair.teacher_ids for pair in pairs]),
    }


def read_context(parts: Parts) -> float:
    """Seconds to read the context once and to check it, as a run does before its first step."""
    teacher = teacher_of(parts)
    teacher.prefixes.clear()
    known = next(iter(teacher.openings.known))
    prompts = [item.pair.teacher_ids for item in parts.items["train"]]
    probe = next(ids for ids in prompts if ids[: len(known)] == known)
    started = time.perf_counter()
    teacher.share(teacher.openings, probe)
    return time.perf_counter() - started


def main() -> None:
    """Build the run, then do a step for each line of input."""
    folder = Path(sys.argv[1])
    load = workload.Workload.load((folder / "workload.json").read_text())
    parts = assemble_parts(folder, load)
    reports = distill(parts, prepare(parts))
    workload.answer(**count_tokens(parts))
    with flushed_denormals():
        while workload.wait_for_step():
            row: dict[str, Any] = next(reports).metrics
            names = ("wall_s", "rollout_s", "teacher_s", "train_s", "response_tokens")
            found = {name: row[name] for name in names}
            workload.answer(**found, kl_nats=row["kl_nats_per_token"], peak_bytes=peak_bytes())
        workload.answer(read_context_s=read_context(parts) if load.context else 0.0)


if __name__ == "__main__":
    main()
