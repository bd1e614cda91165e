"""`opcd.envs.env`: what counts as an action, what is forgiven, and how an episode ends."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.envs.env import (
    STEPS,
    WRITTEN,
    Action,
    BoardEnv,
    Effect,
    Ending,
    Env,
    Limits,
    history_text,
    introduce,
    parse_action,
)


@dataclass
class Corridor:
    """A world of one row: right is a step, left is not possible, up loses, the end solves."""

    end: int
    at: int = 0

    @property
    def text(self) -> str:
        return f"at {self.at}"

    def move(self, action: Action) -> Effect:
        if action == "left":
            return Effect("No way left.", valid=False)
        if action == "up":
            return Effect("Lost.", verdict="failed")
        self.at += 1
        return Effect("Solved.", verdict="solved") if self.at == self.end else Effect()


def corridor(length: int = 9, turns: int = 5, allowed: int = 1) -> BoardEnv:
    return BoardEnv(Corridor(length), "Go.", Limits(turns, allowed))


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("[up]", "up"),
        ("I could go [up], but [left] is better.", "left"),
        ("[D]", "right"),
        ("[ Down ]\n", "down"),
        ("[a] then [w]", "up"),
        ("[s]", "down"),
        ("[up] as in [the rules]", "up"),
        ("up", None),
        ("[upwards]", None),
        ("(left) {a} [x] []", None),
        ("", None),
    ],
)
def test_the_last_action_in_brackets_counts(reply: str, action: Action | None) -> None:
    """Models think aloud before they decide, and quote what is no action."""
    assert parse_action(reply) == action


WORDS = st.sampled_from(sorted(WRITTEN))


@given(st.lists(WORDS, min_size=1), st.text(alphabet="ab []up", max_size=8))
def test_text_between_brackets_changes_nothing(words: list[str], noise: str) -> None:
    """Whatever is said between, the reply means its last action."""
    quiet = noise.replace("[", "").replace("]", "")
    reply = quiet.join(f"[{word}]" for word in words) + quiet
    assert parse_action(reply) == WRITTEN[words[-1]]


def test_letters_are_where_they_are_on_a_keyboard() -> None:
    """W above S, A left of D; up is towards the first row."""
    assert {letter: STEPS[WRITTEN[letter]] for letter in "wasd"} == {
        "w": (-1, 0),
        "a": (0, -1),
        "s": (1, 0),
        "d": (0, 1),
    }


def test_a_solved_game_has_outcome_1_and_no_other() -> None:
    env = corridor(length=2)
    assert (env.finished, env.outcome, env.observation) == (False, 0.0, "at 0")
    assert env.act("right").ending is None
    assert env.outcome == 0.0
    done = env.act("right")
    assert done.ending == Ending("solved", "Solved.")
    assert (env.finished, env.outcome, env.observation) == (True, 1.0, "Solved.\nat 2")
    lost = corridor()
    assert lost.act("up").ending == Ending("failed", "Lost.")
    assert (lost.finished, lost.outcome) == (True, 0.0)


def test_one_warning_then_the_end() -> None:
    """A valid move in between does not wipe the first invalid one out."""
    env = corridor(turns=9)
    warned = env.act("left")
    assert (warned.valid, warned.ending) == (False, None)
    assert warned.observation == "No way left. The next invalid move ends the game.\nat 0"
    assert env.act("right").observation == "at 1"
    done = env.act("left").ending
    assert done and done.kind == "invalid_moves"
    assert done.feedback == "No way left. The game is over: 2 invalid moves."
    assert env.outcome == 0.0


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_as_many_invalid_moves_are_forgiven_as_configured(allowed: int) -> None:
    env = corridor(turns=9, allowed=allowed)
    taken = 0
    while not env.finished:
        env.act("left")
        taken += 1
    assert taken == allowed + 1


def test_warnings_say_how_many_are_left() -> None:
    env = corridor(turns=9, allowed=3)
    assert "After 2 more, the next invalid move ends the game." in env.act("left").observation
    assert "After 1 more, the next" in env.act("left").observation
    assert "left. The next invalid" in env.act("left").observation


def test_a_reply_without_an_action_is_invalid_and_says_so_in_its_own_words() -> None:
    """Not the message of a wall: the model has to learn the format."""
    result = corridor().act(None)
    assert not result.valid
    assert result.observation.startswith("No action was found in your reply.")


@pytest.mark.parametrize("turns", [1, 4, 5])
def test_the_turn_limit_ends_an_unsolved_game(turns: int) -> None:
    env = corridor(turns=turns)
    for _ in range(turns - 1):
        assert env.act("right").ending is None
    done = env.act("right").ending
    assert done and (done.kind, done.outcome) == ("out_of_turns", 0.0)
    assert f"limit of {turns} turns" in done.feedback


def test_an_invalid_move_costs_a_turn() -> None:
    env = corridor(turns=2)
    env.act("left")
    done = env.act("right").ending
    assert done and done.kind == "out_of_turns"


def test_the_last_turn_may_still_solve_it() -> None:
    env = corridor(length=3, turns=3)
    kinds = [result.ending.kind for _ in range(3) if (result := env.act("right")).ending]
    assert kinds == ["solved"]


def test_an_episode_is_used_once() -> None:
    """Acting on after the end would count turns that nobody played."""
    env: Env = corridor(turns=1)
    env.act("right")
    with pytest.raises(AssertionError, match="over; make a new environment"):
        env.act("right")


def test_without_rules_the_text_says_who_and_which_actions() -> None:
    """Nothing about limits, invalid moves or symbols: they are to be found out."""
    text = introduce("P", "", Limits(5, 1))
    assert text == (
        "You are P.\n\nThe actions are [up], [down], [left] and [right], which can also be written "
        "[w], [s], [a] and [d]. Pick one."
    )


def test_rules_name_the_limits_that_hold() -> None:
    text = introduce("P", "Reach G.", Limits(7, 2))
    assert "Reach G.\nYou have 7 turns" in text
    assert "2 invalid moves are forgiven" in text
    assert "No invalid move is forgiven" in introduce("P", "R", Limits(7, 0))


def test_games_need_no_torch() -> None:
    """A person can play at once; only episodes through an engine load it."""
    code = (
        "import sys, opcd.playing, opcd.config.games\n"
        "import gymnasium.envs.toy_text.frozen_lake\n"
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reply_without_an_action_is_in_the_history_with_its_warning() -> None:
    text = history_text("Go.", ["at 0", "No action.\nat 0", "at 1"], [None, "up"])
    assert text == (
        "Go.\n\nat 0\n\nYour reply had no action.\n\nNo action.\nat 0\n\nYour action: [up]\n\nat 1"
    )
