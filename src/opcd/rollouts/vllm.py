"""Rollouts from vLLM servers: token ids in, token ids and their log-probabilities out.

The prompts of a call are spread over the servers, many under way together; which tokens are drawn
depends on the sampling seed and the task id. Text is never sent, nor read.
"""

from collections.abc import Sequence
from typing import Any

from opcd.config.rollouts import VllmRollout
from opcd.errors import ServerError
from opcd.rollouts.engine import Policy, Prompt, Sampling
from opcd.rollouts.publishing import Publisher
from opcd.servers import Refusal, Server, check_log_probs, spread
from opcd.types import Rollout

MOST_RESTARTS = 2
"""How often a server may lose its weights within one call."""


class VllmEngine:
    """Asks vLLM servers for responses, after they were given the weights to answer with."""

    def __init__(
        self,
        config: VllmRollout,
        servers: Sequence[Server],
        publisher: Publisher,
        end_ids: frozenset[int],
        vocabulary: int,
    ) -> None:
        """Note the parts; nothing is sent yet.

        Args:
            config: how many requests may be under way.
            servers: who is asked.
            publisher: gives them the weights.
            end_ids: tokens that end a response.
            vocabulary: how many ids there are.
        """
        self.servers = servers
        self.end_ids = end_ids
        self.vocabulary = vocabulary
        self._parallel = config.parallel
        self._publisher = publisher
        self._policy: Policy | None = None

    def use(self, policy: Policy, version: int) -> None:
        """Answer as the student of this version, or as the base model."""
        self._policy = policy
        self._publisher.publish(policy, version)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """One response for each prompt, in their order.

        Raises:
            ServerError: a server is gone, or its answers mean nothing.
        """
        assert self._policy, "use() says with which weights to answer"
        for _ in range(MOST_RESTARTS + 1):
            self._restore_lost()
            found = spread(
                self.servers,
                prompts,
                self._parallel,
                lambda server, prompt: self._ask(server, prompt, sampling),
            )
            # One that was restarted meanwhile has answered with weights that are not the student's.
            if not any(self._publisher.has_lost(server) for server in self.servers):
                return found
        raise ServerError(
            f"the servers lost the student's weights {MOST_RESTARTS + 1} times while answering; "
            "see to them, then continue with --resume"
        )

    def _restore_lost(self) -> None:
        for server in self.servers:
            if self._publisher.has_lost(server):
                self._publisher.restore(server)

    def _ask(self, server: Server, prompt: Prompt, sampling: Sampling) -> Rollout:
        body = body_of(prompt, sampling, self.end_ids)

        def read(reply: Any) -> Rollout:
            return read_response(reply, prompt, self.end_ids, self.vocabulary)

        for restarts in range(MOST_RESTARTS + 1):
            try:
                rollout = server.ask(
                    "/v1/completions", {"model": self._publisher.model, **body}, read
                )
            except Refusal as refusal:
                if refusal.status != 404 or restarts == MOST_RESTARTS:
                    raise ServerError(
                        f"{server.url} refuses a prompt of {len(prompt.ids)} tokens: {refusal}; "
                        "see to the server, then continue with --resume"
                    ) from None
                self._publisher.restore(server)
            else:
                return rollout if self._policy == "student" else without_log_probs(rollout)
        raise AssertionError("the last attempt returns or raises")


def body_of(prompt: Prompt, sampling: Sampling, end_ids: frozenset[int]) -> dict[str, Any]:
    """A request. Every setting is named: a server may have other defaults of its own."""
    return {
        "prompt": list(prompt.ids),
        "max_tokens": prompt.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": sampling.seed_of(prompt),
        "stop_token_ids": sorted(end_ids),
        "logprobs": 0,
        "return_token_ids": True,
    }


def read_response(reply: Any, prompt: Prompt, end_ids: frozenset[int], vocabulary: int) -> Rollout:
    """A server's answer as a rollout.

    Raises:
        ValueError: it does not answer this prompt, or means nothing.
    """
    choice = reply["choices"][0]
    ids, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if tuple(choice["prompt_token_ids"]) != prompt.ids:
        raise ValueError("it answers another prompt")
    if not 1 <= len(ids) <= prompt.max_new_tokens or len(ids) != len(log_probs):
        raise ValueError(f"{len(ids)} tokens with {len(log_probs)} log-probabilities")
    if not all(isinstance(i, int) and 0 <= i < vocabulary for i in ids):
        raise ValueError(f"an id that is none of {vocabulary}")
    check_log_probs(log_probs)
    finished = ids[-1] in end_ids
    if not finished and len(ids) < prompt.max_new_tokens:
        raise ValueError(f"cut after {len(ids)} of {prompt.max_new_tokens} tokens")
    return Rollout(prompt.task_id, tuple(ids), finished, log_probs=tuple(map(float, log_probs)))


def without_log_probs(rollout: Rollout) -> Rollout:
    """Of the base model's answers: the trainer has nothing to compare them with."""
    return Rollout(rollout.task_id, rollout.response_ids, rollout.finished)
