"""`opcd.rollouts.vllm`: answers as transformers' do, and no nonsense among them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.adapters import tune
from opcd.config.rollouts import VllmRollout
from opcd.config.training import Full
from opcd.errors import ServerError
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.hf import HFEngine
from opcd.rollouts.publishing import AdapterPublisher, Shelf, WeightPublisher
from opcd.rollouts.vllm import VllmEngine
from opcd.weights import load_model
from tiny import LORA, VOCABULARY, log_probs_of, nudge, random_ids
from vllm_fake import FakeVllm, failing, garbage, impatient, restarted, serving
from worlds import END_ID, tokenizer

ENDS = frozenset({END_ID})
PROMPTS = [Prompt(f"t{i}", random_ids(6 + i, i), 7) for i in range(5)]
ONCE: Callable[[Callable[[], str]], str] = lambda act: act()  # noqa: E731


@pytest.fixture
def fakes(tiny_model_path: Path) -> Iterator[list[FakeVllm]]:
    one, two = (FakeVllm(tiny_model_path, tokenizer()) for _ in range(2))
    with serving(one), serving(two):
        yield [one, two]


def engine_of(
    fakes: list[FakeVllm], model: Any, full: str = "", shelf: Shelf | None = None
) -> VllmEngine:
    servers = [impatient(fake.url) for fake in fakes]
    shelf = shelf or Shelf(None)
    if full:
        publisher = WeightPublisher(servers, "base", model, full, shelf, ONCE)
    else:
        publisher = AdapterPublisher(servers, "base", model, shelf, ONCE)
    config = VllmRollout(servers=tuple(server.url for server in servers))
    return VllmEngine(config, servers, publisher, ENDS, VOCABULARY)


def student_of(path: Path, tuning: Any = LORA) -> Any:
    model = tune(load_model(str(path), torch.float32), tuning, 0).eval()
    nudge(model, 3)
    return model


@pytest.mark.parametrize("policy", ["student", "base"])
@pytest.mark.parametrize("tuning", [LORA, Full()])
def test_greedy_answers_are_those_of_transformers(
    fakes: list[FakeVllm], tiny_model_path: Path, policy: Any, tuning: Any
) -> None:
    student = student_of(tiny_model_path, tuning)
    base = student if tuning is LORA else load_model(str(tiny_model_path), torch.float32)
    ours = HFEngine(student, base, torch.float32, ENDS, 8)
    full = "" if tuning is LORA else str(tiny_model_path)
    theirs = engine_of(fakes, student, full)
    for engine in (ours, theirs):
        engine.use(policy, 0)
    wanted = ours.generate(PROMPTS, Sampling())
    assert theirs.generate(PROMPTS, Sampling()) == wanted
    assert all(fake.paths_asked().count("/v1/completions") >= 2 for fake in fakes)


def test_log_probabilities_are_the_students_at_temperature_one(
    fakes: list[FakeVllm], tiny_model_path: Path
) -> None:
    student = student_of(tiny_model_path)
    engine = engine_of(fakes, student)
    engine.use("student", 0)
    (found,) = engine.generate(PROMPTS[:1], Sampling(temperature=0.6, seed="s"))
    wanted_TV = log_probs_of(student, PROMPTS[0].ids, found.response_ids)
    wanted = [row_V[i].item() for row_V, i in zip(wanted_TV, found.response_ids, strict=True)]
    assert found.log_probs == pytest.approx(wanted, abs=1e-4)
    engine.use("base", 0)
    assert engine.generate(PROMPTS[:1], Sampling())[0].log_probs is None


def test_draws_depend_on_seed_and_task_and_not_on_the_others(
    fakes: list[FakeVllm], tiny_model_path: Path
) -> None:
    engine = engine_of(fakes, student_of(tiny_model_path))
    engine.use("student", 0)
    warm = Sampling(temperature=1.5, seed="a")
    together = engine.generate(PROMPTS, warm)
    assert engine.generate(PROMPTS[3:4], warm) == together[3:4]
    assert engine.generate(PROMPTS, Sampling(temperature=1.5, seed="b")) != together


def test_a_new_step_is_answered_with_new_weights(
    fakes: list[FakeVllm], tiny_model_path: Path
) -> None:
    student = student_of(tiny_model_path)
    engine = engine_of(fakes, student)
    engine.use("student", 0)
    before = engine.generate(PROMPTS, Sampling())
    nudge(student, 9, 0.2)
    engine.use("student", 1)
    after = engine.generate(PROMPTS, Sampling())
    ours = HFEngine(student, student, torch.float32, ENDS, 8)
    ours.use("student", 1)
    assert after == ours.generate(PROMPTS, Sampling()) != before
    assert all(len(fake.adapters) == 1 for fake in fakes)


def test_an_adapter_that_a_restart_lost_is_loaded_again(
    fakes: list[FakeVllm], tiny_model_path: Path
) -> None:
    engine = engine_of(fakes, student_of(tiny_model_path))
    engine.use("student", 0)
    wanted = engine.generate(PROMPTS, Sampling())
    fakes[0].restart()
    assert engine.generate(PROMPTS, Sampling()) == wanted
    troubles = [server.take_troubles() for server in engine.servers]
    assert [len(t) for t in troubles] == [1, 0]
    assert "lost the student's weights" in troubles[0][0]


@pytest.mark.parametrize("meanwhile", [False, True])
def test_weights_that_a_restart_lost_are_loaded_again(
    fakes: list[FakeVllm], tiny_model_path: Path, meanwhile: bool
) -> None:
    """Also where it happens while the server answers: it would answer as the base model."""
    student = student_of(tiny_model_path, Full())
    engine = engine_of(fakes, student, str(tiny_model_path))
    engine.use("student", 0)
    wanted = engine.generate(PROMPTS, Sampling())
    if meanwhile:
        fakes[0].faults["/v1/completions"] = [restarted]
    else:
        fakes[0].restart()
    assert engine.generate(PROMPTS, Sampling()) == wanted
    assert len(engine.servers[0].take_troubles()) == 1


@pytest.mark.parametrize(
    ("fault", "trouble"),
    [(failing(500, "CUDA out of memory"), "out of memory"), (garbage, "nonsense")],
)
def test_passing_trouble_costs_no_answer(
    fakes: list[FakeVllm], tiny_model_path: Path, fault: Any, trouble: str
) -> None:
    engine = engine_of(fakes, student_of(tiny_model_path))
    engine.use("student", 0)
    wanted = engine.generate(PROMPTS, Sampling())
    fakes[0].faults["/v1/completions"] = [fault]
    assert engine.generate(PROMPTS, Sampling()) == wanted
    assert trouble in engine.servers[0].take_troubles()[0]


SPOILED: dict[str, Callable[[Any], Any]] = {
    "another prompt": lambda choice: choice | {"prompt_token_ids": [5, 6]},
    "none of 300": lambda choice: choice | {"token_ids": [300, *choice["token_ids"][1:]]},
    "0 tokens": lambda choice: choice | {"token_ids": [], "logprobs": {"token_logprobs": []}},
    "7 tokens with 0": lambda choice: choice | {"logprobs": {"token_logprobs": []}},
    "no log-probability": lambda choice: (
        choice | {"logprobs": {"token_logprobs": [float("nan")] * len(choice["token_ids"])}}
    ),
    "cut after 1 of 7": lambda choice: (
        choice | {"token_ids": [9], "logprobs": {"token_logprobs": [-1.0]}}
    ),
    "token_ids": lambda choice: {k: v for k, v in choice.items() if k != "token_ids"},
}


@pytest.mark.parametrize("wrong", SPOILED)
def test_nonsense_is_refused(fakes: list[FakeVllm], tiny_model_path: Path, wrong: str) -> None:
    def spoil(reply: Any) -> Any:
        return {"choices": [SPOILED[wrong](reply["choices"][0])]}

    fakes[0].spoil = spoil
    engine = engine_of(fakes[:1], student_of(tiny_model_path))
    engine.use("student", 0)
    long = [prompt for prompt in PROMPTS if _goes_on(engine, prompt, fakes[0], spoil)][:1]
    with pytest.raises(ServerError, match=f"nonsense.*{wrong}.*and so 3 times"):
        engine.generate(long, Sampling())


def _goes_on(engine: VllmEngine, prompt: Prompt, fake: FakeVllm, spoil: Any) -> bool:
    """Whether a prompt's answer is as long as it may be."""
    fake.spoil = lambda reply: reply
    (rollout,) = engine.generate([prompt], Sampling())
    fake.spoil = spoil
    return len(rollout.response_ids) == prompt.max_new_tokens


def test_a_prompt_that_is_refused_ends_the_run(
    fakes: list[FakeVllm], tiny_model_path: Path
) -> None:
    engine = engine_of(fakes, student_of(tiny_model_path))
    engine.use("student", 0)
    fakes[0].max_model_len = 5
    with pytest.raises(ServerError, match=r"refuses a prompt of 6 tokens.*--resume"):
        engine.generate(PROMPTS, Sampling())
