"""`opcd.soft_prompt`: vectors that learn from the teacher, in front of a model that stays."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.assembly import Parts, assemble
from opcd.batching import collate
from opcd.config.training import Loss
from opcd.models import hidden_states, output_head
from opcd.responses import score
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.hf import decode
from opcd.soft_prompt import (
    VIRTUAL_TOKENS,
    accumulate,
    answer_as_teacher,
    first_vectors,
    hidden_behind,
    read_soft_prompt,
    respond_behind,
    train_soft_prompt,
)
from opcd.weights import load_model
from tiny import make_run

SYSTEM = "Answer every message of the shop with one word and nothing else, please. " * 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Parts:
    folder = tmp_path_factory.mktemp("soft")
    return assemble(make_run(folder, tiny_model_path, system=SYSTEM))


@pytest.fixture
def plain(tiny_model_path: Path) -> Any:
    return load_model(str(tiny_model_path), torch.float32).requires_grad_(False)


def loss_of(parts: Parts, tuned: Any) -> float:
    return sum(accumulate(parts, tuned, answered) for answered in answer_as_teacher(parts, 2))


def test_training_brings_it_nearer_to_the_teacher_and_moves_nothing_else(
    parts: Parts, plain: Any
) -> None:
    before = {name: weight.clone() for name, weight in plain.named_parameters()}
    start = loss_of(parts, train_soft_prompt(parts, plain, 0 + 1))
    fresh = load_model(parts.config.model.path, torch.float32).requires_grad_(False)
    end = loss_of(parts, train_soft_prompt(parts, fresh, 12))
    assert end < 0.9 * start
    for name, weight in fresh.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_each_step_has_as_many_answers_of_the_teachers_as_the_run(parts: Parts) -> None:
    """The answers are the teacher's: greedily, they would be the likeliest behind the context."""
    steps = answer_as_teacher(parts, 3)
    assert [len(answered) for answered in steps] == [parts.config.tasks_per_step] * 3
    train = {item.pair.task_id for item in parts.items["train"]}
    assert {a.pair.task_id for answered in steps for a in answered} <= train
    scored = [s for answered in steps for _, s in score(parts, answered, Loss())]
    assert all(stats.kl_T.isfinite().all() for stats in scored)


def test_it_starts_from_tokens_of_the_prompt_with_the_context(parts: Parts, plain: Any) -> None:
    vectors_PD = first_vectors(parts, plain)
    ids = parts.items["train"][0].pair.teacher_ids
    assert len(vectors_PD) == VIRTUAL_TOKENS
    assert torch.equal(vectors_PD[0], plain.get_input_embeddings().weight[ids[0]])


def test_vectors_of_tokens_read_as_those_tokens(parts: Parts, plain: Any) -> None:
    """With the embeddings of real tokens it is a prompt of text, trained pass and cached pass."""
    tuned = train_soft_prompt(parts, plain, 1)
    opening = parts.items["train"][0].pair.teacher_ids[:VIRTUAL_TOKENS]
    embeddings = plain.get_input_embeddings()
    with torch.no_grad():
        weight_PD = next(p for p in tuned.parameters() if p.requires_grad)
        weight_PD.copy_(embeddings(torch.tensor(opening)))
    (answered, *_) = answer_as_teacher(parts, 1)
    pairs, rollouts = [a.pair for a in answered], [a.rollout for a in answered]
    longer = [type(p)(p.task_id, opening + p.student_ids, p.teacher_ids) for p in pairs]
    found_TD = hidden_behind(tuned, collate(pairs, rollouts).student)
    text_TD = hidden_states(plain, collate(longer, rollouts).student)
    torch.testing.assert_close(found_TD, text_TD, rtol=1e-3, atol=1e-3)
    prompts = [Prompt(pair.task_id, pair.student_ids, 4) for pair in pairs]
    behind = decode(
        plain, prompts, Sampling(), frozenset({2}), [read_soft_prompt(tuned)] * len(prompts)
    )
    for pair, rollout in zip(longer, behind, strict=True):
        ids_1S = torch.tensor([pair.student_ids])
        hidden_D = plain.get_decoder()(input_ids=ids_1S).last_hidden_state[0, -1:]
        assert rollout.response_ids[0] == int(output_head(plain)(hidden_D).argmax())


def test_answers_end_where_they_end_and_are_graded(parts: Parts, plain: Any) -> None:
    tuned, items = train_soft_prompt(parts, plain, 1), parts.items["test"]
    long = respond_behind(parts, tuned, items, frozenset())
    assert [len(r.answered.rollout.response_ids) for r in long] == [
        parts.config.rollout.max_new_tokens
    ] * len(items)
    assert not any(r.answered.rollout.finished for r in long)
    assert all("correct" in r.score.metrics for r in long)
    everything = frozenset(range(300))
    short = respond_behind(parts, tuned, items, everything)
    ends = [r.answered.rollout for r in short]
    assert [(len(e.response_ids), e.finished) for e in ends] == [(1, True)] * len(items)
