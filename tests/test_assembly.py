"""`opcd.assembly`: items are what the run asks, each with the context that its teacher sees."""

from pathlib import Path

import pytest

from opcd.assembly import assemble, with_context
from opcd.envs.games import openings_of
from opcd.errors import OverLongError
from opcd.types import Context
from tiny import make_game_run, make_run


def test_items_know_the_context_they_were_rendered_with(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    parts = assemble(make_run(tmp_path, tiny_model_path))
    assert list(parts.items) == ["train", "validation", "test"]
    for item in (item for items in parts.items.values() for item in items):
        assert item.context == Context(system="Answer in verse.") and item.game is None
        assert item.pair == parts.renderer.pair(item.task, item.context)


def test_boards_become_items_by_split(player_path: Path, tmp_path: Path) -> None:
    """Also those that experience is gathered on; `task` and `pair` are their first turn."""
    parts = assemble(make_game_run(tmp_path, player_path))
    assert parts.config.game
    boards = openings_of(parts.config.game)
    assert {split: len(items) for split, items in parts.items.items()} == {
        "train": 4,
        "extraction": 2,
        "validation": 2,
        "test": 2,
    }
    for split, items in parts.items.items():
        assert [(item.task.id, item.game) for item in items] == list(boards[split].items())  # type: ignore[index]
        for item in items:
            assert item.game
            env = item.game.start()
            text = f"{env.introduction}\n\n{env.observation}"
            assert [m.content for m in item.task.messages] == [text]
            assert item.pair == parts.renderer.pair(item.task, Context("Go down, then right."))


def test_items_with_another_context_are_the_same_tasks(player_path: Path, tmp_path: Path) -> None:
    """None is dropped, whatever the run does with rows that do not fit."""
    parts = assemble(make_game_run(tmp_path, player_path, "rendering.over_long=drop_row"))
    items = parts.items["validation"]
    others = with_context(parts, items, Context(system="Mind the holes."))
    for item, other in zip(items, others, strict=True):
        assert (other.task, other.game) == (item.task, item.game)
        assert other.pair.student_ids == item.pair.student_ids
        assert other.context.system == "Mind the holes."
        assert "Mind the holes." in parts.renderer.decode(other.pair.teacher_ids)
    with pytest.raises(OverLongError, match="validation-00000"):
        with_context(parts, items, Context(system="Mind the holes. " * 900))


def test_turns_that_cannot_fit_are_known_before_the_run(player_path: Path, tmp_path: Path) -> None:
    """Not after an hour: the last turn is tried first."""
    keys = ("game.turns=9", "rendering.max_prompt_tokens=300")
    with pytest.raises(OverLongError, match=r"train-00000/turn-9.*at most 300"):
        assemble(make_game_run(tmp_path, player_path, *keys))
    notes = assemble(
        make_game_run(tmp_path, player_path, *keys, "rendering.over_long=drop_row")
    ).notes
    assert any(note.startswith("episodes that go on so long are dropped") for note in notes)
