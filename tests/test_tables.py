"""`opcd.tables`: what a row of answers says in a cell."""

import io

from rich.console import Console

from opcd.tables import answer_text, answers_table


def test_an_answer_is_shown_as_it_is_and_not_too_long() -> None:
    assert answer_text({"text": "calm", "note": "wrong", "correct": 0.0}) == "calm"
    assert answer_text({"text": "x" * 200}) == "x" * 116 + " ..."


def test_a_game_is_shown_by_its_ending_and_the_last_reply() -> None:
    row = {"text": "[up]", "note": "out_of_turns", "turns": 5.0, "feedback": "The limit ..."}
    assert answer_text(row) == "out of turns after 5 turns, the last reply: [up]"


def test_an_action_in_brackets_is_no_markup() -> None:
    """`[down]` is what the model said, not a style of the terminal."""
    cell = {"text": "I go [down].", "note": "", "correct": 1.0}
    row = {"prompt": "[up] or [down]?", "base": cell, "in_context": cell, "baked": cell}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(answers_table([row], 1))
    text = console.export_text()
    assert "[up] or [down]?" in text and text.count("I go [down].") == 3
