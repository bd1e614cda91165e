"""The folder of a run: nobody's results are overwritten, and no reader sees half a file."""

import os
from pathlib import Path

import pytest

from opcd.config import Run, load_config
from opcd.errors import RunFolderError
from opcd.runs import (
    RunFolder,
    append_jsonl,
    create_run,
    mend_jsonl,
    open_run,
    read_jsonl,
    rewind_jsonl,
    round_folder,
    write_json,
    write_text,
)
from worlds import write_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load_config(write_run(tmp_path / "recipe"), [f"out={tmp_path / 'runs'}"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_run_holds_its_configuration(run: Run) -> None:
    folder = create_run(run)
    assert folder.path == run.out / "desk"
    assert names(folder.path) == ["config.json"]
    assert open_run(folder.path) == (folder, run)


def test_the_layout_is_the_contract(tmp_path: Path) -> None:
    """Other programs read these files by name."""
    folder = RunFolder(tmp_path)
    paths = (
        folder.config,
        folder.metrics,
        folder.validation,
        folder.rollouts,
        folder.checkpoints,
        folder.best,
        folder.evaluation,
        folder.answers,
    )
    assert [path.name for path in paths] == [
        "config.json",
        "metrics.jsonl",
        "validation.jsonl",
        "rollouts.jsonl",
        "checkpoints",
        "best",
        "evaluation.json",
        "answers.jsonl",
    ]
    assert {path.parent for path in paths} == {tmp_path}


def test_a_run_never_overwrites_another_by_itself(run: Run) -> None:
    folder = create_run(run)
    folder.metrics.write_text("results")
    with pytest.raises(
        RunFolderError, match=r"desk exists.*--resume.*--overwrite.*name="
    ) as caught:
        create_run(run)
    assert caught.value.exit_code == 2
    assert folder.metrics.read_text() == "results"


def test_overwriting_leaves_nothing_of_the_earlier_run(run: Run) -> None:
    folder = create_run(run)
    folder.metrics.write_text("old")
    (folder.checkpoints / "step-2").mkdir(parents=True)
    assert names(create_run(run, overwrite=True).path) == ["config.json"]


def test_a_folder_that_is_no_run_is_never_deleted(run: Run) -> None:
    """`--overwrite` with a wrong name must not cost anybody their files."""
    precious = run.out / "desk" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(RunFolderError, match=r"is not a run.*so it is not deleted"):
        create_run(run, overwrite=True)
    assert precious.read_text() == "years of work"


def test_an_empty_folder_may_be_taken(run: Run) -> None:
    (run.out / "desk").mkdir(parents=True)
    assert create_run(run, overwrite=True).config.is_file()


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is not a run: it has no config\.json"):
        open_run(tmp_path)


def test_a_folder_of_experience_names_the_runs_that_were_trained_with_it(run: Run) -> None:
    """Whoever wants its report would not guess their names."""
    round_folder(run)
    with pytest.raises(RunFolderError, match=r"runs of their own: give .*desk-round-1"):
        open_run(run.out / "desk")


def test_a_text_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before the last moment leaves the file from before."""
    path = tmp_path / "evaluation.json"
    write_json(path, {"a": 1})

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "half")
    assert path.read_text() == '{\n "a": 1\n}\n'
    write_text(path, "whole")
    assert path.read_text() == "whole"


def test_rows_are_appended_and_read_back(tmp_path: Path) -> None:
    path, rows = tmp_path / "m.jsonl", [{"step": 0, "text": "naïve\n\t🙂"}, {"step": 1}]
    append_jsonl(path, rows[:1])
    append_jsonl(path, rows[1:])
    assert list(read_jsonl(path)) == rows
    assert "naïve" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_response_may_hold_any_character(tmp_path: Path, separator: str) -> None:
    """A model writes what it likes; a resume reads rollouts.jsonl back."""
    path = tmp_path / "rollouts.jsonl"
    append_jsonl(path, [{"step": 0, "response": f"a{separator}b"}])
    assert list(read_jsonl(path)) == [{"step": 0, "response": f"a{separator}b"}]


def test_a_row_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "kl')
    assert list(read_jsonl(path)) == [{"step": 0}]


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []


def test_rewinding_drops_the_steps_that_come_again(tmp_path: Path) -> None:
    """After a resume from step 2, steps 2 and 3 are written a second time."""
    path = tmp_path / "m.jsonl"
    append_jsonl(path, [{"step": s, "text": "é"} for s in (0, 1, 1, 2, 3)])
    with path.open("a") as stream:
        stream.write('{"step": 4, ')
    rewind_jsonl(path, 2)
    append_jsonl(path, [{"step": 2, "text": "again"}])
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 1, 2]


def test_the_layout_of_a_round_is_the_contract(run: Run) -> None:
    """Other programs read these files by name, and a service writes one of them."""
    folder = round_folder(run, 2)
    assert folder.path == run.out / "desk" / "experience" / "round-2"
    assert folder.path.is_dir()
    paths = (
        folder.settings,
        folder.traces,
        folder.selection,
        folder.growth,
        folder.selected,
        folder.answers(0),
        folder.items(1),
        folder.raw(1),
        folder.experience(1, 7),
        folder.experience(1, 1234),
    )
    assert [str(path.relative_to(folder.path)) for path in paths] == [
        "settings.json",
        "traces.jsonl",
        "selection.json",
        "growth.svg",
        "selected.md",
        "seed-0/answers.jsonl",
        "seed-1/items.jsonl",
        "seed-1/raw.md",
        "seed-1/experience-007.md",
        "seed-1/experience-1234.md",
    ]


def test_experiences_are_listed_by_number(run: Run) -> None:
    folder = round_folder(run)
    folder.seed(0).mkdir()
    for number in (1000, 2, 0, 999):
        folder.experience(0, number).touch()
    numbers = [int(path.stem.split("-")[1]) for path in folder.experiences(0)]
    assert numbers == [0, 2, 999, 1000]
    assert folder.experiences(5) == []


def test_what_was_gathered_outlives_a_run_that_is_started_anew(run: Run) -> None:
    folder = round_folder(run)
    folder.selected.write_text("kept", encoding="utf-8")
    create_run(run)
    create_run(run, overwrite=True)
    assert folder.selected.read_text(encoding="utf-8") == "kept"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"a": 1}\n{"a"', '{"a": 1}\n'),
        ('{"a": 1}\n{"a": 2}', '{"a": 1}\n{"a": 2}\n'),
        ('{"a": 1}\n', '{"a": 1}\n'),
        ('{"a', ""),
        ("", ""),
    ],
)
def test_a_file_is_mended_before_it_is_appended_to(tmp_path: Path, before: str, after: str) -> None:
    """Or the next row would be glued to half a one, and both be lost."""
    path = tmp_path / "rows.jsonl"
    path.write_text(before, encoding="utf-8")
    mend_jsonl(path)
    assert path.read_text(encoding="utf-8") == after


def test_a_file_that_is_not_there_needs_no_mending(tmp_path: Path) -> None:
    mend_jsonl(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
