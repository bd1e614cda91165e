"""`opcd.cost_tables`: figures as people read them."""

from typing import Any

from rich.console import Console

from opcd.cost_tables import costs_tables, figures_table, notes_lines


def text_of(*tables: Any) -> str:
    console = Console(width=240, record=True, file=None, quiet=False)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get()


def test_a_figure_and_its_spread_share_a_cell() -> None:
    row = {"condition": "baked", "wall_s": 0.12345, "wall_s_lowest": 0.1, "wall_s_highest": 250.0}
    found = text_of(figures_table("times", [row]))
    assert "0.123 [0.1, 250.0]" in found
    assert "lowest" not in found


def test_shares_counts_and_what_is_not_known() -> None:
    rows = [
        {"part": "all", "saved_share": 0.899, "correct_mood": 0.5, "bytes": 1234567, "wall_s": None}
    ]
    found = text_of(figures_table("x", rows))
    assert all(cell in found for cell in ("89.9 %", "50.0 %", "1,234,567"))
    assert "None" not in found


def test_shared_tokens_are_no_share_and_words_are_no_markup() -> None:
    found = text_of(figures_table("x", [{"part": "[a] part", "shared_tokens": 478}]))
    assert "478" in found and "%" not in found
    assert "[a] part" in found


def test_rows_with_other_columns_stand_in_one_table() -> None:
    found = text_of(figures_table("x", [{"a": 1}, {"a": 2, "only_here": 3}]))
    assert "only here" in found and "3" in found


def test_sections_without_rows_have_no_table() -> None:
    found = {"prompt_tokens": {"rows": 3}, "break_even": [], "notes": [{"about": "a", "note": "b"}]}
    assert len(costs_tables(found)) == 1
    assert notes_lines(found) == ["a: b"]
