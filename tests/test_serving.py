"""`opcd.serving`: whole runs with servers, and what becomes of a run when they fail."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.config import Run
from opcd.errors import ConfigError, ModelError, RolloutError, ServerError
from opcd.programs import open_baked
from opcd.responses import ask
from opcd.training import check_resumable, train
from tiny import make_run
from vllm_fake import FakeVllm, failing, serving
from worlds import tiny_llama, tokenizer

COLD = "rollout.temperature=0.001"
"""Answers are then the likeliest tokens, whoever draws them."""
FAST = ("optimizer.lr=0.01", "optimizer.warmup_steps=0")
FOUR = "batch.prompts_per_step=4"


@pytest.fixture
def fake(tiny_model_path: Path) -> Iterator[FakeVllm]:
    with serving(FakeVllm(tiny_model_path, tokenizer())) as running:
        yield running


def served(tmp_path: Path, model: Path, fake: FakeVllm, *overrides: str) -> Run:
    rollout = f"rollout={{type='vllm', servers=['{fake.url}'], max_new_tokens=5, retries=0}}"
    return make_run(tmp_path, model, rollout, COLD, *FAST, *overrides)


def rows_of(run: Run, name: str = "metrics") -> list[dict[str, Any]]:
    text = (run.out / run.name / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def column(run: Run, name: str) -> list[float]:
    return [row[name] for row in rows_of(run)]


@pytest.mark.parametrize("tuning", ["model.tuning={rank=4, alpha=8}", "model.tuning={type='full'}"])
def test_a_run_with_servers_is_the_run_without(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, tuning: str
) -> None:
    teacher = "teacher.type=frozen" if "full" in tuning else "teacher.type=adapter_off"
    near = make_run(tmp_path / "near", tiny_model_path, COLD, *FAST, tuning, teacher)
    far = served(tmp_path / "far", tiny_model_path, fake, tuning, teacher)
    for run in (near, far):
        train(run)
    for name in ("loss_nats", "grad_norm", "kl_nats_per_token", "response_tokens"):
        assert column(far, name) == pytest.approx(column(near, name), rel=2e-3), name
    assert max(column(far, "engine_logprob_difference_nats")) < 1e-3
    assert column(far, "server_troubles") == [0, 0, 0, 0]


def test_a_remote_teacher_trains_as_a_local_one(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm
) -> None:
    support = "loss.support={type='top_k', of='teacher', k=8}"
    near = make_run(tmp_path / "near", tiny_model_path, COLD, *FAST, support)
    teacher = f"teacher={{type='remote', servers=['{fake.url}'], retries=0}}"
    far = make_run(tmp_path / "far", tiny_model_path, COLD, *FAST, support, teacher)
    for run in (near, far):
        train(run)
    for name in ("loss_nats", "grad_norm", "teacher_mass_in_support"):
        assert column(far, name) == pytest.approx(column(near, name), rel=2e-3), name


@pytest.mark.parametrize("trouble", ["gone while training", "gone while validating"])
def test_a_run_whose_server_fails_goes_on_where_it_was(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, trouble: str
) -> None:
    """Nothing is trained twice, and no validation is left out."""
    every = "checkpoint.every_steps=4"  # so that only the stop itself can have saved the steps
    whole = served(tmp_path / "whole", tiny_model_path, fake, every)
    outcome = train(whole)
    cut = served(tmp_path / "cut", tiny_model_path, fake, every)
    # 4 prompts a step and 1 probe at 2 temperatures; then 3 validation rows after every 2 steps.
    good = 2 + 4 * 2 + (3 + 4 if "training" in trouble else 1)
    fake.faults["/v1/completions"] = [lambda _: None] * good + [failing(500)] * 9
    with pytest.raises(ServerError, match=r"HTTP 500.*--resume"):
        train(cut)
    fake.faults.clear()
    saved = [path.name for path in (cut.out / cut.name / "checkpoints").iterdir()]
    assert saved == (["step-3"] if "training" in trouble else ["step-2"])
    resumed = train(cut, resume=True)
    for name in ("step", "loss_nats", "grad_norm"):
        assert column(cut, name) == pytest.approx(column(whole, name)), name
    assert [row["step"] for row in rows_of(cut, "validation")] == [1, 3]
    assert resumed.best == pytest.approx(outcome.best)


def test_a_server_with_other_weights_is_caught_within_the_step(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm
) -> None:
    run = served(tmp_path, tiny_model_path, fake)

    def stale(own: FakeVllm) -> None:
        for name in own.adapters:  # as if the newest had the weights of the base
            own.adapters[name] = tiny_llama(seed=7)

    fake.faults["/v1/completions"] = [lambda _: None] * 6 + [stale]
    with pytest.raises(RolloutError, match=r"nats from the trainer's.*not trained on"):
        train(run)
    assert column(run, "step") == [0]
    checkpoints = run.out / run.name / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-1"]
    train(run, resume=True)
    assert column(run, "step") == [0, 1, 2, 3]


def test_troubles_are_counted_with_their_step(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = served(tmp_path, tiny_model_path, fake, "rollout.retries=1")
    fake.faults["/v1/completions"] = [lambda _: None] * 6 + [lambda own: own.restart()]
    train(run)
    assert column(run, "server_troubles") == [0, 1, 0, 0]
    assert "lost the student's weights" in capsys.readouterr().err.replace("\n", " ")


def other_weights(fake: FakeVllm) -> None:
    fake.model = tiny_llama(seed=7)


def low_rank(fake: FakeVllm) -> None:
    fake.max_lora_rank = 2


def little_room(fake: FakeVllm) -> None:
    fake.max_model_len = 30


def processed(fake: FakeVllm) -> None:
    fake.processed = True


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (other_weights, ModelError, r"serves other weights.*model\.path"),
        (low_rank, ConfigError, r"--max-lora-rank.*model\.tuning\.rank"),
        (little_room, ConfigError, r"--max-model-len.*rollout\.max_new_tokens"),
        (processed, ConfigError, "--logprobs-mode raw_logprobs"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm, wrong: Any, error: Any, message: str
) -> None:
    wrong(fake)
    run = served(tmp_path, tiny_model_path, fake)
    with pytest.raises(error, match=message) as caught:
        train(run)
    assert caught.value.exit_code == 2
    assert not run.out.exists()


def test_a_finished_run_is_asked_and_resumed_without_its_old_servers(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm
) -> None:
    run = served(tmp_path, tiny_model_path, fake, "steps=2")
    train(run)
    other = run.rollout.model_copy(update={"servers": ("http://127.0.0.1:9",)})
    moved = run.model_copy(update={"rollout": other})
    assert check_resumable(moved).path == run.out / run.name
    asked = len(fake.asked)
    _, parts, step = open_baked(run.out / run.name)
    pairs = [item.pair for item in parts.items["test"]]
    assert (step, len(ask(parts, pairs, "baked"))) == (2, len(pairs))
    assert len(fake.asked) == asked


def test_a_fallback_to_the_sampled_token_changes_the_loss(
    tmp_path: Path, tiny_model_path: Path, fake: FakeVllm
) -> None:
    from opcd.assembly import assemble

    fake.max_logprobs = 4
    teacher = f"teacher={{type='remote', servers=['{fake.url}'], retries=0}}"
    support = "loss.support={type='top_k', of='teacher', k=8}"
    parts = assemble(make_run(tmp_path, tiny_model_path, support, teacher))
    assert parts.config.loss.support.type == "sampled"
    assert any("loss.support is sampled" in note for note in parts.notes)
    assert torch.isfinite(torch.tensor(parts.context_tokens))
