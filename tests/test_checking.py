"""`opcd.checking`: what `opcd check` says of a game, and refuses, without a model."""

from pathlib import Path

import pytest

from opcd.checking import check_run
from opcd.errors import ConfigError, ContextError, GameError
from worlds import RUN, write_run

TASKS = """
[tasks]
train = "train.jsonl"
validation = "validation.jsonl"
test = "test.jsonl"

[grader]
type = "exact"
"""
LAKE = "[game]\ntype = 'frozen_lake'\nrules = false\n"
GAME = RUN.replace(TASKS, "")


def game_run(folder: Path, tables: str = LAKE) -> Path:
    return write_run(folder, tables=tables, toml=GAME)


def test_a_game_is_told_by_its_episodes_and_boards(tmp_path: Path) -> None:
    _, facts = check_run(game_run(tmp_path), ["game.turns=4", "anchor.context_return=0.1"])
    assert facts[0].endswith(
        "4 steps of 10 episodes of up to 4 turns, 6 anchors and 2 episodes with the context"
    )
    assert facts[-1] == "frozen_lake: 4 train, 2 extraction, 2 validation, 2 test"
    assert not any(fact.startswith("warning") for fact in facts)


def test_a_game_without_validation_boards_says_what_that_means(tmp_path: Path) -> None:
    boards = "game.boards={train=2, extraction=0, validation=0, test=1}"
    _, facts = check_run(game_run(tmp_path), [boards])
    assert facts[-1] == "frozen_lake: 2 train, 1 test"
    assert any("no validation split" in fact for fact in facts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["grader.type=exact"],
            r"\[grader\] and a \[game\].*the game itself says.*remove \[grader",
        ),
        (
            ["tasks.train=train.jsonl"],
            r"\[tasks\] and a \[game\].*boards are its tasks.*remove one",
        ),
        (["context={type='column'}"], r"context.type is column but a board brings no text"),
        (["game.boards={train=0}"], r"game.boards.train = 0 leaves nothing to train on"),
        (["game.type=chess"], r"game.*'chess'"),
        (["evaluation.select_by=turns"], r"select_by = 'turns' is nothing that a game's weights"),
    ],
)
def test_what_does_not_fit_a_game_is_named(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(game_run(tmp_path), overrides)


def test_a_run_without_tasks_or_a_game_is_told_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a \[tasks\] table nor a \[game\].*write"):
        check_run(game_run(tmp_path, ""))


def test_too_few_boards_and_a_missing_context_are_found(tmp_path: Path) -> None:
    with pytest.raises(GameError, match="train 99"):
        check_run(game_run(tmp_path), ["game.boards={train=99}"])
    with pytest.raises(ContextError, match=r"nothing\.md"):
        check_run(tmp_path / "run.toml", ["context.path=nothing.md"])
