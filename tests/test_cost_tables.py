"""`opcd.cost_tables`: figures as people read them, the same on a terminal and on a page."""

import pytest
from rich.console import Console

from opcd.cost_tables import TITLES, cell, cost_grids, costs_tables, notes_lines, section_grid


def test_a_figure_and_its_spread_share_a_cell() -> None:
    row = {"condition": "baked", "wall_s": 0.12345, "wall_s_lowest": 0.1, "wall_s_highest": 250.0}
    grid = section_grid("times", [row])
    assert grid.headings == ["condition", "time, s"]
    assert grid.rows == [["baked", "0.123 [0.100, 250.0]"]]


def test_the_interval_of_a_share_is_in_per_cent_without_saying_so_again() -> None:
    row = {"correct": 0.958, "correct_lowest": 0.912, "correct_highest": 0.981}
    assert cell(row, "correct") == "95.8 % [91, 98]"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("saved_share", 0.899, "89.9 %"),
        ("correct_mood", 0.5, "50.0 %"),
        ("extra_parameters", 1234567, "1,234,567"),
        ("shared_tokens", 478, "478"),
        ("own_tokens_per_request", 63.6458, "63.6"),
        ("bytes_per_request", 11926400, "11.4"),
        ("bytes_per_server", 0, "0"),
        ("request_currency", 7.57e-05, "75.7"),
        ("wall_s", None, ""),
    ],
)
def test_shares_counts_other_units_and_what_is_not_known(
    name: str, value: float | None, text: str
) -> None:
    assert cell({name: value}, name) == text


def test_rows_with_other_columns_stand_in_one_table() -> None:
    grid = section_grid("x", [{"a": 1}, {"a": 2, "only_here": 3}])
    assert (grid.headings, grid.rows) == (["a", "only here"], [["1", ""], ["2", "3"]])


def test_one_row_stands_up() -> None:
    """Read from a phone, six names above six figures are worse than one below the other."""
    grid = section_grid("x", {"rows": 3, "with_context_tokens": 504.97})
    assert grid.headings == ["", ""]
    assert grid.rows == [["test rows", "3"], ["with the context", "505.0"]]


def test_sections_have_their_order_and_those_without_rows_no_table() -> None:
    found = {"break_even": [{"against": "x"}], "kv_cache": [], "prompt_tokens": {"rows": 3}}
    titles = [grid.title for grid in cost_grids(found)]
    assert titles == [TITLES["prompt_tokens"], TITLES["break_even"]]
    assert [table.title for table in costs_tables(found)] == titles


def test_a_note_names_the_table_that_it_is_about() -> None:
    notes = [{"about": "kv_cache", "note": "b"}, {"about": "run", "note": "c"}]
    found = notes_lines({"notes": notes})
    assert found == ["Keys and values in memory at the end of a request: b", "run: c"]


def test_a_terminal_shows_what_the_page_shows() -> None:
    found = {"training": [{"part": "[a] part", "wall_s": 2.5}], "prompt_tokens": {"rows": 3}}
    console = Console(width=240)
    with console.capture() as captured:
        for table in costs_tables(found):
            console.print(table)
    text = captured.get()
    assert all(grid_cell in text for grid_cell in ("[a] part", "2.50", "time, s", "test rows"))


def test_words_are_read_from_the_left_and_numbers_stand_below_each_other() -> None:
    rows = [{"batch_size": 1, "condition": "baked", "wall_s": None}, {"batch_size": 4}]
    grid = section_grid("x", rows)
    assert [grid.has_words(index) for index in range(3)] == [False, True, False]
    assert [column.justify for column in grid.for_terminal().columns] == ["right", "left", "right"]
