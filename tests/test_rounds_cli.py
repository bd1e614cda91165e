"""The whole of learning from experience on the command line: one command, one readable table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from learners import FEW, Learner, experience_run, game_learner
from opcd import assembly, cli, experience_cli
from opcd.config import Run
from opcd.errors import RunFolderError
from opcd.runs import RunFolder, round_folder

Opcd = Callable[..., Result]


@pytest.fixture
def opcd(monkeypatch: pytest.MonkeyPatch) -> Opcd:
    """The command at 80 columns, its base model scripted to learn."""
    monkeypatch.setattr(assembly, "HFEngine", Learner)

    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(experience_cli, "console", experience_cli.Console(width=80))
        return CliRunner().invoke(cli.app, [*map(str, arguments)], catch_exceptions=False)

    return run


def test_two_rounds_of_single_answers(
    opcd: Opcd, undisturbed: tuple[Run, dict[str, Any], list[str]]
) -> None:
    """What is there already is shown, not made again; every stage of any round is a verb."""
    run, found, _ = undisturbed
    toml = run.out.parent / "recipe" / "run.toml"
    done = opcd("experience", toml, f"out={run.out}", *FEW, "--rounds", "2")
    assert done.exit_code == 0 and "training" not in done.stdout
    assert json.loads(RunFolder(run.out / run.name).experience.read_text("utf-8")) == found
    table = [line for line in done.stdout.splitlines() if line.startswith("│")]
    names = [line.split("│")[2].strip() for line in table]
    assert names == 2 * ["base", "raw_traces", "items", "off_policy", "baked"]
    assert all(len(line) <= 80 for line in table)
    said = " ".join(done.stdout.split())
    assert "they start again" in said and "round 2 against round 1" in said
    for verb in ("solve", "extract", "accumulate", "select", "consolidate"):
        done = opcd(verb, toml, f"out={run.out}", *FEW, "--round", "2")
        said = "".join(done.stdout.split())
        assert done.exit_code == 0 and "training" not in said
        assert "round2needsproblems4to6" in said, f"{verb} is not of round 2"
        assert verb in ("extract", "consolidate") or "/round-2" in said
    table = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert [cells[1].strip() for cells in table] == ["2", "", "", "", ""]


def test_a_round_is_not_begun_before_the_one_before_it(
    opcd: Opcd, learner_path: Path, tmp_path: Path
) -> None:
    run = experience_run(tmp_path, learner_path)
    toml = tmp_path / "recipe" / "run.toml"
    with pytest.raises(RunFolderError, match="finish round 1 first"):
        opcd("solve", toml, f"out={run.out}", "--round", "2")


def test_a_game_is_selected_then_consolidated(
    opcd: Opcd, player_path: Path, tmp_path: Path
) -> None:
    """A lake is crossed with a lesson and never without: the shortest experience is chosen."""
    run = game_learner(tmp_path, player_path)
    toml, few = tmp_path / "recipe" / "run.toml", [f"out={run.out}", "steps=1"]
    few += ["rollout.max_new_tokens=12", "evaluation.every_steps=1", "evaluation.suites=[]"]
    done = opcd("select", toml, *few)
    assert done.exit_code == 0
    assert "100.0 % *" in done.stdout and "1 item," in done.stdout
    assert (round_folder(run).growth).is_file()
    done = opcd("consolidate", toml, *few)
    assert done.exit_code == 0
    (row,) = [line for line in done.stdout.splitlines() if "items" in line and "│" in line]
    assert "100.0 %" in row
    found = json.loads(round_folder(run).consolidation.read_text("utf-8"))
    assert found["conditions"]["base"]["correct"]["mean"] == 0.0
    assert {"turns", "invalid_moves"} <= found["conditions"]["baked"].keys()
