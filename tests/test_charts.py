"""Curves hold what the files hold, at the steps that were done."""

import json
from pathlib import Path

from measured import measured_run
from opcd.charts import charts_of
from opcd.findings import read_findings
from worlds import write_jsonl


def test_a_chart_for_each_quantity_and_a_line_for_each_run(tmp_path: Path) -> None:
    runs = read_findings([measured_run(tmp_path / name) for name in ("a", "b")])
    charts = {chart.name: chart for chart in charts_of(runs)}
    assert list(charts) == [
        "kl_nats_per_token",
        "anchor_kl_nats_per_token",
        "student_entropy_nats",
        "tokens_per_response",
        "truncated_fraction",
        "validation_correct",
        "validation_kl_nats_per_token",
    ]
    assert all([line.label for line in chart.lines] == ["a", "b"] for chart in charts.values())
    line = charts["validation_correct"].lines[0]
    assert (line.steps, line.values, line.best_step) == ([2, 4], [0.25, 0.75], 4)
    assert charts["kl_nats_per_token"].lines[0].steps == [1, 2, 3, 4]


def test_only_what_falls_far_gets_a_logarithmic_axis(tmp_path: Path) -> None:
    charts = {c.name: c for c in charts_of(read_findings([measured_run(tmp_path / "a")]))}
    assert charts["kl_nats_per_token"].is_logarithmic
    assert not charts["tokens_per_response"].is_logarithmic


def test_values_that_were_not_finite_are_counted(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "a")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_jsonl(run / "metrics.jsonl", [rows[0], rows[1] | {"kl_nats_per_token": None}])
    charts = {chart.name: chart for chart in charts_of(read_findings([run]))}
    assert (charts["kl_nats_per_token"].gaps, charts["tokens_per_response"].gaps) == (1, 0)


def test_the_end_of_each_warm_up_is_known(tmp_path: Path) -> None:
    alike = [measured_run(tmp_path / name) for name in ("a", "b")]
    other = measured_run(tmp_path / "c", warmup_steps=3)
    none = measured_run(tmp_path / "d", warmup_steps=0)
    longer = measured_run(tmp_path / "e", warmup_steps=9)
    ends = [
        charts_of(read_findings(paths))[0].warmup_ends
        for paths in (alike, [*alike, other], [none], [longer])
    ]
    assert ends == [{2: ""}, {2: " (a, b)", 3: " (c)"}, {}, {}]


def test_without_anchors_their_kl_is_no_curve(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "a")
    config = json.loads((run / "config.json").read_text())
    config["anchor"]["share"] = 0.0
    (run / "config.json").write_text(json.dumps(config))
    names = [chart.name for chart in charts_of(read_findings([run]))]
    assert "anchor_kl_nats_per_token" not in names


def test_what_returns_with_the_context_has_a_curve_where_something_does(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "a")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kl = "context_return_kl_nats_per_token"
    write_jsonl(run / "metrics.jsonl", [row | {kl: 0.1} for row in rows])
    assert kl not in [chart.name for chart in charts_of(read_findings([run]))]
    config = json.loads((run / "config.json").read_text())
    config["anchor"]["context_return"] = 0.1
    (run / "config.json").write_text(json.dumps(config))
    assert kl in [chart.name for chart in charts_of(read_findings([run]))]


def test_how_many_rows_have_a_metric_is_no_curve(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "a")
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    classes = {"correct_no": 0.5, "rows_correct_no": 2}
    write_jsonl(run / "validation.jsonl", [row | classes for row in rows])
    names = [chart.name for chart in charts_of(read_findings([run]))]
    assert "validation_correct_no" in names and "validation_rows_correct_no" not in names
