"""Processes that train, one for each side, driven in turns."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workload import Workload, parse_answer

HERE = Path(__file__).parent


@dataclass
class Side:
    """One trainer in a process of its own."""

    script: str
    python: str
    load: Workload
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="opcd-bench-")))
    process: Any = None
    about: Mapping[str, Any] = field(default_factory=dict)
    """What it told when it was ready."""
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    end: Mapping[str, Any] = field(default_factory=dict)
    """What it told at the end."""

    def start(self) -> "Side":
        """Load everything; the process then waits."""
        (self.folder / "workload.json").write_text(self.load.dump())
        quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        # Of this checkout for opcd; nothing of it where TRL is.
        source = str(HERE.parent / "src") if self.script == "side_opcd.py" else ""
        environment = {**os.environ, **quiet, "PYTHONPATH": source}
        self.process = subprocess.Popen(
            [self.python, str(HERE / self.script), str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "stderr.txt").open("w"),
            text=True,
            env=environment,
        )
        self.about = self._hear()
        return self

    def step(self, counts: bool = True) -> None:
        """One training step; the first ones of a process do not count."""
        self._say("step")
        found = self._hear()
        if counts:
            self.steps.append(found)

    def stop(self) -> None:
        """Let it end, and hear its last word."""
        self._say("end")
        self.end = self._hear()
        self.process.wait()

    def _say(self, word: str) -> None:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def _hear(self) -> Mapping[str, Any]:
        for line in self.process.stdout:
            if (found := parse_answer(line)) is not None:
                return found
        last = (self.folder / "stderr.txt").read_text().strip()[-2000:]
        raise SystemExit(f"{self.script} ended in the middle of its work:\n{last}")


def join_rows(sides: Sequence[Side], context_tokens: int) -> dict[str, Any]:
    """All that one side's processes measured in one setting, for the results file."""
    first = sides[0]
    return {
        "side": first.script.removeprefix("side_").removesuffix(".py"),
        "variant": first.load.variant,
        "context_tokens": context_tokens,
        "about": first.about,
        "steps": [step for side in sides for step in side.steps],
        "ends": [side.end for side in sides],
    }


def measure_limits(python: str) -> dict[str, float]:
    """`limits.measure_matmul` in a process of its own."""
    command = [python, str(HERE / "limits.py")]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])
