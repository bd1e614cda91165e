"""`opcd.drawing`: whose prompts a step has, and who answers them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd.assembly import Parts, assemble
from opcd.distill import count_rollouts, distill
from opcd.drawing import (
    Rollouts,
    answer_as_teacher,
    draw_pairs,
    draw_tasks,
    name_episodes,
    play,
    roll_out,
    sampling_of,
)
from opcd.errors import ConfigError, RolloutError
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.scripted import ScriptedEngine
from opcd.tally import Tally
from opcd.training import prepare
from opcd.types import Rollout
from tiny import acting, make_game_run, make_run, parts_of, scripted

LORA = ('model.tuning={type="lora", rank=4}',)


def started(tmp_path: Path, model: Path, *overrides: str) -> Parts:
    """Scripted parts."""
    return parts_of(make_run(tmp_path, model, *overrides))


def test_context_return_comes_in_every_so_many_steps(tiny_model_path: Path, tmp_path: Path) -> None:
    """As many rows on the whole, and the same ones; the other steps have none."""

    def returned(every: int) -> list[list[str]]:
        keys = ("anchor.context_return=0.25", f"anchor.return_every_steps={every}", "steps=4")
        parts = started(tmp_path / str(every), tiny_model_path, *LORA, *keys)
        pairs = [draw_pairs(parts, step)[0] for step in range(4)]
        return [[p.task_id for p in taught if p.origin == "context_return"] for taught in pairs]

    each, second = returned(1), returned(2)
    assert [len(ids) for ids in each] == [1, 1, 1, 1]
    assert [len(ids) for ids in second] == [2, 0, 2, 0]
    assert [*chain(*each)] == [*chain(*second)]


def test_anchors_without_a_system_message_where_only_tasks_should_change(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """`anchor.scope`: half of them, rounded down."""
    for scope, bare in (("all_prompts", 0), ("tasks", 1)):
        keys = (*LORA, f"anchor.scope={scope}", "anchor.share=0.75")
        parts = started(tmp_path / scope, tiny_model_path, *keys)
        anchors = [p for p in draw_pairs(parts, 0)[1] if p.origin == "anchor"]
        texts = [parts.renderer.decode(p.student_ids) for p in anchors]
        without = [text.startswith("user") for text in texts]
        assert (len(anchors), without.count(True)) == (3, bare)


def test_a_share_of_the_prompts_is_answered_by_their_teachers(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Off-policy rows are asked under "base" with the teacher's prompt, the rest as ever."""
    overrides = (*LORA, "rollout.teacher_fraction=0.67", "anchor.share=0.5")
    parts = started(tmp_path, tiny_model_path, *overrides)
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}

    def script(policy: str, prompt: Prompt) -> tuple[int, ...]:
        seen[prompt.task_id] = (policy, prompt.ids)
        return scripted(policy, prompt)

    parts.engine = parts.teacher_engine = ScriptedEngine(script)
    pairs = [answered.pair for answered in roll_out(parts, 0).answered]
    policies = [seen[pair.task_id][0] for pair in pairs]
    asked = [(policy, pair.origin) for policy, pair in zip(policies, pairs, strict=True)]
    assert asked == [(p, o) for p in ("base", "student") for o in ("task", "anchor")]
    for pair in pairs:
        policy, ids = seen[pair.task_id]
        assert ids == (pair.teacher_ids if policy == "base" else pair.student_ids)


def test_a_moving_teacher_cannot_answer(tiny_model_path: Path, tmp_path: Path) -> None:
    overrides = ('teacher={type="ema"}', "rollout.teacher_fraction=0.5")
    with pytest.raises(ConfigError, match=r"teacher_fraction = 0.5 .*teacher.type = 'ema'"):
        make_run(tmp_path, tiny_model_path, *overrides)


