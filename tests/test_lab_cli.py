"""The lab's verbs: what is asked wrong is refused before any training; findings are written."""

import sys
from pathlib import Path

import pytest

from opcd import cli, lab_cli
from opcd.lab import building, minds, running
from opcd.lab.claims import Finding, Setup


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(lab_cli, "console", lab_cli.Console(width=200))
    monkeypatch.setattr(sys, "argv", ["opcd", "lab", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
        raise SystemExit(0)
    return done.value.code if isinstance(done.value.code, int) else 0


def test_an_unknown_claim_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "claims", "--only", "gains,luck") == 2
    told = capsys.readouterr().err
    assert "luck" in told
    assert all(name in told.replace("\n", " ") for name in running.CLAIMS)
    assert not list(tmp_path.iterdir())


def test_claims_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def found(setup: Setup, names: object, *_: object) -> dict[str, Finding]:
        asked.append((setup.folder, setup.seeds, setup.pace, names))
        return {"gains": Finding("A claim", "lake", [], [])}

    monkeypatch.setattr(running, "run_claims", found)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "claims", "--only", "gains", "--quick", "--out", "pages") == 0
    assert asked == [(Path("runs/lab"), (0,), lab_cli.QUICK_PACE, ("gains",))]
    assert "gains: undecided" in capsys.readouterr().out
    text = (tmp_path / "pages" / "claims.md").read_text(encoding="utf-8")
    assert "1 world" in text and "40 % of the steps" in text


def test_minds_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {name: tmp_path / name for name in minds.MINDS}
    monkeypatch.setattr(building, "build_minds", lambda processes, say: folders)
    assert run(monkeypatch, "build") == 0
    told = capsys.readouterr().out
    assert all(f"{name}: {tmp_path / name}" in told for name in minds.MINDS)
