"""`opcd.selection`: every score belongs to its own experience, and chance chooses nothing."""

import json
import random
from pathlib import Path

import pytest

from learners import grown, lesson_parts
from opcd.assembly import Parts
from opcd.candidates import (
    Candidate,
    Scored,
)
from opcd.rollouts.scripted import ScriptedEngine
from opcd.runs import RoundFolder
from opcd.selection import choose, select, verdict
from worlds import END_ID


def scored(tokens: int, hits: int, rows: int = 100, seed: int = 0, step: int = 1) -> Scored:
    text = f"- {tokens} tokens" if tokens else ""
    marks = (1.0,) * hits + (0.0,) * (rows - hits)
    return Scored(Candidate(seed, step if tokens else 0, text, tokens // 10, tokens), marks)


def test_the_highest_wins_if_it_is_clearly_the_highest() -> None:
    found = choose([scored(0, 20), scored(30, 40), scored(60, 80, step=2)])
    assert found.chosen == found.highest == scored(60, 80, step=2)


def test_what_is_within_one_standard_error_is_as_good_and_the_shortest_of_it_wins() -> None:
    """Of 100 rows at 80 % the standard error is 4 points: 77 is near, 75 is not."""
    found = choose([scored(0, 20), scored(10, 75), scored(30, 77), scored(60, 80, step=2)])
    assert found.chosen.candidate.tokens == 30 and found.highest.candidate.tokens == 60
    assert 0.039 < found.standard_error < 0.041
    assert "the highest is 0.800" in verdict(found)


def test_no_items_can_win_and_that_is_said() -> None:
    found = choose([scored(0, 50), scored(30, 52), scored(60, 49, step=2)])
    assert found.chosen.candidate.text == ""
    assert verdict(found).startswith("no items: 0.500 without any experience")


def test_of_equally_short_ones_the_better_then_the_earlier_wins() -> None:
    worse, better, later = (
        scored(30, 77, seed=0),
        scored(30, 78, seed=1),
        scored(30, 78, seed=1, step=2),
    )
    top = scored(60, 80, step=3)
    assert choose([worse, later, better, top]).chosen == better


def test_the_order_of_the_candidates_is_of_no_account() -> None:
    source = random.Random(3)
    candidates = [
        scored(10 * source.randrange(5), source.randrange(40, 60), seed=seed, step=step)
        for seed in range(3)
        for step in range(1, 6)
    ]
    first = choose(candidates)
    for _ in range(20):
        source.shuffle(candidates)
        again = choose(candidates)
        assert again.chosen == first.chosen and again.standard_error == first.standard_error


@pytest.fixture
def parts(tiny_model_path: Path, tmp_path: Path) -> Parts:
    """As `lesson_parts`."""
    return lesson_parts(tmp_path, tiny_model_path)


def test_selecting_writes_the_table_the_figure_and_the_chosen_text(
    parts: Parts, tmp_path: Path
) -> None:
    """The table alone tells which text was chosen, on which rows, and how sure that is."""
    folder = RoundFolder(tmp_path / "round")
    grown(folder)
    found = select(parts, folder, str)
    assert found.table == json.loads(folder.selection.read_text("utf-8"))
    chosen = found.table["chosen"]
    assert (chosen["seed"], chosen["step"], chosen["items"]) == (0, 3, 3)
    assert found.table["highest"]["file"] == "seed-0/experience-004.md", "within its error"
    assert folder.selected.read_text("utf-8") == folder.experience(0, 3).read_text("utf-8")
    assert found.table["rows"] == [item.task.id for item in parts.items["validation"]]
    by_file = {row["file"]: row for row in found.table["candidates"]}
    assert by_file["seed-0/experience-003.md"]["score"]["mean"] == 0.5
    assert by_file["seed-1/experience-003.md"]["score"]["mean"] == pytest.approx(1 / 6)
    assert all(low <= row["score"]["mean"] <= high for row in by_file.values()
               for low, high in [row["score"]["ci95"]])  # fmt: skip
    assert folder.growth.read_text("utf-8").startswith("<?xml")


def test_where_no_items_is_best_nothing_is_selected_and_that_is_said(
    parts: Parts, tmp_path: Path
) -> None:
    """An earlier choice does not stay in its place."""
    folder = RoundFolder(tmp_path / "round")
    grown(folder)
    folder.selected.write_text("- an earlier one\n", encoding="utf-8")
    wrong = parts.renderer.encode("b")
    parts.engine = ScriptedEngine(lambda *_: (*wrong, END_ID))
    found = select(parts, folder, str)
    assert not folder.selected.exists()
    assert found.table["chosen"]["items"] == 0
    assert found.table["verdict"].startswith("no items: 0.000 without any experience")
