"""Claims about experience: worlds that learned nothing are said to be left out, none is lost."""

from pathlib import Path
from typing import Any

import pytest

from opcd.lab import learning, verdicts
from opcd.lab.learning import CONDITIONS, ROUNDS, TRACES, experience_run
from opcd.lab.setups import Setup
from opcd.lab.worlds import make_world

BETTER = {"base": 0.1, "raw_traces": 0.2, "items": 0.6, "off_policy": 0.6, "baked": 0.7}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The differences here are far from 0: coarse intervals will do."""
    monkeypatch.setattr(verdicts, "DRAWS", 100)


def marks(share: float) -> list[float]:
    return [float(row < share * 60) for row in range(60)]


def round_of(**shares: float) -> dict[str, list[float]]:
    return {name: marks(share) for name, share in shares.items()}


def candidates(scores: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "step": step, "items": step, "score": {"mean": score}}
        for seed in range(3)
        for step, score in scores.items()
    ]


GROWING = candidates({10: 0.9, 0: 0.1, 5: 0.4, 1: 0.2})


def setup_with(
    patch: pytest.MonkeyPatch, folder: Path, rounds: list[learning.Rounds], scored: Any = GROWING
) -> Setup:
    """Worlds in which these rounds were found, one for each."""
    monkey: Any = lambda _, world: (rounds[world.seed], scored)  # noqa: E731 - a stand-in
    patch.setattr(learning, "rounds_of", monkey)
    return Setup(folder, tuple(range(len(rounds))))


def test_extraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_with(monkeypatch, tmp_path, [[round_of(**BETTER)]] * 3)
    found = learning.extraction(setup)
    assert found.verdict == "holds"
    assert [line.condition for line in found.lines] == list(CONDITIONS)
    shown = {line.condition: line.figures["right"].mean for line in found.lines}
    assert shown == pytest.approx(BETTER)
    worse = BETTER | {"raw_traces": 0.9}
    setup = setup_with(monkeypatch, tmp_path, [[round_of(**worse)]] * 3)
    assert learning.extraction(setup).verdict == "does not hold"


def test_growth_compares_half_of_the_traces_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_with(monkeypatch, tmp_path, [[]] * 3)
    found = learning.growth(setup)
    assert found.verdict == "holds"
    assert [line.figures["right"].mean for line in found.lines] == pytest.approx([0.4, 0.9])
    assert len(found.curves) == 9
    assert found.curves["0.0"] == [(0.0, 0.1), (1.0, 0.2), (5.0, 0.4), (10.0, 0.9)]
    falling = candidates({0: 0.1, 5: 0.9, 10: 0.4})
    setup = setup_with(monkeypatch, tmp_path, [[]] * 3, falling)
    assert learning.growth(setup).verdict == "does not hold"


def test_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round is compared with the one before it; the first with the model before any."""
    rising = [round_of(**(BETTER | {"baked": share})) for share in (0.4, 0.7, 1.0)]
    found = learning.rounds(setup_with(monkeypatch, tmp_path, [rising] * 3))
    assert found.verdict == "holds"
    means = [line.figures["right"].mean for line in found.lines]
    assert means == pytest.approx([0.1, 0.4, 0.7, 1.0])
    falling = [*rising[:2], round_of(**(BETTER | {"baked": 0.5}))]
    found = learning.rounds(setup_with(monkeypatch, tmp_path, [falling] * 3))
    assert [c.verdict for c in found.comparisons] == ["holds", "holds", "does not hold"]


def test_a_round_that_learns_nothing_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = learning.rounds(setup_with(monkeypatch, tmp_path, [[round_of(**BETTER)]] * 3))
    means = [line.figures["right"].mean for line in found.lines]
    assert means == pytest.approx([0.1, 0.7, 0.7, 0.7]) and len(means) == ROUNDS + 1
    assert found.verdict == "undecided"


@pytest.mark.parametrize("name", ["extraction", "rounds"])
def test_worlds_that_learned_nothing_are_counted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And if there is no other, nothing is decided."""
    claim = getattr(learning, name)
    some = claim(setup_with(monkeypatch, tmp_path, [[round_of(**BETTER)], []]))
    assert some.lines[0].figures["right"].n == 60
    assert any("1 worlds are left out" in note for note in some.notes)
    none = claim(setup_with(monkeypatch, tmp_path, [[], []]))
    assert (list(none.lines), list(none.comparisons), none.verdict) == ([], [], "undecided")
    assert any("2 worlds are left out" in note for note in none.notes)


def test_the_run_is_not_told_what_it_has_to_find_out(tmp_path: Path, reading: Path) -> None:
    world = make_world("code_book", 0, tmp_path)
    run = experience_run(world)
    assert run.experience is not None and run.experience.steps == TRACES
    assert str(world.context) not in run.model_dump_json()
    # A round that forgets how to read leaves nothing to the next one.
    assert run.anchors_per_step > 0
    # Fewer traces than keys, or a second round had nothing to add.
    assert len(world.facts) > TRACES
