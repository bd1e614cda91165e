"""`opcd.rollouts.meeting`: what a server is tried on before the first step."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from opcd.config.rollouts import VllmRollout
from opcd.errors import ConfigError
from opcd.rollouts.meeting import (
    PROBE_PROMPT_TOKENS,
    check_publishing,
    find_servers,
    log_probs_here,
    probe_of,
)
from opcd.rollouts.publishing import AdapterPublisher, Shelf
from opcd.teachers import LocalTeacher
from opcd.types import Rollout
from tiny import LORA, log_probs_of, random_ids, tuned
from vllm_fake import FakeVllm, impatient, serving
from worlds import tiny_llama, tokenizer


@pytest.fixture
def fakes(tiny_model_path: Path) -> Iterator[list[FakeVllm]]:
    one, two = (FakeVllm(tiny_model_path, tokenizer()) for _ in range(2))
    with serving(one), serving(two):
        yield [one, two]


def config_of(fakes: list[FakeVllm]) -> VllmRollout:
    return VllmRollout(servers=tuple(fake.url for fake in fakes), retries=0)


def test_servers_of_one_model_are_found_with_its_name(fakes: list[FakeVllm]) -> None:
    servers, name = find_servers(config_of(fakes), tokenizer(), 20, 5)
    assert ([server.url for server in servers], name) == ([fake.url for fake in fakes], "base")


def test_servers_of_two_models_are_refused(fakes: list[FakeVllm]) -> None:
    fakes[1].name = "other"
    with pytest.raises(ConfigError, match=r"different models, \['base', 'other'\]"):
        find_servers(config_of(fakes), tokenizer(), 20, 5)


def test_the_second_server_is_looked_at_too(fakes: list[FakeVllm]) -> None:
    fakes[1].max_model_len = 24
    with pytest.raises(ConfigError, match=f"{fakes[1].url} holds 24"):
        find_servers(config_of(fakes), tokenizer(), 20, 5)


def test_a_probe_is_how_a_prompt_ends() -> None:
    ids = tuple(range(PROBE_PROMPT_TOKENS + 3))
    assert probe_of(ids).ids == ids[3:]


def test_log_probabilities_here_are_those_of_the_slow_way() -> None:
    model = tiny_llama()
    base = LocalTeacher(model, nullcontext, nullcontext)
    prompt, response = random_ids(9, 1), random_ids(4, 2)
    wanted_TV = log_probs_of(model, prompt, response)
    wanted = [row_V[i].item() for row_V, i in zip(wanted_TV, response, strict=True)]
    found_T = log_probs_here(base, prompt, Rollout("t", response, finished=False))
    torch.testing.assert_close(found_T, torch.tensor(wanted), atol=1e-4, rtol=0.0)


def test_a_student_that_is_not_taken_is_wrong_input(fakes: list[FakeVllm]) -> None:
    """Nothing has been trained yet."""
    fakes[0].max_lora_rank = 1
    servers = [impatient(fakes[0].url)]
    publisher = AdapterPublisher(servers, "base", tuned(LORA), Shelf(None), lambda act: act())
    with pytest.raises(ConfigError, match="--max-lora-rank"):
        check_publishing(publisher, "student")
