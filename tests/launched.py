"""What each process of a launched test does: the runs of a plan, one after the other.

Usage, in an environment as torchrun makes it: ``python launched.py PLAN.json``
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opcd import training
from opcd.assembly import Parts
from opcd.config import load_config
from opcd.distill import StepReport, Trainer
from opcd.errors import OpcdError

TOLD = {
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "ddp": {},
}
"""How accelerate's launcher says how weights are cut."""
REAL = training.distill


def signalled(entry: dict[str, Any]) -> Any:
    """The loop, in which one process is sent a signal when a step is nearly done."""

    def watched(parts: Parts, trainer: Trainer) -> Iterator[StepReport]:
        for report in REAL(parts, trainer):
            last = entry.get("signal") and report.metrics["step"] == entry["step"]
            if last and parts.accelerator.process_index == 1:
                os.kill(os.getpid(), getattr(signal, entry["signal"]))
            yield report

    return watched


def outcome_of(entry: dict[str, Any]) -> dict[str, Any]:
    """How one run of the plan ended, in this process."""
    for told in TOLD.values():
        for name in told:
            os.environ.pop(name, None)
    os.environ.update(TOLD[entry["cut"]])
    run = load_config(Path(entry["config"]))
    training.distill = signalled(entry)
    try:
        found = training.train(run, resume=entry["resume"])
    except OpcdError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"steps": found.steps, "interrupted_by": found.interrupted_by}


def main() -> None:
    """Train every run of the plan; what came of it is written after each."""
    torch.set_num_threads(1)
    plan, found = Path(sys.argv[1]), []
    for entry in json.loads(plan.read_text(encoding="utf-8")):
        found.append(outcome_of(entry))
        ends = plan.with_name(f"ends-{os.environ['RANK']}.json")
        ends.write_text(json.dumps(found), encoding="utf-8")
    if found[-1].get("error", "").startswith("LaunchError"):
        os._exit(0)  # as the command line ends: broken connections may abort a process at its end


if __name__ == "__main__":
    main()
