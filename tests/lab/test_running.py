"""Claims in one go: all of them in groups, each once, and names that are none are refused."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opcd.errors import ConfigError
from opcd.lab import running
from opcd.lab.running import CLAIMS, TOGETHER, read_claims, run_claims
from opcd.lab.setups import Finding, Setup


def test_every_claim_is_in_one_group() -> None:
    """A claim in none would be tried at the end, by one process."""
    grouped = [name for group in TOGETHER for name in group]
    assert sorted(grouped) == sorted(CLAIMS)


def test_claims_by_name() -> None:
    assert read_claims("") == read_claims(" , ") == tuple(CLAIMS)
    assert read_claims("rounds, gains") == ("rounds", "gains")
    with pytest.raises(ConfigError, match=r"'gain' is no claim.*gains, factorial"):
        read_claims("rounds,gain")


def test_claims_are_tried_for_each_seed_and_then_decided_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def claim(name: str) -> Any:
        def find(setup: Setup) -> Finding:
            asked.append((name, setup.seeds))
            return Finding(name, "code_book", [], [])

        return find

    for name in ("gains", "rounds", "growth"):
        monkeypatch.setitem(CLAIMS, name, claim(name))
    monkeypatch.setattr(running, "build_minds", lambda *_: {})
    monkeypatch.setattr(running, "make_pool", ThreadPoolExecutor)
    said: list[object] = []
    names = ("rounds", "gains", "growth")
    found = run_claims(Setup(tmp_path, (0, 1)), names, 1, said.append)
    assert tuple(found) == names
    each = [(name, (seed,)) for name in ("growth", "rounds") for seed in (0, 1)]
    assert sorted(asked[:-3]) == sorted([*each, ("gains", (0,)), ("gains", (1,))])
    assert asked[-3:] == [(name, (0, 1)) for name in names]
    assert [str(text)[:6] for text in said] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
