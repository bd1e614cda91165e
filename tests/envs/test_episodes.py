"""`opcd.envs.episodes`: histories, batches of those still active, the same episodes again."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from opcd.config.games import FrozenLake
from opcd.config.training import Rendering
from opcd.envs.env import Env
from opcd.envs.episodes import Played, Player, Turn, play_episodes
from opcd.envs.games import make_env
from opcd.errors import OverLongError
from opcd.rendering import Renderer
from opcd.rollouts.engine import Policy, Prompt, Sampling
from opcd.rollouts.scripted import ScriptedEngine
from opcd.types import Context, Message, Rollout
from worlds import CHATML, END_ID, tokenizer

TOKENIZER = tokenizer(CHATML)
LAKE = ("SFF", "FHF", "FFG")
SOLUTION = ("down", "down", "right", "right")

Reply = Callable[[str, str], str]
"""`(episode id, turn number) -> reply`."""


class Recorder(ScriptedEngine):
    """Also remembers the prompts of each call."""

    calls: list[list[Prompt]]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        self.calls = [*getattr(self, "calls", []), list(prompts)]
        return super().generate(prompts, sampling)


def engine_of(reply: Reply) -> Recorder:
    def script(policy: Policy, prompt: Prompt) -> list[int]:
        del policy
        episode, _, number = prompt.task_id.rpartition("/turn-")
        text = reply(episode, number)
        return [*TOKENIZER.encode(text, add_special_tokens=False), END_ID]

    return Recorder(script)


def player_of(engine: Any, positions: int = 4096, **more: Any) -> Player:
    over_long = more.pop("over_long", "error")
    renderer = Renderer(TOKENIZER, Rendering(over_long=over_long), positions)
    return Player(engine, renderer, Sampling(), 200, **more)


def envs(*names: str, **config: Any) -> dict[str, Env]:
    return {name: make_env(FrozenLake(**config), LAKE) for name in names}


def solve(episode: str, number: str) -> str:
    """The solution, with thoughts that mention other actions; "slow" loses its first turn."""
    del episode
    return f"Not [up], that is secret thought {number}. [{SOLUTION[int(number) - 1]}]"


def test_an_episode_keeps_its_turns_its_ending_and_its_outcome() -> None:
    (episode,) = play_episodes(envs("a"), player_of(engine_of(solve))).episodes
    assert (episode.id, episode.outcome, episode.ending.kind) == ("a", 1.0, "solved")
    assert [turn.action for turn in episode.turns] == list(SOLUTION)
    assert [turn.task.id for turn in episode.turns] == [f"a/turn-{n}" for n in (1, 2, 3, 4)]
    assert episode.turns[-1].result.ending == episode.ending
    for turn in episode.turns:
        assert turn.rollout.task_id == turn.pair.task_id == turn.task.id
        assert turn.reply == TOKENIZER.decode(turn.rollout.response_ids, skip_special_tokens=True)


def test_each_prompt_is_one_user_message_with_the_whole_history() -> None:
    """Observations and parsed actions, none of the reasoning."""
    (episode,) = play_episodes(envs("a", rules=False), player_of(engine_of(solve))).episodes
    third = episode.turns[2].task
    assert third.messages == (
        Message(
            "user",
            "You are P.\n\nThe actions are [up], [down], [left] and [right], which can also be "
            "written [w], [s], [a] and [d]. Pick one.\n\nP _ _\n_ H _\n_ _ G\n\n"
            "Your action: [down]\n\n_ _ _\nP H _\n_ _ G\n\n"
            "Your action: [down]\n\n_ _ _\n_ H _\nP _ G",
        ),
    )
    assert not any("secret" in turn.task.messages[0].content for turn in episode.turns)
    assert [len(turn.task.messages) for turn in episode.turns] == [1] * 4


def test_what_the_engine_was_asked_is_the_rendered_task() -> None:
    engine = engine_of(solve)
    player = player_of(engine)
    (episode,) = play_episodes(envs("a"), player).episodes
    for call, turn in zip(engine.calls, episode.turns, strict=True):
        ids = player.renderer.encode(player.renderer.text(turn.task.messages))
        assert call == [Prompt(turn.task.id, ids, 200)]
        assert turn.pair.student_ids == ids


def test_each_turn_is_one_call_with_the_active_episodes_alone() -> None:
    """An episode that is over is not asked again, and nobody waits for a call of their own."""

    def reply(episode: str, number: str) -> str:
        return {"falls": ["[d]", "[s]"], "silent": ["well", "hm"]}.get(
            episode, ["[down]", "[down]", "[right]", "[right]"]
        )[int(number) - 1]

    engine = engine_of(reply)
    played = play_episodes(envs("falls", "solves", "silent"), player_of(engine))
    assert [[prompt.task_id for prompt in call] for call in engine.calls] == [
        ["falls/turn-1", "solves/turn-1", "silent/turn-1"],
        ["falls/turn-2", "solves/turn-2", "silent/turn-2"],
        ["solves/turn-3"],
        ["solves/turn-4"],
    ]
    assert [(e.id, e.ending.kind, e.outcome) for e in played.episodes] == [
        ("falls", "failed", 0.0),
        ("solves", "solved", 1.0),
        ("silent", "invalid_moves", 0.0),
    ]


def test_task_ids_are_unique_over_episodes_and_turns() -> None:
    """Ids seed the sampling: two prompts of one name would draw the same tokens."""
    engine = engine_of(lambda episode, number: "[right]" if number in "13" else "[left]")
    play_episodes(envs("a", "b", "c"), player_of(engine))
    ids = [prompt.task_id for call in engine.calls for prompt in call]
    assert len(ids) == len(set(ids)) == 15


def test_an_unsolved_episode_ends_with_its_turns() -> None:
    engine = engine_of(lambda episode, number: "[right]" if number in "13" else "[left]")
    (episode,) = play_episodes(envs("a", turns=4), player_of(engine)).episodes
    assert (episode.ending.kind, len(episode.turns)) == ("out_of_turns", 4)


def slippery(names: Sequence[str]) -> dict[str, Env]:
    config = FrozenLake(slippery=True, turns=8, invalid_moves_allowed=8)
    return {name: make_env(config, LAKE, seed=ord(name)) for name in names}


def test_the_same_seeds_play_the_same_episodes_in_any_company() -> None:
    """Who else is being played must not change an episode, nor a second try."""

    def reply(episode: str, number: str) -> str:
        return f"[{'wasd'[(ord(episode) + 3 * int(number)) % 4]}]"

    def play(names: str) -> Played:
        return play_episodes(slippery(names), player_of(engine_of(reply)))

    together = play("abcdef")
    assert play("abcdef") == together
    assert play("fcb").episodes == tuple(together.episodes[i] for i in (5, 2, 1))
    assert len({tuple(t.result.observation for t in e.turns) for e in together.episodes}) > 2


def test_the_context_is_in_the_teacher_s_prompts_alone() -> None:
    """Both prompts of a turn are kept; `side` says which of them is answered."""
    context = Context(system="Holes are marked H.")
    for side in ("student", "teacher"):
        engine = engine_of(solve)
        player = player_of(engine, contexts={"a": context}, side=side)
        (episode,) = play_episodes(envs("a"), player).episodes
        for call, turn in zip(engine.calls, episode.turns, strict=True):
            student, teacher = map(TOKENIZER.decode, (turn.pair.student_ids, turn.pair.teacher_ids))
            assert context.system in teacher and context.system not in student
            assert teacher.endswith(student)
            assert TOKENIZER.decode(call[0].ids) == {"student": student, "teacher": teacher}[side]


def lengths() -> list[int]:
    """Tokens of the prompts of a game of four turns; each is longer than the one before."""
    (episode,) = play_episodes(envs("a"), player_of(engine_of(solve))).episodes
    return [len(turn.pair.student_ids) for turn in episode.turns]


def test_a_history_that_does_not_fit_is_an_error_or_a_dropped_episode() -> None:
    """Never cut: a prompt without its beginning would be another game."""
    room = lengths()[2]

    def reply(episode: str, number: str) -> str:
        return (
            "[d]"
            if episode == "short" and number == "1"
            else ("[s]" if episode == "short" else solve(episode, number))
        )

    with pytest.raises(OverLongError, match="a/turn-4"):
        play_episodes(envs("a"), player_of(engine_of(reply), room))
    player = player_of(engine_of(reply), room, over_long="drop_row")
    played = play_episodes(envs("a", "short"), player)
    (dropped,) = played.dropped
    assert (dropped.id, dropped.ending.kind, dropped.outcome) == ("a", "over_long", 0.0)
    assert [turn.action for turn in dropped.turns] == list(SOLUTION[:3])
    assert [(e.id, e.ending.kind) for e in played.episodes] == [("short", "failed")]


def test_each_turn_is_shown_as_soon_as_it_is_played() -> None:
    seen: list[Turn] = []
    played = play_episodes(envs("a", "b"), player_of(engine_of(solve)), seen.append)
    assert [turn.task.id for turn in seen] == [
        f"{name}/turn-{number}" for number in (1, 2, 3, 4) for name in "ab"
    ]
    assert {id(turn) for turn in seen} == {id(t) for e in played.episodes for t in e.turns}


def test_no_episodes_ask_nothing() -> None:
    engine = engine_of(solve)
    assert play_episodes({}, player_of(engine)) == Played(())
    assert engine.asked == []


def test_an_environment_that_was_played_before_is_refused() -> None:
    used = envs("a")
    play_episodes(used, player_of(engine_of(solve)))
    with pytest.raises(AssertionError, match="'a' was over before its first turn"):
        play_episodes(used, player_of(engine_of(solve)))
