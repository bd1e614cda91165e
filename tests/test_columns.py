"""What stands in one column of a report, and with how many digits."""

from pathlib import Path

from measured import TEXTS, measured_run
from opcd.columns import columns_of, compared_columns, estimate_of, number, suite_tables
from opcd.findings import read_findings


def test_one_run_has_its_conditions_as_columns(tmp_path: Path) -> None:
    columns = columns_of(read_findings([measured_run(tmp_path / "desk")]))
    assert [column.label for column in columns] == ["base", "in_context", "baked"]


def test_what_differs_between_runs_has_a_column_for_each(tmp_path: Path) -> None:
    """With in_context, base differs too: its agreement is with another run's answers."""
    other = TEXTS | {"in_context": ("word0", "word1", "word2", "word3")}
    runs = read_findings([measured_run(tmp_path / "a"), measured_run(tmp_path / "b", other)])
    names = ("base", "in_context", "baked")
    labels = [column.label for column in columns_of(runs)]
    assert labels == [f"{condition} · {run}" for condition in names for run in "ab"]


def test_what_is_alike_stands_there_once_but_baked_for_each_run(tmp_path: Path) -> None:
    """Two runs that answer alike are two runs still."""
    runs = read_findings([measured_run(tmp_path / name) for name in ("a", "b")])
    labels = [column.label for column in columns_of(runs)]
    assert labels == ["base", "in_context", "baked · a", "baked · b"]


def test_a_condition_of_one_run_only_names_it(tmp_path: Path) -> None:
    more = TEXTS | {"off_policy": TEXTS["base"]}
    runs = read_findings([measured_run(tmp_path / "a"), measured_run(tmp_path / "b", more)])
    assert "off_policy · b" in [column.label for column in columns_of(runs)]


def test_an_estimate_is_the_files_own(tmp_path: Path) -> None:
    columns = columns_of(read_findings([measured_run(tmp_path / "desk")]))
    found = estimate_of(columns[-1], "task", "correct")
    assert found is not None
    assert (found["mean"], found["interval"]) == ("75.0 %", "[30, 95]")
    low, mean, high = found["bar"]
    assert low < mean == 75.0 < high
    assert estimate_of(columns[0], "kept", "kl_nats_per_token") is None


def test_suites_show_the_columns_that_were_measured(tmp_path: Path) -> None:
    columns = columns_of(read_findings([measured_run(tmp_path / "desk")]))
    tables = {name: (labels, rows) for name, labels, rows in suite_tables(columns)}
    assert tables["task"][0] == ["base", "in_context", "baked"]
    assert tables["kept"][0] == ["baked"]
    assert [(metric, n) for metric, n, _ in tables["kept"][1]] == [("kl_nats_per_token", "2")]


def test_shares_are_per_cent_and_other_numbers_are_not() -> None:
    found = [number("correct_mood", 0.5), number("response_tokens", 15.979), number("x", 0.0406)]
    assert found == ["50.0 %", "16.0", "0.041"]


def test_a_comparison_has_columns_of_its_own_file(whole_run_path: Path) -> None:
    (run,) = read_findings([whole_run_path])
    columns = compared_columns(run)
    tables = {name: labels for name, labels, _ in suite_tables(columns)}
    assert tables["task"] == ["base", "in_context", "off_policy", "baked"]
    assert tables["kept"] == ["off_policy", "baked"]
    found = estimate_of(columns[2], "task", "kl_nats_per_token")
    kept = run.comparison["suites"]["task"]["off_policy"]["kl_nats_per_token"]
    assert found is not None
    assert found["mean"] == number("kl_nats_per_token", kept["mean"])
    assert f"{kept['ci95'][1]:.{1 if kept['mean'] >= 10 else 3}f}]" in found["interval"]
