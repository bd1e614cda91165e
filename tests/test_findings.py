"""A run's files are read together, and what they cannot support is refused."""

import shutil
from pathlib import Path

import pytest

from measured import COSTS, HARNESS, TEXTS, measured_run, rewrite, trace
from opcd.errors import RunFolderError
from opcd.findings import read_findings
from opcd.runs import write_json
from worlds import write_jsonl


def test_everything_that_was_written_is_read(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    trace(run, ["a", "b"], [1.0, 2.0])
    write_json(run / "costs.json", COSTS | {"training": [{"wall_s": 3}]})
    write_json(run / "harness.json", HARNESS)
    (found,) = read_findings([run])
    assert (found.label, found.best["step"], found.warmup_steps) == ("desk", 4, 2)
    assert [len(rows) for rows in (found.answers, found.metrics, found.validation)] == [4, 4, 2]
    assert found.token_kl[0]["tokens"] == ["a", "b"]
    assert found.costs["training"] == [{"wall_s": 3}]
    assert found.harness == HARNESS
    assert (found.gap, found.search, found.comparison) == ({}, {}, {}), "there are none"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("costs.json", r"costs.json lacks prompt_tokens, .*notes.* opcd costs \S+desk"),
        ("gap.json", r"gap.json lacks .*margin_nats_by_answer.* with opcd gap"),
        ("search.json", r"search.json lacks selected_by, chosen, rows.* with opcd search"),
        ("comparison.json", r"comparison.json lacks .*seeds.* with opcd compare"),
        ("harness.json", r"harness.json lacks tasks, lm_eval, limit"),
    ],
)
def test_a_file_of_another_version_is_refused(tmp_path: Path, file: str, message: str) -> None:
    run = measured_run(tmp_path / "desk")
    (run / file).write_text("{}")
    with pytest.raises(RunFolderError, match=message):
        read_findings([run])


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("comparison.json", {"checkpoints": {"tiny": "step-9"}}),
        ("harness.json", {"checkpoint": "step-9"}),
    ],
)
def test_what_is_about_other_weights_is_refused(
    whole_run_path: Path, tmp_path: Path, file: str, changes: dict[str, object]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run_path, run)
    rewrite(run / file, **changes)
    with pytest.raises(RunFolderError, match=rf"{file} is about step-9, but best/ holds step-2"):
        read_findings([run])


@pytest.mark.parametrize(
    "sides",
    [
        {"base": {"acc": {"mean": 0.5, "stderr": 0.1}}},
        {"base": {}, "baked": {}},
        {"base": {"acc": {"mean": 0.5, "stderr": 0.1}}, "baked": {"acc": {"mean": 0.5}}},
    ],
)
def test_a_benchmark_that_was_half_measured_is_refused(
    tmp_path: Path, sides: dict[str, object]
) -> None:
    run = measured_run(tmp_path / "desk")
    write_json(run / "harness.json", HARNESS | {"tasks": {"arc_easy": sides}})
    with pytest.raises(RunFolderError, match="arc_easy needs the same metrics for base and baked"):
        read_findings([run])


def test_baked_comes_last_whatever_else_was_measured(tmp_path: Path) -> None:
    texts = {"base": ["a"], "baked": ["b"], "off_policy": ["c"], "in_context": ["d"]}
    (found,) = read_findings([measured_run(tmp_path / "desk", texts)])
    assert found.conditions == ("base", "off_policy", "in_context", "baked")


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [measured_run(tmp_path / side / "desk") for side in "ab"]
    assert [found.label for found in read_findings(runs)] == [str(run) for run in runs]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("evaluation.json", r"has no evaluation.json.*run opcd evaluate \S+desk$"),
        ("answers.jsonl", r"has no answers.jsonl.*run opcd evaluate \S+desk --again"),
        ("config.json", "is not a run"),
        ("best/best.json", "has no best/ yet"),
    ],
)
def test_a_run_that_lacks_a_file_is_refused(tmp_path: Path, file: str, message: str) -> None:
    run = measured_run(tmp_path / "desk")
    (run / file).unlink()
    with pytest.raises(RunFolderError, match=message):
        read_findings([run])


def test_an_evaluation_of_other_weights_is_refused(tmp_path: Path) -> None:
    """The numbers would be shown beside weights that they are not of."""
    run = measured_run(tmp_path / "desk", checkpoint="step-2")
    with pytest.raises(RunFolderError, match=r"measured step-2, but best/ holds step-4"):
        read_findings([run])


@pytest.mark.parametrize("suites", [{}, {"task": {}}, {"task": {"baked": {}}}])
def test_an_empty_suite_is_refused(tmp_path: Path, suites: dict[str, object]) -> None:
    run = measured_run(tmp_path / "desk", suites=suites)
    with pytest.raises(RunFolderError, match="empty task suite"):
        read_findings([run])


def test_no_answers_are_refused(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    (run / "answers.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"empty task suite \(0 answers\)"):
        read_findings([run])


def test_an_answer_without_a_measured_condition_is_refused(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    write_jsonl(run / "answers.jsonl", [{"id": "x", "prompt": "?", "base": {}, "baked": {}}])
    with pytest.raises(RunFolderError, match="row 'x' lacks in_context"):
        read_findings([run])


@pytest.mark.parametrize("file", ["evaluation.json", "metrics.jsonl", "costs.json"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    run = measured_run(tmp_path / "desk")
    (run / file).write_text('{"suites": \n')
    with pytest.raises(RunFolderError, match=rf"{file} cannot be read"):
        read_findings([run])


def test_a_summary_that_lacks_a_key_is_refused(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    (run / "evaluation.json").write_text('{"suites": {}, "paired": [], "seed": 0}')
    with pytest.raises(RunFolderError, match="lacks split, checkpoint, context_tokens"):
        read_findings([run])


def test_a_token_without_its_number_is_refused(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    trace(run, ["a", "b"], [1.0])
    with pytest.raises(RunFolderError, match="2 tokens, 1 base_kl_nats"):
        read_findings([run])


def test_runs_on_other_splits_are_not_compared(tmp_path: Path) -> None:
    runs = [measured_run(tmp_path / name) for name in ("a", "b")]
    rewrite(runs[1] / "evaluation.json", split="validation")
    with pytest.raises(RunFolderError, match=r"its test split and \S+b on its validation split"):
        read_findings(runs)


def test_runs_on_other_rows_are_not_compared(tmp_path: Path) -> None:
    fewer = {condition: found[:3] for condition, found in TEXTS.items()}
    runs = [measured_run(tmp_path / "a"), measured_run(tmp_path / "b", fewer)]
    with pytest.raises(RunFolderError, match=r"1 of 4 differ; 'test-3' is in one of them only"):
        read_findings(runs)


def test_the_same_ids_with_other_prompts_are_other_rows(tmp_path: Path) -> None:
    """Ids are often a row's number, so two files share them without sharing a row."""
    runs = [measured_run(tmp_path / name) for name in ("a", "b")]
    file = runs[1] / "answers.jsonl"
    file.write_text(file.read_text().replace("question 2?", "something else?"))
    with pytest.raises(RunFolderError, match=r"'test-2' has another prompt or answer"):
        read_findings(runs)


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    with pytest.raises(RunFolderError, match="named more than once"):
        read_findings([run, run / "best" / ".."])
