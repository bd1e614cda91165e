"""A real vLLM server on this CPU: `make test-vllm` starts it; deselected otherwise.

What `vllm_fake` pretends is true here: the same engine, publisher and teacher, and whole runs.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.adapters import tune
from opcd.batching import collate
from opcd.chunking import Hidden, stats_against
from opcd.config import Run, load_config
from opcd.config.rollouts import VllmRollout
from opcd.config.servers import Remote
from opcd.config.training import Full, Lora, Loss, TopK
from opcd.errors import ConfigError, ServerError
from opcd.exporting import export_run
from opcd.models import hidden_states, output_head
from opcd.programs import open_baked
from opcd.remote import meet_teacher
from opcd.responses import ask
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.hf import HFEngine
from opcd.rollouts.publishing import AdapterPublisher, Shelf, WeightPublisher
from opcd.rollouts.vllm import VllmEngine
from opcd.servers import Server
from opcd.training import train
from opcd.types import PromptPair, Rollout
from opcd.weights import load_model, load_tokenizer, locate
from test_serving import rows_of
from tiny import nudge

pytestmark = pytest.mark.vllm

MODEL = "smollm2-135m"
START_S = 400
RANK = 8
TEXTS = (
    "The capital of France is",
    "Three colours of the rainbow:",
    "def add(a, b):\n    return",
    "Once upon a time there was a kettle that",
)
ADAPTERS = ("--enable-lora", "--max-lora-rank", str(RANK))
LISTS = ("--max-logprobs", "256", "--enable-scale-out")


@contextmanager
def vllm(log: Path, *options: str, model: str = "") -> Iterator[tuple[str, Any]]:
    """A server on a free port of this machine, stopped by its own process at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        *(os.environ.get("OPCD_VLLM", ".vllm/bin/vllm"), "serve", model or locate(MODEL)),
        *("--served-model-name", "base", "--host", "127.0.0.1", "--port", port),
        *("--max-model-len", "2048", "--dtype", "float32", "--enforce-eager", *options),
    ]
    switches = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **switches},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        await_health(url, process, log)
        yield url, process
    finally:
        end(process)


def end(process: Any, politely: bool = True) -> None:
    """Stop a server and what it has started: the session that was made for it."""
    if politely:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def await_health(url: str, process: Any, log: Path) -> None:
    """Wait until the server answers; show its log if it never does."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm(tmp_path_factory.mktemp("a") / "log", *ADAPTERS) as (url, _):
        yield url


@pytest.fixture(scope="module")
def without_adapters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Lists and adapters together end the server on a CPU, so a teacher's is one of its own."""
    with vllm(tmp_path_factory.mktemp("b") / "log", *LISTS) as (url, _):
        yield url


@torch.no_grad()
def move(student: Any, seed: int, size: float) -> None:
    """As a step would, but for the embeddings.

    On a CPU vLLM 0.32 packs the output head when it starts, and keeps that where it is tied to the
    embeddings (docs/vllm.md).
    """
    embeddings = student.get_input_embeddings().weight
    before = embeddings.clone()
    nudge(student, seed, size)
    embeddings.copy_(before)


def prompts_of(tokenizer: Any, tokens: int = 12) -> list[Prompt]:
    return [Prompt(text, tuple(tokenizer.encode(text)), tokens) for text in TEXTS]


def student_of(tuning: Any) -> Any:
    return tune(load_model(MODEL, torch.float32), tuning, 0).eval()


def engine_on(url: str, model: Any, full: bool = False) -> tuple[VllmEngine, HFEngine]:
    """The engine on the server, and transformers' beside it."""
    ends = frozenset({load_tokenizer(MODEL).eos_token_id})
    servers = [Server(url, "rollout", retries=1)]
    if full:
        shelf = Shelf(None)
        publisher = WeightPublisher(servers, "base", model, locate(MODEL), shelf, lambda act: act())
    else:
        publisher = AdapterPublisher(servers, "base", model, Shelf(None), lambda act: act())
    far = VllmEngine(VllmRollout(servers=(url,)), servers, publisher, ends, 49152)
    return far, HFEngine(model, model, torch.float32, ends, 8)


@pytest.mark.parametrize("tuning", [Lora(rank=RANK, alpha=16), Full()])
def test_new_weights_answer_as_transformers_do_within_the_step(
    request: pytest.FixtureRequest, tuning: Any
) -> None:
    full = isinstance(tuning, Full)
    url = request.getfixturevalue("without_adapters" if full else "with_adapters")
    student = student_of(tuning)
    far, near = engine_on(url, student, full)
    prompts = prompts_of(load_tokenizer(MODEL))
    answers = []
    for version in range(2):
        for engine in (far, near):
            engine.use("student", version)
        answers.append(far.generate(prompts, Sampling()))
        assert answers[-1] == near.generate(prompts, Sampling())
        move(student, version, 0.002 if full else 0.05)
    assert answers[0] != answers[1]
    if full:
        far.use("base", 0)  # as it was found, for the tests that follow
        assert far.generate(prompts, Sampling()) == answers[0]


