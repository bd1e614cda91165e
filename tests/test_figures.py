"""Drawings say what they show, follow the page's colours, and are the same as files."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from measured import measured_run
from opcd.charts import Chart, Line, charts_of
from opcd.errors import InputError
from opcd.figures import LINES, draw, inline_svg, write_figures
from opcd.findings import read_findings


def chart(*values: float | None, label: str = "desk", unit: str = "nats") -> Chart:
    line = Line(label, 0, list(range(1, len(values) + 1)), list(values), best_step=2)
    return Chart("some_kl", "Some KL", unit, [line], {1: ""})


def test_axes_carry_their_units_and_the_warm_up_its_end() -> None:
    axes = draw(chart(1.0, 2.0, 3.0)).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("nats", "steps done")
    assert [text.get_text().strip() for text in axes.texts] == ["warm-up ends"]
    assert 1.5 in [line.get_xdata()[0] for line in axes.lines]  # type: ignore[index]


def test_no_curve_runs_through_the_words_above_it() -> None:
    for values in ((1.0, 2.0, 3.0), (0.001, 1.0, 3.0)):
        axes = draw(chart(*values)).axes[0]
        (words,) = axes.texts
        assert axes.transData.transform((1, 3.0))[1] <= axes.transAxes.transform((0, 0.93))[1]
        assert words.get_position()[1] == 1.0


def test_a_logarithmic_axis_and_gaps_are_said() -> None:
    axes = draw(chart(10.0, None, 0.01)).axes[0]
    assert axes.get_ylabel() == "nats (log scale)"
    assert "1 values were not finite" in axes.get_xlabel()


def test_shares_are_drawn_per_cent() -> None:
    axes = draw(chart(0.5, 0.25, unit="% of rows")).axes[0]
    assert list(axes.lines[0].get_ydata()) == [50.0, 25.0]  # type: ignore[arg-type]


def test_runs_differ_in_more_than_colour(tmp_path: Path) -> None:
    runs = read_findings([measured_run(tmp_path / name) for name in ("a", "_b")])
    axes = draw(charts_of(runs)[0]).axes[0]
    strokes = {str(line.get_linestyle()) for line in axes.lines[:2]}
    legend = axes.get_legend()
    assert legend is not None
    assert len(strokes) == 2
    assert [text.get_text().strip() for text in legend.get_texts()] == ["a", "_b"]


def test_inline_drawings_take_the_pages_colours_and_names() -> None:
    svg = inline_svg(chart(1.0, 2.0))
    assert "var(--line-0)" in svg
    assert LINES[0] not in svg
    ids = re.findall(r'\sid="([^"]*)"', svg)
    assert ids
    assert all(name.startswith("some_kl-") for name in ids)
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', svg)
    assert set(used) <= set(ids)
    assert "<style" not in svg
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_labels_of_runs_stay_text() -> None:
    both = chart(1.0, 2.0, label="</svg><script>alert(1)</script>$x$")
    svg = inline_svg(Chart(both.name, both.title, both.unit, both.lines * 2, {}))
    assert "<script>" not in svg
    assert "alert(1)" in svg
    assert "$x$" in svg


def test_files_are_written_twice_alike(tmp_path: Path) -> None:
    files = write_figures([chart(1.0, 2.0)], tmp_path / "new" / "figures")
    assert [file.name for file in files] == ["some_kl.png", "some_kl.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    first = files[1].read_bytes()
    write_figures([chart(1.0, 2.0)], tmp_path / "new" / "figures")
    assert files[1].read_bytes() == first


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write_figures([chart(1.0)], tmp_path / "figures")


def test_letters_that_the_font_lacks_warn_nobody() -> None:
    both = chart(1.0, 2.0, label="走る")
    assert "走る" in inline_svg(Chart(both.name, both.title, both.unit, both.lines * 2, {}))
