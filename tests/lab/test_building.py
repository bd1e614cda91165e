"""The models of the lab side by side: each once, and the last one on all cores."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from opcd.lab import building
from opcd.lab.building import build_minds
from opcd.lab.minds import MINDS, Mind


def side_by_side(processes: int, context: object) -> ThreadPoolExecutor:
    del context
    return ThreadPoolExecutor(processes)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads torch was told to use, each time."""
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(building, "ProcessPoolExecutor", side_by_side)
    return told


def test_every_mind_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: list[int]
) -> None:
    """Those that are in the cache cost nothing, and nothing is said of them."""
    monkeypatch.setattr(building, "mind_folder", lambda mind, say: tmp_path / mind.name)
    said: list[object] = []
    assert build_minds(2, said.append) == {name: tmp_path / name for name in MINDS}
    assert said == [] and threads == [1, 1, 1]


def test_the_last_mind_gets_the_others_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: list[int]
) -> None:
    """And no other one does: more threads than cores are slower than one."""
    done: list[str] = []

    def train(mind: Mind, say: Callable[[str], object]) -> Path:
        say("step 25")
        if mind.name == "large":
            waited = time.monotonic() + 20
            while 2 not in threads and time.monotonic() < waited:
                say("step 50")
            assert sorted(done) == ["middle", "small"]
        done.append(mind.name)
        return tmp_path

    monkeypatch.setattr(building, "mind_folder", train)
    build_minds(2, str)
    assert threads[:3] == [1, 1, 1] and set(threads[3:]) == {2}
