"""`opcd.remote`: what a server tells of a teacher is what the teacher would say itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.batching import collate
from opcd.chunking import Asked, Hidden, stats_against
from opcd.config.servers import Remote
from opcd.config.training import Loss, Sampled, TopK, Warmup
from opcd.divergence import Listed
from opcd.errors import ConfigError, ModelError, ServerError
from opcd.models import hidden_states, output_head
from opcd.remote import RemoteTeacher, meet_teacher
from opcd.scored import rows_of
from opcd.weights import load_model
from tiny import VOCABULARY, log_probs_of, pair_of, random_ids, rollout_of
from vllm_fake import FakeVllm, failing, impatient, serving
from worlds import tiny_llama, tokenizer

PAIRS = [pair_of(f"t{i}", 5 + i, 20 + 3 * i, i) for i in range(3)]
ROLLOUTS = [rollout_of(f"t{i}", 4 + i, i) for i in range(3)]
BATCH = collate(PAIRS, ROLLOUTS)


@pytest.fixture
def fake(tiny_model_path: Path) -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny_model_path, tokenizer())) as running:
        yield running


def teacher_on(fake: FakeVllm, level: Any, k: int = 8) -> RemoteTeacher:
    return RemoteTeacher([impatient(fake.url)], "base", level, k, VOCABULARY)


def local_score(path: Path) -> Hidden:
    model = load_model(str(path), torch.float32)
    with torch.no_grad():
        return Hidden(hidden_states(model, BATCH.teacher), output_head(model))


def stats_of(score: Any, loss: Loss) -> Any:
    """Of a student that is another random model."""
    student = tiny_llama(seed=5)
    student_TD = hidden_states(student, BATCH.student).detach().requires_grad_()
    stats = stats_against(student_TD, output_head(student), score, BATCH.response_T, loss)
    (gradient_TD,) = torch.autograd.grad(stats.divergence_T.sum(), student_TD)
    return stats, gradient_TD


def test_a_list_is_the_teachers_own(fake: FakeVllm, tiny_model_path: Path) -> None:
    found = teacher_on(fake, "teacher_top_k").score(BATCH)
    assert isinstance(found, Listed)
    model = load_model(str(tiny_model_path), torch.float32)
    own_TV = torch.cat(
        [
            log_probs_of(model, pair.teacher_ids, rollout.response_ids)
            for pair, rollout in zip(PAIRS, ROLLOUTS, strict=True)
        ]
    ).float()
    top = own_TV.topk(8)
    assert torch.equal(found.ids_TK, top.indices)
    torch.testing.assert_close(found.log_probs_TK, top.values, atol=1e-4, rtol=0.0)
    sampled_T = own_TV.gather(-1, BATCH.response_T.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.sampled_T, sampled_T, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("of", ["teacher", "student"])
def test_loss_and_gradient_are_those_of_a_local_teacher(
    fake: FakeVllm, tiny_model_path: Path, of: Any, direction: Any, tail: Any
) -> None:
    fake.scores_ids = True
    loss = Loss(direction=direction, support=TopK(k=8, of=of, tail=tail), chunk_tokens=4)
    remote = teacher_on(fake, f"{of}_top_k").score(BATCH)
    assert isinstance(remote, Asked if of == "student" else Listed)
    (far, far_gradient), (near, near_gradient) = (
        stats_of(score, loss) for score in (remote, local_score(tiny_model_path))
    )
    torch.testing.assert_close(far_gradient, near_gradient, atol=2e-4, rtol=1e-3)
    for name in ("divergence_T", "entropy_T", "student_mass_T", "teacher_mass_T", "log_prob_T"):
        torch.testing.assert_close(
            getattr(far, name), getattr(near, name), atol=2e-4, rtol=1e-3, msg=name
        )
    assert (far.kl_T <= near.kl_T + 1e-4).all(), "a bound from below"
    assert (far.kl_T >= 0).all()


def test_the_sampled_token_alone_is_enough_for_its_estimate(
    fake: FakeVllm, tiny_model_path: Path
) -> None:
    loss = Loss(support=Sampled())
    far, far_gradient = stats_of(teacher_on(fake, "sampled").score(BATCH), loss)
    near, near_gradient = stats_of(local_score(tiny_model_path), loss)
    torch.testing.assert_close(far.divergence_T, near.divergence_T, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(far_gradient, near_gradient, atol=2e-4, rtol=1e-3)
    assert all(
        body["prompt_logprobs"] == 0 for path, body in fake.asked if path == "/v1/completions"
    )


def test_a_measurement_of_the_whole_vocabulary_becomes_a_bound(
    fake: FakeVllm, tiny_model_path: Path
) -> None:
    """Validation asks for the exact KL, whatever the loss is."""
    far, _ = stats_of(teacher_on(fake, "teacher_top_k", 100).score(BATCH), Loss())
    near, _ = stats_of(local_score(tiny_model_path), Loss())
    assert (far.divergence_T <= near.divergence_T + 1e-4).all()
    assert far.divergence_T.sum() > 0.5 * near.divergence_T.sum()


def meet(fake: FakeVllm, loss: Loss, ids: int = 20, **config: Any) -> Any:
    settings = {"retries": 0, **config}
    remote = Remote(servers=(fake.url,), **settings)
    return meet_teacher(remote, loss, tokenizer(), VOCABULARY, random_ids(ids, 0))


@pytest.mark.parametrize(
    ("server", "loss", "level"),
    [
        ({"scores_ids": True}, Loss(support=TopK(k=8)), "student_top_k"),
        ({}, Loss(support=TopK(k=8)), "teacher_top_k"),
        ({"scores_ids": True}, Loss(support=TopK(k=8, of="teacher")), "teacher_top_k"),
        ({"max_logprobs": 4}, Loss(support=TopK(k=8)), "sampled"),
        ({"scores_ids": True}, Loss(support=Sampled()), "sampled"),
    ],
)
def test_the_best_that_a_server_can_do_is_found_and_said(
    fake: FakeVllm, server: dict[str, Any], loss: Loss, level: str
) -> None:
    for name, value in server.items():
        setattr(fake, name, value)
    teacher, notes = meet(fake, loss)
    assert teacher.level == level
    said = {"student_top_k": "student's own 8", "teacher_top_k": "its own 8", "sampled": "alone"}
    assert said[level] in notes[0]
    wanted_more = isinstance(loss.support, TopK) and loss.support.of == "student"
    assert any("student_top_k is refused" in note for note in notes) == (
        wanted_more and level != "student_top_k"
    )


@pytest.mark.parametrize(
    ("loss", "ask"),
    [
        (Loss(direction="forward_kl", support=TopK(k=8)), "auto"),
        (Loss(support=TopK(k=8), warmup=Warmup()), "auto"),
        (Loss(support=TopK(k=8, of="teacher")), "teacher_top_k"),
    ],
)
def test_what_no_server_can_do_is_refused_with_a_way_out(
    fake: FakeVllm, loss: Loss, ask: str
) -> None:
    """One token's log-probability gives no forward KL; and nobody asked for it."""
    fake.max_logprobs = 4
    with pytest.raises(ConfigError, match=r"--max-logprobs 9 or more, lower loss\.support\.k"):
        meet(fake, loss, ask=ask)


