"""What each process of a launched test does: the runs of a plan, one after the other.

Usage: ``torchrun --nproc-per-node 2 launched.py PLAN.json``
"""

import json
import os
import sys
from pathlib import Path

import torch

from opcd.config import load_config
from opcd.training import train

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def main() -> None:
    """Train every run of the plan."""
    torch.set_num_threads(1)
    for entry in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        for name in FSDP:
            os.environ.pop(name, None)
        os.environ.update(FSDP if entry.get("fsdp") else {})
        train(load_config(entry["config"]), resume=entry.get("resume", False))


if __name__ == "__main__":
    main()
