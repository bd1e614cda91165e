"""All claims of the lab in one go: trials side by side in several processes, then the verdicts."""

from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import replace

import torch

from opcd.errors import ConfigError
from opcd.lab import claims, learning
from opcd.lab.building import build_minds, make_pool
from opcd.lab.setups import Finding, Say, Setup

CLAIMS: dict[str, Callable[[Setup], Finding]] = {
    "gains": claims.gains,
    "factorial": claims.factorial,
    "teachers": claims.teachers,
    "extraction": learning.extraction,
    "growth": learning.growth,
    "sizes": claims.sizes,
    "forgetting": claims.forgetting,
    "supports": claims.supports,
    "rounds": learning.rounds,
    "returning": claims.returning,
}
TOGETHER = (
    ("gains",),
    ("extraction", "growth", "rounds"),
    ("supports", "returning"),
    ("factorial", "teachers"),
    ("forgetting",),
    ("sizes",),
)
"""Claims that share trials are tried by one process, the longest first; `sizes` at the end, when
`gains` is done with, for it needs some of the same students."""


def read_claims(names: str) -> tuple[str, ...]:
    """Claims by their names, with commas between; all of them where nothing is written.

    Raises:
        ConfigError: there is no claim of a name.
    """
    asked = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in asked:
        if name not in CLAIMS:
            raise ConfigError(f"--only {name!r} is no claim of the lab; write {', '.join(CLAIMS)}")
    return asked or tuple(CLAIMS)


def run_claims(setup: Setup, names: Sequence[str], processes: int, say: Say) -> dict[str, Finding]:
    """Try claims in worlds of every seed; what was tried before is not tried again.

    Args:
        setup: where worlds and trials are kept, which worlds, and how long training takes.
        names: of the claims.
        processes: that try at the same time, with one thread each.
        say: is told what is going on.
    """
    build_minds(processes, say)
    groups = [tuple(n for n in group if n in names) for group in TOGETHER]
    jobs = [
        (group, replace(setup, seeds=(seed,))) for group in groups if group for seed in setup.seeds
    ]
    with make_pool(processes) as pool:
        waiting = {pool.submit(_try, *job): job for job in jobs}
        for number, done in enumerate(as_completed(waiting), start=1):
            group, own = waiting[done]
            done.result()
            say(f"{number} of {len(jobs)}: {', '.join(group)}, seed {own.seeds[0]}")
    return {name: CLAIMS[name](setup) for name in names}


def _try(names: Sequence[str], setup: Setup) -> None:
    torch.set_num_threads(1)
    for name in names:
        CLAIMS[name](setup)
