"""`opcd.gap`: whether a context is worth baking, in numbers."""

import copy
from pathlib import Path

import pytest
import torch

from opcd.assembly import assemble
from opcd.errors import ConfigError
from opcd.gap import commonest, margins_by_answer, measure_gap
from opcd.items import Item
from opcd.programs import gap_of
from opcd.responses import Response, respond
from opcd.training import train
from opcd.types import PromptPair, Score, Task
from tiny import acting, log_probs_of, make_game_run, make_run, parts_of, reverse_kl
from vllm_fake import FakeVllm, serving
from worlds import tokenizer


def test_margins_are_grouped_by_the_right_answer_where_it_is_a_label() -> None:
    pair = PromptPair("x", (1,), (1,))
    items = [Item(Task(str(i), (), answer), pair) for i, answer in enumerate("aabb")]
    least = {"0": 1.0, "1": 2.0, "2": 0.5, "3": 0.5}
    assert margins_by_answer(items, least) == {"a": 1.5, "b": 0.5}
    free = [Item(Task(str(i), (), f"text {i}"), pair) for i in range(4)]
    assert margins_by_answer(free, least) == {}, "each its own answer: no labels"
    assert margins_by_answer(items[:2], least) == {}, "one label has nothing to be apart from"


def test_the_commonest_answer_is_told_where_answers_are_labels() -> None:
    """One that says the same to every row is seen at once; free text has no such share."""
    pair = PromptPair("x", (1,), (1,))
    items = [Item(Task(str(i), (), answer), pair) for i, answer in enumerate("aabb")]
    given = [Response((), text, Score({})) for text in "bbba"]
    assert commonest(items, given) == {"text": "b", "share": 0.75, "right_share": 0.5}
    assert commonest(items[:2], given[:2]) is None, "one label"
    free = [Item(Task(str(i), (), f"text {i}"), pair) for i in range(13)]
    assert commonest(free, given) is None


def test_the_distance_is_that_of_the_context(tiny_model_path: Path, tmp_path: Path) -> None:
    """KL(in_context || base) along the answers given with the context, against transformers."""
    parts = assemble(make_run(tmp_path, tiny_model_path))
    found = measure_gap(parts)
    per_token, per_response = [], []
    with torch.no_grad():
        for given in respond(parts, parts.items["validation"], "in_context"):
            pair, ids = given.answered.pair, given.answered.rollout.response_ids
            model = parts.base.model
            kl_T = reverse_kl(
                log_probs_of(model, pair.teacher_ids, ids),
                log_probs_of(model, pair.student_ids, ids),
            )
            per_token.append(kl_T.mean().item())
            per_response.append(kl_T.sum().item())
    assert found["kl_nats_per_token"]["mean"] == pytest.approx(sum(per_token) / 3, rel=1e-3)
    assert found["kl_nats_per_response"]["mean"] == pytest.approx(sum(per_response) / 3, rel=1e-3)
    assert found["kl_nats_per_token"]["mean"] > 0.01
    assert 0 <= found["margin_nats_lowest_tenth"] <= found["margin_nats"]["mean"]


def test_rows_are_paired(tiny_model_path: Path, tmp_path: Path) -> None:
    """Right with the context, wrong without: all differences are 1."""
    parts = parts_of(make_run(tmp_path, tiny_model_path))
    with_context = {item.pair.teacher_ids for item in parts.items["validation"]}
    right, wrong = (*parts.renderer.encode("a"), 2), (*parts.renderer.encode("x"), 2)
    parts.engine.script = lambda _, p: right if p.ids in with_context else wrong  # type: ignore[attr-defined]
    found = measure_gap(parts)
    correct = found["metrics"]["correct"]
    assert correct["difference"]["mean"] == 1.0 and correct["base"]["mean"] == 0.0
    assert correct["p"] == pytest.approx(0.25), "three rows"
    texts = [(row["base"]["text"], row["in_context"]["text"]) for row in found["answers"]]
    assert texts == [("x", "a")] * 3, "to be read before anything is trained"


def test_a_gap_measured_first_does_not_stand_in_the_way_of_the_run(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tiny_model_path, "steps=1")
    found = copy.deepcopy(gap_of(run))
    outcome = train(run)
    assert outcome.folder.gap.is_file() and found["split"] == "validation"
    train(run, overwrite=True)
    assert outcome.folder.gap.is_file(), "it belongs to the context, not to the weights"


def test_the_distance_of_a_game_is_that_of_all_its_turns(player_path: Path, tmp_path: Path) -> None:
    """By token over an episode's replies, and by episode; solved boards are right."""
    parts = assemble(make_game_run(tmp_path, player_path, "rollout.max_new_tokens=30"))
    parts.engine = acting(parts.renderer, lambda _, n: "[down]" if n < 3 else "[right]")
    found = measure_gap(parts)
    per_token, per_episode = [], []
    with torch.no_grad():
        for given in respond(parts, parts.items["validation"], "in_context"):
            nats: list[float] = []
            for turn in given.turns:
                pair, ids = turn.pair, turn.rollout.response_ids
                sides = (pair.teacher_ids, pair.student_ids)
                both = [log_probs_of(parts.base.model, side, ids) for side in sides]
                nats += reverse_kl(*both).tolist()
            per_token.append(sum(nats) / len(nats))
            per_episode.append(sum(nats))
    assert found["kl_nats_per_token"]["mean"] == pytest.approx(sum(per_token) / 2, rel=1e-3)
    assert found["kl_nats_per_response"]["mean"] == pytest.approx(sum(per_episode) / 2, rel=1e-3)
    assert found["selected_by"] == "correct" and found["truncated"] == 0.0
    assert {"correct", "turns", "invalid_moves"} == found["metrics"].keys()
    assert found["margin_nats_by_answer"] == {}


def test_a_teacher_that_does_not_list_two_tokens_is_refused_by_the_setting(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Before anything is answered."""
    with serving(FakeVllm(tiny_model_path, tokenizer(), max_logprobs=1)) as fake:
        teacher = f"teacher={{type='remote', servers=['{fake.url}'], retries=0}}"
        run = make_run(tmp_path, tiny_model_path, teacher, "loss.support={type='sampled'}")
        with pytest.raises(ConfigError, match=r"two likeliest.*--max-logprobs 2 or more"):
            gap_of(run)
        fake.max_logprobs = 2
        assert gap_of(run)["margin_nats"]["mean"] > 0
