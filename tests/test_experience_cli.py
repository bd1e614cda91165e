"""The verbs of experience: each runs what is missing before it, and prints one table."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from learning import load_learner, script_of, write_learner
from opcd import cli, experience_cli, gathering
from opcd.rollouts.scripted import ScriptedEngine
from opcd.runs import round_folder

Opcd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def opcd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Opcd:
    """The command, in a folder of its own, its model told what to say."""
    monkeypatch.setattr(experience_cli, "console", experience_cli.Console(width=120))
    monkeypatch.chdir(tmp_path)
    real = gathering.assemble

    def scripted(run: gathering.Run) -> gathering.Parts:
        parts = real(run)
        parts.engine = ScriptedEngine(script_of(lambda place: f" lesson {place[-1]}\nand more"))
        return parts

    monkeypatch.setattr(gathering, "assemble", scripted)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opcd", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
            raise SystemExit(0)
        found = capsys.readouterr()
        code = done.value.code
        return (code if isinstance(code, int) else 0), found.out, found.err

    return run


def counts(out: str) -> dict[str, list[str]]:
    """The cells of the printed table by the name of their row."""
    rows = [line.strip("│┃ ").replace("┃", "│").split("│") for line in out.splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 3]
    return {name: values for name, *values in cells}


def test_each_verb_runs_what_is_missing(opcd: Opcd, tiny_model_path: Path, tmp_path: Path) -> None:
    path = write_learner(tmp_path, tiny_model_path)
    code, out, _ = opcd("accumulate", path)
    assert code == 0
    assert "solved 6 of 6 problems" in out and "extracted from 6 of 6 traces" in out
    table = counts(out)
    assert table["traces"] == table["answers"] == table["items"] == table["kept"] == ["3", "3"]
    assert table["malformed"] == ["3", "3"] and table["mean outcome"] == ["0.67", "0.67"]
    assert {"exact duplicate", "near duplicate", "over budget"} <= table.keys()
    for verb in ("solve", "extract"):
        code, out, _ = opcd(verb, path)
        assert (code, "solved" in out, counts(out)["traces"]) == (0, False, ["3", "3"])


def test_solve_stops_after_the_traces(opcd: Opcd, tiny_model_path: Path, tmp_path: Path) -> None:
    code, out, _ = opcd("solve", write_learner(tmp_path, tiny_model_path), "experience.seeds=2")
    folder = round_folder(load_learner(tmp_path, tiny_model_path))
    assert code == 0 and folder.traces.is_file() and not folder.answers(0).exists()
    assert "answers" not in counts(out)


def test_extract_stops_after_the_answers(opcd: Opcd, tiny_model_path: Path, tmp_path: Path) -> None:
    code, out, _ = opcd("extract", write_learner(tmp_path, tiny_model_path))
    folder = round_folder(load_learner(tmp_path, tiny_model_path))
    assert code == 0 and folder.answers(0).is_file() and not folder.items(0).exists()
    assert counts(out)["items"] == ["3", "3"] and "kept" not in counts(out)


@pytest.mark.parametrize("verb", ["solve", "select", "experience"])
def test_ctrl_c_says_that_the_same_command_goes_on(
    opcd: Opcd, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """After minutes of solving, nobody should wonder whether they were for nothing."""
    path = write_learner(tmp_path, tiny_model_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScriptedEngine, "generate", stop)
        code, out, _ = opcd(verb, path)
    assert code == 130 and "the same command goes on from there" in out
    assert opcd("solve", path)[0] == 0


def test_a_run_without_the_table_is_the_users_mistake(
    opcd: Opcd, tiny_model_path: Path, tmp_path: Path
) -> None:
    path = write_learner(tmp_path, tiny_model_path)
    text = path.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if not line.startswith("experience")]
    context = 'context = { type = "system_prompt", path = "problems.jsonl" }'
    path.write_text("\n".join([*kept, context]), encoding="utf-8")
    code, _, errors = opcd("solve", path)
    assert code == 2 and "no [experience] table" in errors


def test_training_before_there_is_an_experience_is_refused(
    opcd: Opcd, tiny_model_path: Path, tmp_path: Path
) -> None:
    code, _, errors = opcd("train", write_learner(tmp_path, tiny_model_path))
    assert code == 2 and "nothing to bake in before that is gathered" in errors
