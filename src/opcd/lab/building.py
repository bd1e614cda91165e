"""The models of the lab, trained side by side; those that are in the cache cost nothing."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from threading import Event

import torch

from opcd.lab.minds import MINDS, mind_folder

Say = Callable[[str], object]

SPAWN = multiprocessing.get_context("spawn")
"""Forked processes would share torch's threads, which do not survive it."""


def build_minds(processes: int, say: Say) -> dict[str, Path]:
    """The folder of each mind; those that are not in the cache are trained.

    One thread each is the quickest way to train several; the last one gets the others' cores too.

    Args:
        processes: that train at the same time.
        say: is told how long each mind took.
    """
    found: dict[str, tuple[Path, float]] = {}
    with SPAWN.Manager() as manager, make_pool(processes) as pool:
        is_last = manager.Event()
        waiting = {pool.submit(_build, name, is_last, processes): name for name in MINDS}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            if len(found) == len(MINDS) - 1:
                is_last.set()
    for name, (_, wall_s) in found.items():
        if wall_s >= 1:
            say(f"the {name} model of the lab was trained from scratch in {wall_s:.0f} s")
    return {name: found[name][0] for name in MINDS}


def make_pool(processes: int) -> ProcessPoolExecutor:
    """So many processes to train in."""
    return ProcessPoolExecutor(processes, SPAWN)


def _build(name: str, is_last: Event, threads: int) -> tuple[Path, float]:
    torch.set_num_threads(1)
    started = time.monotonic()

    def spread(_: str) -> None:
        if is_last.is_set():
            torch.set_num_threads(threads)

    return mind_folder(MINDS[name], spread), time.monotonic() - started
