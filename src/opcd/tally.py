"""Sums and seconds of one step, over all portions and processes."""

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object


class Tally:
    """Collects what a step counts and how long its parts take."""

    def __init__(self) -> None:
        """Start from nothing."""
        self.sums: dict[str, float] = {}
        self.seconds: dict[str, float] = dict.fromkeys(
            ("wall_s", "rollout_s", "teacher_s", "train_s"), 0.0
        )
        self.peak_bytes = 0
        """The most memory that a process has held, when the sums were last gathered."""
        self._gathered: set[str] = set()

    def add(self, name: str, value: float) -> None:
        """Add to a sum."""
        self.sums[name] = self.sums.get(name, 0.0) + value

    def mean(self, name: str, count: str) -> float:
        """One sum over another; 0 where nothing was counted."""
        return self.sums.get(name, 0.0) / (self.sums.get(count, 0.0) or 1.0)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent within."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def gather(self, accelerator: Any) -> None:
        """Turn the sums that are still this process's own into sums over all processes."""
        # A process that had no anchor, say, has counted nothing of the kind.
        known = set(self.sums)
        if accelerator.num_processes > 1:
            known = set(gather_object(sorted(self.sums)))
        names = sorted(known - self._gathered)
        own = torch.tensor([self.sums.get(n, 0.0) for n in names], device=accelerator.device)
        self.sums |= zip(names, accelerator.reduce(own, "sum").tolist(), strict=True)
        self._gathered |= set(names)
        self.peak_bytes = peak_bytes()
        if accelerator.num_processes > 1:
            self.peak_bytes = max(gather_object([self.peak_bytes]))


def release_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc does).

    Steps have tensors of other sizes, so what is kept is seldom reused.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes() -> int:
    """The most memory this process has held: resident on the CPU, allocated on a GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
