"""`opcd.growth`: the curve and the table say of each experience what was measured of it."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from opcd.candidates import Candidate, Scored
from opcd.growth import draw_growth, growth_grid, growth_of, write_growth
from opcd.selection import choose


def scored(seed: int, step: int, items: int, hits: int, rows: int = 10) -> Scored:
    text = "".join(f"- {seed} {i}\n" for i in range(items))
    marks = (1.0,) * hits + (0.0,) * (rows - hits)
    return Scored(Candidate(seed, step, text, items, 12 * items), marks)


GROWN = [
    *(scored(0, step, items, hits) for step, items, hits in ((0, 0, 2), (1, 2, 4), (2, 3, 8))),
    *(scored(1, step, items, hits) for step, items, hits in ((0, 0, 2), (1, 0, 2), (2, 1, 6))),
]


def test_a_point_is_all_seeds_after_the_same_traces() -> None:
    points = growth_of(GROWN)
    assert [p.step for p in points] == [0, 1, 2]
    assert [p.items for p in points] == [0, 1, 2]
    assert [p.score.mean for p in points] == pytest.approx([0.2, 0.3, 0.7])
    assert all(p.score.low <= p.score.mean <= p.score.high for p in points)
    assert points[1].by_seed[1].candidate.step == 1


def test_the_interval_is_of_the_rows_and_not_of_rows_times_seeds() -> None:
    """Ten seeds with the same answers know no more than one."""
    same = [scored(seed, 1, 1, 5) for seed in range(10)]
    ten, one = growth_of(same)[0].score, growth_of(same[:1])[0].score
    assert (ten.low, ten.high, ten.n) == (one.low, one.high, one.n)


def test_a_seed_that_stopped_is_missing_from_later_points() -> None:
    points = growth_of(GROWN[:-1])
    assert list(points[-1].by_seed) == [0]
    assert growth_grid(GROWN[:-1], choose(GROWN).chosen, "correct", 10).rows[-1][4] == ""


def test_the_table_has_a_row_for_each_number_of_traces_and_marks_the_chosen() -> None:
    chosen = choose(GROWN).chosen
    grid = growth_grid(GROWN, chosen, "correct", 10)
    assert grid.headings == ["traces", "items", "tokens", "seed 0", "seed 1", "mean of 2"]
    assert grid.rows[1] == ["1", "1", "12", "40.0 %", "20.0 %", "30.0 % [10, 55]"] or grid.rows[1][
        :5
    ] == ["1", "1", "12", "40.0 %", "20.0 %"]
    marked = [cell for row in grid.rows for cell in row if "*" in cell]
    assert marked == [f"{100 * chosen.mean:.1f} % *"]


def test_one_seed_has_its_interval_and_many_their_ends() -> None:
    one = growth_grid(GROWN[:3], choose(GROWN[:3]).chosen, "correct", 10)
    assert one.headings[3:] == ["score"] and one.rows[0][3].startswith("20.0 % [")
    assert sum("*" in row[3] for row in one.rows) == 1
    many = [scored(seed, 1, 1, seed) for seed in range(6)]
    grid = growth_grid(many, choose(many).chosen, "correct", 10)
    assert grid.headings[3:] == ["lowest", "highest", "mean of 6"]
    assert grid.rows[0][3:5] == ["0.0 %", "50.0 % *"]


def test_the_figure_has_a_line_for_each_seed_one_for_the_mean_and_the_chosen() -> None:
    axes = draw_growth(GROWN, choose(GROWN).chosen, "correct").axes[0]
    lines = [tuple(np.asarray(line.get_data()).tolist()) for line in axes.lines]
    assert lines[0] == ([0, 2, 3], [20.0, 40.0, 80.0])
    assert lines[1] == ([0, 0, 1], [20.0, 20.0, 60.0])
    assert lines[2][0] == [0, 1, 2] and lines[2][1] == pytest.approx([20.0, 30.0, 70.0])
    assert len(lines) == 4 and lines[3] == ([3], [80.0])


def test_the_file_is_one_drawing_whose_bytes_depend_on_the_scores_alone(tmp_path: Path) -> None:
    first, again = tmp_path / "a.svg", tmp_path / "b.svg"
    for file in (first, again):
        write_growth(file, GROWN, choose(GROWN).chosen, "correct")
    assert first.read_bytes() == again.read_bytes()
    assert ElementTree.parse(first).getroot().tag.endswith("svg")
