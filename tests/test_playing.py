"""`opcd.playing` and its verb: a person plays by typing, or watches a model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from opcd import authoring, cli
from opcd.config.games import FrozenLake, Sokoban
from opcd.config.training import Rendering
from opcd.errors import GameError
from opcd.playing import MODEL_REPLY_TOKENS, play_model, play_person, read_game
from opcd.rendering import Renderer
from opcd.rollouts.engine import Prompt
from opcd.rollouts.scripted import ScriptedEngine
from worlds import CHATML, END_ID, tokenizer

TOKENIZER = tokenizer(CHATML)


def opcd(*arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(cli.app, ["play", *arguments], input=typed)


def test_a_person_solves_a_lake() -> None:
    """Words, letters and brackets are all understood; an empty line is asked again."""
    done = opcd("frozen-lake", "--holes", "0", typed="down\n\ns\n[right]\nD\n")
    assert done.exit_code == 0, done.output
    assert "You are P." in done.output and "H is a hole" in done.output
    assert "You reached G: solved." in done.output
    assert done.output.count("action (q to stop): ") == 5


@pytest.mark.parametrize("typed", ["q\n", "QUIT\n", ""])
def test_a_person_can_stop(typed: str) -> None:
    """By `q`, or where the input ends; nothing is an error."""
    done = opcd("sokoban", typed=typed)
    assert (done.exit_code, done.exception) == (0, None)
    assert done.output.rstrip().endswith("stopped")


def test_ctrl_c_stops_cleanly() -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    said: list[str] = []
    env = play_person(FrozenLake(), interrupt, said.append)
    assert (said[-1], env.finished) == ("stopped", False)


def test_what_is_not_understood_counts_as_for_a_model() -> None:
    done = opcd("frozen-lake", typed="north\nnorth\n")
    assert "No action was found" in done.output
    assert "The game is over: 2 invalid moves." in done.output
    assert done.exit_code == 0


def test_options_make_the_game() -> None:
    lake = opcd(
        "frozen-lake", "--size", "5", "--holes", "4", "--slippery", "--no-rules", typed="q\n"
    )
    board = re.findall(r"^(?:[P_HG] ){4}[P_HG]$", lake.output, re.MULTILINE)
    assert len(board) == 5 and "".join(board).count("H") == 4
    assert "hole" not in lake.output and "slippery" not in lake.output
    told = opcd("frozen-lake", "--slippery", "--turns", "8", typed="q\n")
    assert "The ice is slippery" in told.output and "You have 8 turns" in told.output
    room = opcd("sokoban", "--size", "7", "--boxes", "2", "--turns", "9", typed="q\n")
    picture = re.findall(r"^#(?: \S){6}$", room.output, re.MULTILINE)
    assert len(picture) == 7
    assert sum(map("".join(picture).count, "X*")) == 2


def test_the_seed_decides_the_board() -> None:
    boards = [opcd("sokoban", "--seed", seed, typed="q\n").output for seed in "0012"]
    assert boards[0] == boards[1]
    assert len(set(boards)) == 3


def test_turns_follow_the_size_unless_given() -> None:
    """One more than the shortest path across; the paper's 5 on its 3 x 3."""
    assert [read_game("frozen-lake", {"size": size}).turns for size in (None, 3, 4, 8)] == [
        5,
        5,
        7,
        15,
    ]
    assert read_game("frozen-lake", {"size": 4, "turns": 20}).turns == 20
    assert read_game("sokoban", {}) == Sokoban(turns=11)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chess", {}, "'chess' is no game; play frozen-lake or sokoban"),
        ("sokoban", {"holes": 2}, "--holes is no option of sokoban"),
        ("sokoban", {"slippery": True}, "--slippery is no option of sokoban"),
        ("frozen-lake", {"boxes": 1}, "--boxes is no option of frozen-lake"),
        ("frozen-lake", {"size": 1}, "--size 1: Input should be greater than or equal to 2"),
        ("frozen-lake", {"size": 4, "turns": 5}, "^turns = 5, but the shortest path"),
        ("sokoban", {"boxes": 9}, "too few to move 9 boxes"),
    ],
)
def test_games_that_cannot_be_played_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(GameError, match=message):
        read_game(name, options)


def test_wrong_options_end_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["opcd", "play", "frozen-lake", "--boxes", "1"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert "GameError: --boxes is no option of frozen-lake" in capsys.readouterr().err


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Replies that a model gives in turn, whatever it is asked."""
    replies = ["Down it is: [down]", "no idea", "I say [up].", "[d] [right]", "[s]"]

    def script(policy: str, prompt: Prompt) -> list[int]:
        assert policy == "base"
        assert prompt.max_new_tokens == MODEL_REPLY_TOKENS
        return [*TOKENIZER.encode(replies.pop(0), add_special_tokens=False), END_ID]

    def load(path: str, device: str) -> tuple[ScriptedEngine, Renderer]:
        assert (path, device) == ("some/model", "cpu")
        return ScriptedEngine(script), Renderer(TOKENIZER, Rendering(), 4096)

    monkeypatch.setattr(authoring, "load_answering", load)
    yield replies


def test_a_model_plays_and_every_turn_is_shown(scripted: list[str]) -> None:
    """The board, the reply and what was read from it, but not the prompt with its history."""
    done = opcd("frozen-lake", "--holes", "0", "--model", "some/model", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "turn 1, reply: Down it is: [down]\naction: [down]\n_ _ _\nP _ _\n_ _ G" in done.output
    assert "turn 2, reply: no idea\naction: none\nNo action was found" in done.output
    assert "turn 4, reply: [d] [right]\naction: [right]" in done.output
    assert "The limit of 5 turns is reached" in done.output
    assert done.output.count("You are P.") == 1
    assert "Your action:" not in done.output
    assert scripted == []


def test_a_reply_that_was_cut_says_so(scripted: list[str]) -> None:
    scripted[:] = ["[up] " * 400, "[up]"]
    said: list[str] = []
    play_model(FrozenLake(), "some/model", "cpu", said.append)
    assert "turn 1, reply (cut off after 256 tokens): [up]" in said[1]


def test_ctrl_c_stops_a_model(scripted: list[str]) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "turn 2" in text:
            raise KeyboardInterrupt

    env = play_model(FrozenLake(), "some/model", "cpu", say)
    assert (said[-1], env.finished) == ("\nstopped", False)
    assert len(scripted) == 3


def test_a_real_model_can_play(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, rendering, sampling and decoding together; random weights rarely say an action."""
    monkeypatch.setattr("opcd.playing.MODEL_REPLY_TOKENS", 12)
    monkeypatch.setattr("opcd.weights.positions", lambda path: 4096)
    done = opcd("frozen-lake", "--no-rules", "--model", str(tiny_model_path), "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "turn 1, reply" in done.output
    assert "The game is over: 2 invalid moves." in done.output


def test_a_model_that_is_not_there_is_refused() -> None:
    done = opcd("sokoban", "--model", "./nothing")
    assert done.exit_code == 1 and "no such folder" in str(done.exception)