def test_a_task_drawn_twice_is_answered_twice_by_the_teacher(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Its answers for ten steps are made in one call, but each is a draw of its own."""
    parts = started(tmp_path, tiny_model_path, *LORA, "rollout.teacher_fraction=1.0", "steps=12")
    asked: list[tuple[str, str]] = []
    generate = parts.teacher_engine.generate

    def watched(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        asked.extend((prompt.task_id, prompt.draw) for prompt in prompts)
        return generate(prompts, sampling)

    parts.teacher_engine.generate = watched  # type: ignore[method-assign]
    steps = [answer_as_teacher(parts, step) for step in range(12)]
    assert [len(step) for step in steps] == [4] * 12, "three tasks and an anchor"
    assert len(set(asked)) == len(asked) == 48 > len({task for task, _ in asked})
    assert answer_as_teacher(parts, 5)[0].pair == steps[5][0].pair, "whatever step comes first"


def playing(tmp_path: Path, model: Path, *overrides: str) -> Parts:
    """Parts of a game whose player goes down, down, right, right, and thinks of [up] first."""
    parts = assemble(make_game_run(tmp_path, model, *LORA, "rollout.max_new_tokens=40", *overrides))
    way = ["[down]", "[down]", "[right]", "[right]", "[right]"]
    parts.engine = acting(parts.renderer, lambda _, number: f"Not [up]. {way[number - 1]}")
    parts.teacher_engine = parts.engine
    return parts


def test_every_turn_of_every_episode_is_a_sample(player_path: Path, tmp_path: Path) -> None:
    """Behind what was seen, without the context and with it; anchors come after them as ever."""
    parts = playing(tmp_path, player_path)
    rollouts = roll_out(parts, 0)
    episodes = rollouts.played.episodes
    assert len(episodes) == 3 and rollouts.played.dropped == ()
    turns = [turn for episode in episodes for turn in episode.turns]
    tasks = [a for a in rollouts.answered if a.pair.origin == "task"]
    assert [a.pair.task_id for a in tasks] == [turn.task.id for turn in turns]
    assert [a.pair.origin for a in rollouts.answered[len(tasks) :]] == ["anchor"]
    context = "Go down, then right."
    for answered, turn in zip(tasks, turns, strict=True):
        student = parts.renderer.decode(answered.pair.student_ids)
        teacher = parts.renderer.decode(answered.pair.teacher_ids)
        assert turn.task.messages[0].content in student and context not in student
        assert context in teacher and teacher.endswith(student)
        assert answered.rollout == turn.rollout
    assert {item.task.id for item in draw_tasks(parts, 0)} == {e.id for e in episodes}
    policies = {policy for policy, id_ in parts.engine.asked if "/turn-" in id_}  # type: ignore[attr-defined]
    assert policies == {"student"}


def test_metrics_say_how_the_games_went(player_path: Path, tmp_path: Path) -> None:
    parts = playing(tmp_path, player_path, "game.turns=4", "game.invalid_moves_allowed=0")
    found = next(distill(parts, prepare(parts)))
    episodes = roll_out(parts, 0).played.episodes
    row = found.metrics
    assert row["episodes"] == 3 and row["dropped_episodes"] == 0
    assert row["turns"] == sum(len(episode.turns) for episode in episodes)
    assert row["turns"] == sum(a.pair.origin == "task" for a in found.answered)
    assert row["outcome"] == sum(episode.outcome for episode in episodes) / 3
    assert row["invalid_moves"] == sum(e.ending.kind == "invalid_moves" for e in episodes) == 0
    tokens = [len(a.rollout.response_ids) for a in found.answered if a.pair.origin == "task"]
    assert row["response_tokens"] == sum(tokens)
    parts.engine = acting(parts.renderer, lambda *_: "[up]")
    row = next(distill(parts, prepare(parts))).metrics
    assert (row["invalid_moves"], row["turns"], row["outcome"]) == (3, 3, 0.0)


def test_single_answers_have_no_games_to_speak_of(tiny_model_path: Path, tmp_path: Path) -> None:
    parts = started(tmp_path, tiny_model_path, *LORA)
    assert "episodes" not in next(distill(parts, prepare(parts))).metrics


def test_a_board_that_is_drawn_twice_is_played_twice(player_path: Path, tmp_path: Path) -> None:
    """On slippery ice each episode slips in its own way, and the next step's in another."""
    slippery = ("game.slippery=true", "game.turns=8", "game.invalid_moves_allowed=8")
    boards = "game.boards={train=1, extraction=0, validation=1, test=1}"
    few = (boards, "batch.prompts_per_step=8", "anchor.share=0")
    parts = playing(tmp_path, player_path, *slippery, *few)
    parts.engine = acting(parts.renderer, lambda *_: "[down]")
    steps = [roll_out(parts, step).played.episodes for step in (0, 0, 1)]
    assert [e.id for e in steps[0]] == ["train-00000", *(f"train-00000/{n}" for n in range(2, 9))]
    seen = [[tuple(t.result.observation for t in e.turns) for e in step] for step in steps]
    assert len(set(seen[0])) > 2
    assert seen[0] == seen[1] != seen[2]


def test_the_teacher_plays_its_share_with_the_context(player_path: Path, tmp_path: Path) -> None:
    """Off-policy boards are played by the base; the samples look as the student's do."""
    parts = playing(tmp_path, player_path, "rollout.teacher_fraction=0.67", "anchor.share=0")
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    script = parts.engine.script  # type: ignore[attr-defined]

    def watched(policy: str, prompt: Prompt) -> tuple[int, ...]:
        seen[prompt.task_id] = (policy, prompt.ids)
        return script(policy, prompt)

    parts.engine = parts.teacher_engine = ScriptedEngine(watched)
    rollouts = roll_out(parts, 0)
    by_teacher = [e for e in rollouts.played.episodes if seen[e.turns[0].task.id][0] == "base"]
    assert (len(by_teacher), len(rollouts.played.episodes)) == (3, 4)
    for answered in rollouts.answered:
        policy, ids = seen[answered.pair.task_id]
        pair = answered.pair
        assert pair.origin == "task" and pair.teacher_ids != pair.student_ids
        assert ids == (pair.teacher_ids if policy == "base" else pair.student_ids)


def test_a_game_given_back_its_context_is_played_by_the_base_on_both_sides(
    player_path: Path, tmp_path: Path
) -> None:
    parts = playing(tmp_path, player_path, "anchor.context_return=0.25", "anchor.share=0")
    rollouts = roll_out(parts, 0)
    returned = [a for a in rollouts.answered if a.pair.origin == "context_return"]
    (board,) = {a.pair.task_id.rpartition("/turn-")[0] for a in returned}
    assert board.startswith("train-") and board.endswith("/context_return")
    assert len(returned) > 1 and len(rollouts.played.episodes) == 3, "it is none of the tasks"
    for answered in returned:
        assert answered.pair.student_ids == answered.pair.teacher_ids
        assert answered.pair.task_id == answered.rollout.task_id
        assert "Go down, then right." in parts.renderer.decode(answered.pair.student_ids)
    asked: Any = parts.engine
    assert {policy for policy, id_ in asked.asked if "/context_return" in id_} == {"base"}


def test_processes_share_the_boards_and_nothing_else(player_path: Path, tmp_path: Path) -> None:
    """Two play what one plays, each episode in one of them; a board drawn again is another one."""
    boards = "game.boards={train=1, extraction=0, validation=1, test=1}"
    keys = ("anchor.context_return=0.25", "batch.prompts_per_step=8", boards)
    parts = playing(tmp_path, player_path, *keys, "rollout.teacher_fraction=0.5")
    alone = roll_out(parts, 0)
    halves: list[Rollouts] = []
    for index in range(2):
        process: Any = SimpleNamespace(process_index=index, num_processes=2)
        parts.accelerator, parts.ahead = process, {}
        halves.append(roll_out(parts, 0))
    ids = [{a.pair.task_id for a in one.answered} for one in (alone, *halves)]
    assert ids[0] == ids[1] | ids[2] and not ids[1] & ids[2] and ids[1] and ids[2]


def test_an_episode_that_outgrows_the_model_is_dropped_and_counted(
    player_path: Path, tmp_path: Path
) -> None:
    """Nothing of it is trained on: here, all those that come to a third turn."""
    whole = playing(tmp_path / "whole", player_path, "anchor.share=0")
    played = roll_out(whole, 0).played.episodes
    short = {episode.id for episode in played if len(episode.turns) < 3}
    assert 0 < len(short) < 4, "boards of both kinds"
    room = max(len(turn.pair.teacher_ids) for e in played for turn in e.turns[:2])
    keys = (f"rendering.max_prompt_tokens={room}", "rendering.over_long=drop_row")
    parts = playing(tmp_path / "cut", player_path, "anchor.share=0", *keys)
    assert any("dropped from training" in note for note in parts.notes)
    tally, rollouts = Tally(), roll_out(parts, 0)
    count_rollouts(parts, rollouts, tally)
    assert {episode.id for episode in rollouts.played.episodes} == short
    assert {a.pair.task_id.rpartition("/turn-")[0] for a in rollouts.answered} == short
    assert tally.sums["dropped_episodes"] == 4 - len(short) and tally.sums["episodes"] == 4
    also = Tally()
    count_rollouts(parts, replace(rollouts, returned=rollouts.played), also)
    assert also.sums["dropped_episodes"] == 2 * (4 - len(short)), "those given the context too"


def test_where_every_episode_is_dropped_the_run_ends(player_path: Path, tmp_path: Path) -> None:
    whole = playing(tmp_path / "whole", player_path, "anchor.share=0")
    longest = max(len(item.pair.teacher_ids) for item in whole.items["train"])
    keys = (f"rendering.max_prompt_tokens={longest}", "rendering.over_long=drop_row")
    parts = playing(tmp_path / "cut", player_path, "anchor.share=0", *keys)
    parts.engine = acting(parts.renderer, lambda *_: "[up]")
    with pytest.raises(RolloutError, match=r"no response .* episodes 4 were dropped"):
        count_rollouts(parts, roll_out(parts, 0), Tally())


def test_an_episode_that_outgrows_the_model_ends_the_run_where_none_is_dropped(
    player_path: Path, tmp_path: Path
) -> None:
    """Warnings make prompts longer than moves do, so that the start cannot foresee it."""
    whole = playing(tmp_path / "whole", player_path)
    game, id_ = whole.config.game, whole.items["train"][0].task.id
    first = whole.items["train"][0]
    assert game and first.game
    last = whole.renderer.pair(first.game.task(id_, game.turns - 1), first.context)
    room = f"rendering.max_prompt_tokens={len(last.teacher_ids) + 20}"
    keys = ("game.invalid_moves_allowed=4", room)
    parts = playing(tmp_path / "cut", player_path, *keys)
    parts.engine = acting(parts.renderer, lambda *_: "Hm.")
    with pytest.raises(RolloutError, match=r"a game went on until .*'train-0000\d/turn-\d'"):
        roll_out(parts, 0)


def test_an_episode_is_the_same_however_many_are_played_beside_it(
    player_path: Path, tmp_path: Path
) -> None:
    """Sampled by the real engine: batches differ, the replies do not."""
    parts = assemble(make_game_run(tmp_path, player_path, "game.invalid_moves_allowed=5"))
    assert parts.config.game
    named, sampling = name_episodes(parts.items["train"]), sampling_of(parts.config, 0)
    parts.engine.use("student", 0)
    together = play(parts, parts.engine, named, sampling, "student").episodes
    assert sum(len(episode.turns) for episode in together) == 4 * parts.config.game.turns
    for episode in together:
        alone = {episode.id: named[episode.id]}
        assert play(parts, parts.engine, alone, sampling, "student").episodes == (episode,)
