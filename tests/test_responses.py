"""`opcd.responses`: the right weights see the right prompt, and every token is scored once."""

from pathlib import Path
from typing import Any

import pytest

from opcd.assembly import assemble
from opcd.config.training import Loss
from opcd.errors import TaskError
from opcd.responses import (
    ASKED,
    Response,
    ask,
    nats_by_response,
    respond,
    rows_of,
    score,
    teacher_margins,
)
from opcd.types import Answered, PromptPair, Rollout, Score
from tiny import acting, log_probs_of, make_game_run, make_run, parts_of


def test_conditions_ask_the_right_weights_with_the_right_prompt(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    scripted = parts_of(make_run(tmp_path, tiny_model_path))
    seen: list[tuple[str, tuple[int, ...]]] = []

    def script(policy: str, prompt: Any) -> tuple[int, ...]:
        seen.append((policy, prompt.ids))
        return (7, 2)

    scripted.engine.script = script  # type: ignore[attr-defined]
    item = scripted.items["test"][0]
    for condition in ASKED:
        respond(scripted, [item], condition)
    pair = item.pair
    assert seen == [
        ("base", pair.student_ids),
        ("base", pair.teacher_ids),
        ("student", pair.student_ids),
        ("student", pair.teacher_ids),
    ]


def test_scoring_goes_portion_by_portion_through_everything(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Every response is scored once, with as many values as it has tokens, without gradient."""
    parts = assemble(make_run(tmp_path, tiny_model_path))
    pairs = [item.pair for item in parts.items["train"]]
    answered = ask(parts, pairs, "base")
    seen = []
    for portion, stats in score(parts, answered, Loss()):
        assert len(portion) <= parts.config.batch.rows_per_forward
        assert len(stats.kl_T) == sum(len(a.rollout.response_ids) for a in portion)
        assert not stats.divergence_T.requires_grad
        seen += [a.pair.task_id for a in portion]
    assert sorted(seen) == sorted(pair.task_id for pair in pairs)


def test_margins_are_of_the_teachers_two_likeliest_tokens(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Along its own greedy answers: the first of the two is the token that was chosen."""
    parts = assemble(make_run(tmp_path, tiny_model_path))
    answered = ask(parts, [item.pair for item in parts.items["test"]], "in_context")
    found = list(teacher_margins(parts, answered))
    assert {a.pair.task_id for a, _ in found} == {a.pair.task_id for a in answered}
    for given, margins in found:
        ids = given.rollout.response_ids
        log_probs_TV = log_probs_of(parts.base.model, given.pair.teacher_ids, ids)
        first_two = log_probs_TV.topk(2)
        assert first_two.indices[:, 0].tolist() == list(ids)
        wanted = (first_two.values[:, 0] - first_two.values[:, 1]).tolist()
        assert margins == pytest.approx(wanted, abs=1e-3)


def test_an_answer_may_be_longer_where_a_suite_says_so(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    parts = assemble(make_run(tmp_path, tiny_model_path))
    pairs = [item.pair for item in parts.items["test"]]
    assert max(len(a.rollout.response_ids) for a in ask(parts, pairs, "base")) <= 5
    longer = ask(parts, pairs, "base", max_new_tokens=9)
    assert max(len(a.rollout.response_ids) for a in longer) > 5


def test_repeated_draws_are_told_apart_by_their_seed(tiny_model_path: Path, tmp_path: Path) -> None:
    """The same seed draws the same; a temperature takes the place of the run's."""
    parts = assemble(make_run(tmp_path, tiny_model_path))
    items = parts.items["test"]

    def texts(seed: str = "", temperature: float | None = 1.0) -> list[str]:
        return [r.text for r in respond(parts, items, "base", seed, temperature)]

    assert texts("a") == texts("a") != texts("b")
    assert texts("a", 0.0) == texts("b", 0.0) == texts("a", None) != texts("a")


def way(_: str, number: int) -> str:
    return ["[down]", "[down]", "[right]", "[right]", "[up]"][number - 1]


def test_a_game_is_played_under_each_condition_to_its_end(
    player_path: Path, tmp_path: Path
) -> None:
    """Every turn is kept; the last reply is the text; what is solved is right."""
    parts = assemble(make_game_run(tmp_path, player_path, "rollout.max_new_tokens=30"))
    engine = parts.engine = acting(parts.renderer, way)
    items = [item for split in parts.items.values() for item in split]
    for condition, (policy, _) in ASKED.items():
        engine.asked.clear()
        found = respond(parts, items, condition)
        assert {asked for asked, _ in engine.asked} == {policy}
        assert {r.score.note for r in found} == {"solved", "failed"}
        for item, r in zip(items, found, strict=True):
            counts = {"turns": float(len(r.turns)), "invalid_moves": 0.0}
            assert r.score.metrics == {"correct": float(r.score.note == "solved")} | counts
            assert r.turns[0].pair.student_ids == item.pair.student_ids
            assert r.turns[0].pair.teacher_ids == item.pair.teacher_ids
            assert r.answered == r.turns[-1] and r.text == way("", len(r.turns))
            told, *board = r.feedback.split("\n")
            assert (
                told
                == {"solved": "You reached G: solved.", "failed": "You fell into H: lost."}[
                    r.score.note
                ]
            )
            assert len(board) == 3


def test_a_slippery_lake_slips_alike_under_all_conditions(
    player_path: Path, tmp_path: Path
) -> None:
    """Conditions are paired by board; another seed is another episode."""
    keys = ("game.slippery=true", "game.turns=6", "game.invalid_moves_allowed=6")
    parts = assemble(make_game_run(tmp_path, player_path, *keys))
    parts.engine = acting(parts.renderer, lambda *_: "[d]")

    def ends(condition: Any, seed: str = "") -> list[str]:
        return [r.feedback for r in respond(parts, parts.items["train"], condition, seed)]

    assert ends("base") == ends("in_context") == ends("baked")
    assert len({tuple(ends("base", seed)) for seed in ("a", "b", "c")}) > 1


def test_a_game_that_outgrows_the_model_is_not_solved(player_path: Path, tmp_path: Path) -> None:
    """It keeps its place among the rows, and says what happened."""
    whole = assemble(make_game_run(tmp_path / "whole", player_path))
    longest = max(len(item.pair.teacher_ids) for item in whole.items["train"])
    keys = (f"rendering.max_prompt_tokens={longest}", "rendering.over_long=drop_row")
    parts = assemble(make_game_run(tmp_path / "cut", player_path, *keys))
    parts.engine = acting(parts.renderer, lambda *_: "[up]")
    for r in respond(parts, parts.items["train"], "base"):
        assert (r.score.note, r.score.metrics["correct"], len(r.turns)) == ("over_long", 0.0, 1)


def test_a_split_without_boards_says_where_they_are_counted(
    player_path: Path, tmp_path: Path
) -> None:
    boards = "game.boards={train=2, extraction=0, validation=1, test=0}"
    parts = assemble(make_game_run(tmp_path, player_path, boards))
    assert list(parts.items) == ["train", "validation"]
    with pytest.raises(TaskError, match=r"no test split.*raise game.boards.test"):
        rows_of(parts, "test", None)


def test_divergences_of_a_games_turns_are_its_own(player_path: Path, tmp_path: Path) -> None:
    """Portions hold turns of several games, sorted by their length."""
    parts = assemble(make_game_run(tmp_path, player_path, "rollout.max_new_tokens=3"))
    found = respond(parts, parts.items["train"], "base")
    answered = [turn for r in found for turn in r.turns]
    nats = nats_by_response(found, score(parts, answered, Loss()))
    assert sorted(nats) == list(range(len(found)))
    for place, r in enumerate(found):
        assert len(nats[place]) == sum(len(turn.rollout.response_ids) for turn in r.turns)
        alone = nats_by_response([r], score(parts, r.turns, Loss()))
        assert sorted(nats[place]) == pytest.approx(sorted(alone[0]), abs=1e-5)


def test_games_agree_where_every_turn_does() -> None:
    def game(*ids: int) -> Response:
        turns = [Answered(PromptPair("x", (1,), (1,)), Rollout("x", (i,), True)) for i in ids]
        return Response(tuple(turns), f"{ids[-1]}", Score())

    assert game(1, 2).agrees(game(1, 2))
    assert not game(1, 2).agrees(game(3, 2))
    assert not game(1, 2).agrees(game(1, 3))
    assert not game(1, 2).agrees(game(2))
