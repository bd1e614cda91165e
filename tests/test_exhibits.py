"""Answers pass the right filters, tokens get the right colours, costs keep their numbers."""

from pathlib import Path

from measured import TEXTS, measured_run, trace
from opcd.columns import columns_of
from opcd.exhibits import (
    KL_EDGES_NATS,
    answer_rows,
    kl_legend,
    token_rows,
)
from opcd.findings import read_findings


def test_answers_know_which_filters_they_pass(tmp_path: Path) -> None:
    """Rows of `TEXTS`: alike and fixed; fixed by baking alone; broken by it; alike and fixed."""
    runs = read_findings([measured_run(tmp_path / "desk")])
    rows = answer_rows(columns_of(runs), runs)
    assert [row["tags"] for row in rows] == ["fixed", "differs fixed", "differs wrong", "fixed"]
    assert [label for label, _ in rows[0]["cells"]] == ["base", "in_context", "baked"]
    assert rows[1]["cells"][2][1]["text"] == "word1"


def test_a_filter_finds_what_happened_in_any_of_the_runs(tmp_path: Path) -> None:
    broken = TEXTS | {"baked": ("oh", "word1", "word2", "word3")}
    runs = read_findings([measured_run(tmp_path / "a"), measured_run(tmp_path / "b", broken)])
    rows = answer_rows(columns_of(runs), runs)
    assert rows[0]["tags"] == "differs fixed wrong"


def test_ungraded_answers_are_neither_wrong_nor_fixed(tmp_path: Path) -> None:
    runs = read_findings([measured_run(tmp_path / "desk", graded=False)])
    assert {row["tags"] for row in answer_rows(columns_of(runs), runs)} == {"", "differs"}


def test_each_level_of_the_legend_begins_at_its_edge(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "desk")
    values = [0.0, *KL_EDGES_NATS]
    trace(run, ["t"] * len(values), values)
    ((_, tokens), _) = token_rows(read_findings([run]))[0]["lines"]
    assert [level for _, level, _ in tokens] == [level for level, _ in kl_legend()]
    assert [text for _, text in kl_legend()][:2] == ["below 0.01", "0.01 to 0.1"]


def test_tokens_that_cannot_be_seen_or_measured_are_shown(tmp_path: Path) -> None:
    """A break, an empty piece of a character, a number that is not finite, rounding below 0."""
    run = measured_run(tmp_path / "desk")
    trace(run, ["\n", "", "b"], [None, -1e-7, 0.25])
    base, baked = token_rows(read_findings([run]))[0]["lines"]
    assert base == ("base", [("↵\n", "x", "not finite"), ("∅", 0, "0.000"), ("b", 2, "0.250")])
    assert baked[1][2] == ("b", 1, "0.025")