def test_sampled_tokens_come_with_the_students_log_probabilities(with_adapters: str) -> None:
    student = student_of(Lora(rank=RANK, alpha=16))
    nudge(student, 3)
    far, _ = engine_on(with_adapters, student)
    far.use("student", 0)
    for prompt, found in zip(
        prompts_of(load_tokenizer(MODEL)),
        far.generate(prompts_of(load_tokenizer(MODEL)), Sampling(temperature=1.0, seed="s")),
        strict=True,
    ):
        ids = torch.tensor([[*prompt.ids, *found.response_ids]])
        with torch.no_grad():
            rows_TV = student(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
        own = rows_TV.gather(-1, ids[0, len(prompt.ids) :, None]).squeeze(-1).tolist()
        assert found.log_probs == pytest.approx(own, abs=5e-3)


def test_a_rank_above_the_servers_is_told_by_both_names(with_adapters: str) -> None:
    far, _ = engine_on(with_adapters, student_of(Lora(rank=2 * RANK, alpha=16)))
    with pytest.raises(ServerError, match=r"--max-lora-rank.*model\.tuning\.rank"):
        far.use("student", 0)


def test_a_remote_teachers_list_is_the_local_one(without_adapters: str) -> None:
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL, torch.float32)
    loss = Loss(support=TopK(k=64))
    config = Remote(servers=(without_adapters,), retries=1)
    teacher, notes = meet_teacher(config, loss, tokenizer, 49152, tokenizer.encode(TEXTS[0] * 3))
    assert teacher.level == "teacher_top_k", "a CPU server does not score the ids one asks for"
    assert "student_top_k is refused" in notes[1]
    prompts = [tuple(tokenizer.encode(text)) for text in TEXTS]
    pairs = [PromptPair(text, ids, ids) for text, ids in zip(TEXTS, prompts, strict=True)]
    answers = [Rollout(t, tuple(tokenizer.encode(" Paris is the answer.")), True) for t in TEXTS]
    batch = collate(pairs, answers)
    with torch.no_grad():
        own = Hidden(hidden_states(model, batch.teacher), output_head(model))
        student_TD = hidden_states(model, batch.student) * 1.05
    loss = Loss(support=TopK(k=64, of="teacher"))
    far, near = (
        stats_against(student_TD, output_head(model), score, batch.response_T, loss)
        for score in (teacher.score(batch), own)
    )
    torch.testing.assert_close(far.divergence_T, near.divergence_T, atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(far.teacher_mass_T, near.teacher_mass_T, atol=2e-3, rtol=0.0)


def run_on(folder: Path, url: str, *overrides: str) -> Run:
    """Three steps of the shipped recipe with the embedded model."""
    recipe = Path(__file__).parents[1] / "recipes" / "support_desk" / "run.toml"
    few = [
        f"out={folder}",
        "steps=3",
        "model.dtype=float32",
        f"model.tuning={{rank={RANK}, alpha=16}}",
        f"rollout={{type='vllm', servers=['{url}'], max_new_tokens=12, retries=0}}",
        "loss={warmup={steps=1}}",
        "batch.prompts_per_step=4",
        "evaluation={every_steps=3, validation_rows=2, suites=[]}",
        "checkpoint.every_steps=9",
    ]
    return load_config(recipe, [*few, *overrides])


def test_a_real_run_trains_with_rollouts_and_teacher_on_servers(
    tmp_path: Path, with_adapters: str, without_adapters: str
) -> None:
    teacher = f"teacher={{type='remote', servers=['{without_adapters}']}}"
    support = "loss={support={type='top_k', of='teacher', k=64}}"
    run = run_on(tmp_path, with_adapters, teacher, support)
    train(run)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert max(row["engine_logprob_difference_nats"] for row in rows) < 5e-3
    assert all(0.0 < row["loss_nats"] < 20.0 and row["grad_norm"] > 0 for row in rows)


def test_a_server_killed_mid_run_costs_no_step(tmp_path: Path) -> None:
    from opcd import training

    real, steps = training.show, []
    with vllm(tmp_path / "log", *ADAPTERS) as (url, process):

        def kill_after_one(*arguments: Any) -> None:
            real(*arguments)
            steps.append(1)
            if len(steps) == 1:
                end(process, politely=False)

        run = run_on(tmp_path, url)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ServerError, match="--resume"):
            patch.setattr(training, "show", kill_after_one)
            train(run)
    assert [row["step"] for row in rows_of(run)] == [0]
    with vllm(tmp_path / "log", *ADAPTERS) as (url, _):
        train(run_on(tmp_path, url), resume=True)  # at another address
    assert [row["step"] for row in rows_of(run)] == [0, 1, 2]


def test_an_export_is_served_with_the_runs_own_answers(tmp_path: Path, with_adapters: str) -> None:
    run = run_on(tmp_path, with_adapters, "optimizer.lr=0.002")
    train(run)
    export_run(run.out / run.name, tmp_path / "exported")
    with vllm(tmp_path / "log", model=str(tmp_path / "exported")) as (url, _):
        _, parts, _ = open_baked(run.out / run.name)
        pairs = [item.pair for item in parts.items["test"][:4]]
        wanted = [a.rollout.response_ids for a in ask(parts, pairs, "baked")]
        far, _ = engine_on(url, student_of(Lora(rank=RANK, alpha=16)))
        far.use("base", 0)
        prompts = [Prompt(p.task_id, p.student_ids, 12) for p in pairs]
        found = [r.response_ids for r in far.generate(prompts, Sampling())]
    assert found == wanted


def test_a_server_of_another_model_is_refused(tmp_path: Path, without_adapters: str) -> None:
    run = run_on(tmp_path, without_adapters)
    with pytest.raises(ConfigError, match="--enable-lora"):
        train(run)
    assert not (run.out / run.name).exists()