def test_a_teacher_of_another_vocabulary_is_refused(fake: FakeVllm) -> None:
    fake.tokenizer = tokenizer(specials=("<x>", "<y>", "<z>"))
    with pytest.raises(ModelError, match="another tokenizer"):
        meet(fake, Loss(support=TopK(k=8)))


def test_a_context_that_the_server_does_not_hold_is_refused(fake: FakeVllm) -> None:
    fake.max_model_len = 30
    with pytest.raises(ConfigError, match="--max-model-len 31"):
        meet(fake, Loss(support=TopK(k=8)), ids=30)


@pytest.mark.parametrize("entries", [None, [], "x", {"5": None}, {"5": {}}, {"five": -1.0}])
@pytest.mark.parametrize("scored", ["", "x", "UEsDBA==", "k05VTVBZ", None, 7])
def test_scores_of_another_shape_are_trouble_that_may_pass(
    fake: FakeVllm, entries: Any, scored: Any
) -> None:
    """They are asked for again; reading them raises nothing that would end the run at once."""
    teacher, row = teacher_on(fake, "teacher_top_k"), rows_of(BATCH)[0]
    told = {"choices": [{"prompt_logprobs": [None, *[entries] * (len(row.ids) - 1)]}]}
    fake.faults["/v1/completions"] = [lambda _: (200, json.dumps(told).encode())]
    fake.faults["/inference/v1/generate"] = [
        lambda _: (200, json.dumps({"prompt_token_id_logprobs": scored}).encode())
    ]
    fake.scores_ids = True
    listed = teacher.ask_list(teacher.servers[0], row, 8)
    asked = teacher.ask_ids(teacher.servers[0], row, listed.ids)
    assert asked.sampled == pytest.approx(listed.sampled, abs=1e-5)
    troubles = teacher.servers[0].take_troubles()
    assert len(troubles) == 2 and all("nonsense" in trouble for trouble in troubles)


@pytest.mark.parametrize("level", ["student_top_k", "teacher_top_k", "sampled"])
def test_another_model_under_the_same_name_is_noticed(
    fake: FakeVllm, tmp_path: Path, level: str
) -> None:
    """In the step, or where a run goes on: its scores of a known text are others."""
    support = Sampled() if level == "sampled" else TopK(k=8)
    fake.scores_ids = level == "student_top_k"
    teacher, _ = meet(fake, Loss(support=support))
    assert teacher.level == level
    teacher.check_told()
    kept = teacher.state()
    tiny_llama(seed=9).save_pretrained(tmp_path / "other")
    with serving(FakeVllm(tmp_path / "other", tokenizer(), scores_ids=fake.scores_ids)) as other:
        later, _ = meet(other, Loss(support=support))
        later.check_told()
        with pytest.raises(ServerError, match=r"another model is called 'base'.*--resume"):
            later.load_state(kept)
        teacher.servers[0].url = other.url
        with pytest.raises(ServerError, match="nats a token otherwise than the teacher"):
            teacher.check_told()
        both = Remote(servers=(fake.url, other.url), retries=0)
        with pytest.raises(ConfigError, match="different models under the name 'base'"):
            meet_teacher(both, Loss(support=support), tokenizer(), VOCABULARY, random_ids(20, 0))


def test_a_server_that_stops_scoring_ends_the_run(fake: FakeVllm) -> None:
    fake.faults["/v1/completions"] = [failing(400, "no more")] * 9
    with pytest.raises(ServerError, match="does not score any longer: no more"):
        teacher_on(fake, "teacher_top_k").score(BATCH)
