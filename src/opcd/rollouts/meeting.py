"""Before the first step: do the servers have the run's model, and do they take the student?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opcd.batching import collate
from opcd.config.rollouts import VllmRollout
from opcd.divergence import log_prob_of
from opcd.errors import ConfigError, ModelError, ServerError
from opcd.models import PROBES
from opcd.rollouts.engine import Policy, Prompt, Sampling
from opcd.rollouts.publishing import Publisher
from opcd.rollouts.vllm import VllmEngine, body_of, read_response
from opcd.servers import (
    Refusal,
    Server,
    check_room,
    check_tokenizer,
    connect,
    find_model,
)
from opcd.teachers import LocalTeacher
from opcd.types import PromptPair, Rollout

PROBE_TOKENS = 16
"""Of a response that is compared between server and trainer."""
PROBE_PROMPT_TOKENS = 256
WARM = 0.5
"""A temperature that shows whether log-probabilities were divided by it."""


def find_servers(
    config: VllmRollout, tokenizer: Any, prompt_tokens: int, new_tokens: int
) -> tuple[list[Server], str]:
    """The servers of the run's model, and its name there.

    Args:
        config: the `[rollout]` table.
        tokenizer: the run's.
        prompt_tokens: of its longest prompt.
        new_tokens: of its longest response.

    Raises:
        InputError: a server is none, has another model or tokenizer, or too little room.
    """
    servers = connect(config, "rollout")
    served = [find_model(server, config.model) for server in servers]
    names = sorted({one.model for one in served})
    if len(names) > 1:
        raise ConfigError(
            f"rollout.servers serve different models, {names}; give servers of one, or start them "
            "with one --served-model-name"
        )
    for server, one in zip(servers, served, strict=True):
        check_tokenizer(server, one.model, tokenizer, PROBES)
        check_room(server, one, prompt_tokens, new_tokens)
    return servers, names[0]


def check_weights(
    config: VllmRollout, engine: VllmEngine, base_name: str, base: LocalTeacher, prompt: Prompt
) -> float:
    """Compare what servers and trainer make of a response of the base model; the largest mean.

    Raises:
        ModelError: their weights differ.
        ConfigError: the servers tell log-probabilities after they were processed.
    """
    largest = 0.0
    for server in engine.servers:
        for temperature in (0.0, WARM):
            rollout = _probe(server, base_name, prompt, Sampling(temperature), engine)
            assert rollout.log_probs, "asked for"
            theirs_T = torch.tensor(rollout.log_probs)
            ours_T = log_probs_here(base, prompt.ids, rollout).cpu()
            nats = (theirs_T - ours_T).abs().mean().item()
            if nats > config.max_logprob_difference_nats:
                raise _mismatch(server, nats, config.max_logprob_difference_nats, temperature)
            largest = max(largest, nats)
    return largest


def probe_of(prompt_ids: Sequence[int]) -> Prompt:
    """A prompt to compare server and trainer on: how a prompt of the run ends."""
    return Prompt("probe", tuple(prompt_ids[-PROBE_PROMPT_TOKENS:]), PROBE_TOKENS)


@torch.no_grad()
def log_probs_here(base: LocalTeacher, prompt_ids: Sequence[int], rollout: Rollout) -> Tensor:
    """What a model here makes of a response: its tokens' log-probabilities, `_T`."""
    ids = tuple(prompt_ids)
    batch = collate([PromptPair(rollout.task_id, ids, ids)], [rollout])
    device = next(base.model.parameters()).device
    hidden_TD = base.hidden(batch.teacher.to(device))
    return log_prob_of(base.head(hidden_TD), batch.response_T.to(device))


def check_publishing(publisher: Publisher, policy: Policy) -> None:
    """Give the servers the student as it is now, or the base model.

    Raises:
        ConfigError: they do not take it.
    """
    try:
        publisher.publish(policy, 0)
    except ServerError as error:
        raise ConfigError(str(error)) from error


def _probe(
    server: Server, model: str, prompt: Prompt, sampling: Sampling, engine: VllmEngine
) -> Rollout:
    body = {"model": model, **body_of(prompt, sampling, engine.end_ids)}
    try:
        return server.ask(
            "/v1/completions",
            body,
            lambda reply: read_response(reply, prompt, engine.end_ids, engine.vocabulary),
        )
    except Refusal as refusal:
        raise ConfigError(
            f"{server.url} does not answer token ids with token ids: {refusal}; give the address "
            "of a vLLM server (0.11 or later) as rollout.servers"
        ) from None


def _mismatch(server: Server, nats: float, allowed: float, temperature: float) -> Exception:
    found = f"the log-probabilities of {server.url} are {nats:.3f} nats from the run's model's"
    if temperature == WARM:
        return ConfigError(
            f"{found} where it samples at temperature {WARM}, though not where it is greedy: it "
            "tells them after dividing by the temperature; start it with --logprobs-mode "
            "raw_logprobs"
        )
    return ModelError(
        f"{found} (allowed: {allowed}), so it serves other weights; serve the very weights of "
        "model.path there, or raise rollout.max_logprob_difference_nats if it is a matter of its "
        "--dtype"
    )
