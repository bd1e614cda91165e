"""A teacher on vLLM servers: the log-probabilities that they tell of a response's tokens.

By what the servers can do, found out before the first step:

    student_top_k   of the student's own likeliest tokens (`prompt_logprob_token_ids`)
    teacher_top_k   of the teacher's own, the rest of its mass as one class (`prompt_logprobs`)
    sampled         of the sampled token alone

Every prompt is sent whole; a context that prompts share is the servers' own to read once.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from opcd.batching import Batch
from opcd.chunking import Asked, TeacherScore
from opcd.config.training import Loss, Remote, TopK
from opcd.divergence import Listed
from opcd.errors import ConfigError, ServerError
from opcd.models import PROBES
from opcd.openings import Openings
from opcd.scored import Row, Scored, join, read_prompt_logprobs, read_scores, rows_of
from opcd.servers import (
    Refusal,
    Server,
    check_room,
    check_tokenizer,
    connect,
    find_model,
    spread,
)

T = TypeVar("T")
Level = Literal["student_top_k", "teacher_top_k", "sampled"]

MEANING: dict[Level, str] = {
    "student_top_k": "scores the student's own {k} likeliest tokens",
    "teacher_top_k": "tells its own {k} likeliest tokens; the rest is one class (a bucket)",
    "sampled": "tells the log-probability of the sampled token alone",
}


PROBE_TOKENS = 8
"""Of a prompt, on which a server is tried."""
KNOWN_TOKENS = 64
"""Of a prompt, by whose scores a model is known again."""
MOST_APART_NATS = 0.2
"""Rounding moves one model's scores by less, a token on average; another's are further away."""


@dataclass
class Known:
    """A text by whose scores a model is known again."""

    ids: list[int]
    nats: list[float]
    """Log-probabilities of all tokens but the first, when the run began."""


@dataclass(frozen=True)
class RemoteTeacher:
    """A teacher that stands still, far away."""

    servers: Sequence[Server]
    model: str
    level: Level
    k: int
    vocabulary: int
    parallel: int = 64
    moves: bool = False
    openings: Openings = field(default_factory=Openings)
    """None: what prompts share is the servers' affair."""
    others_wait: bool = False
    """Whether other processes make the same passes. A failure then waits for `check_told`, and the
    passes until there are made with figures that mean nothing."""
    failures: list[str] = field(default_factory=list)
    known: Known | None = None
    """Scored again in every step, to see that it is the same model still."""

    def score(self, batch: Batch) -> TeacherScore:
        """What the loss gets to know of the teacher at the response tokens."""
        if self.level == "student_top_k":
            return Asked(self.k, lambda ids_TK: self.told_of(batch, ids_TK))
        return self.listed(batch, self.k if self.level == "teacher_top_k" else 0)

    def listed(self, batch: Batch, k: int) -> Listed:
        """The teacher's `k` likeliest tokens at each position; of 0, the sampled one alone."""
        rows = rows_of(batch)
        return self._told(batch, k, rows, lambda server, row: self.ask_list(server, row, k))

    def told_of(self, batch: Batch, ids_TK: Tensor) -> Listed:
        """The teacher's log-probabilities of the ids it is asked for, and of the sampled token."""
        rows = rows_of(batch)
        asked = ids_TK.cpu().split([row.tokens for row in rows])
        with_ids = [(row, ids.tolist()) for row, ids in zip(rows, asked, strict=True)]
        return self._told(batch, self.k, with_ids, lambda server, one: self.ask_ids(server, *one))

    def check_told(self) -> None:
        """Once all passes are made: were all figures the teacher's?

        Raises:
            ServerError: they were not, since a server failed.
        """
        if self.failures:
            first = self.failures[0]
            self.failures.clear()
            raise ServerError(first)
        if strangers := self.strangers():
            server, apart_nats = strangers[0]
            raise ServerError(
                f"{server.url} scores a text {apart_nats:.2f} nats a token otherwise than the "
                f"teacher that this run began with, so another model is called {self.model!r} "
                "there; serve the first one again, then continue with --resume"
            )

    def strangers(self) -> list[tuple[Server, float]]:
        """The servers whose scores of the known text are too far from those known, in nats."""
        if self.known is None:
            return []
        row, then = Row(self.known.ids, len(self.known.nats)), self.known.nats
        scored = self._spread([row] * len(self.servers), self.score_row)
        means = [
            statistics.fmean(abs(a - b) for a, b in zip(now.sampled, then, strict=True))
            for now in scored
        ]
        found = zip(self.servers, means, strict=True)
        return [(server, apart) for server, apart in found if not apart <= MOST_APART_NATS]

    def score_row(self, server: Server, row: Row) -> Scored:
        """A response's tokens, in the way that this server does it.

        Raises:
            Refusal: the server does not do this.
        """
        if self.level == "student_top_k":
            return self.ask_ids(server, row, [list(range(self.k))] * row.tokens)
        return self.ask_list(server, row, self.k if self.level == "teacher_top_k" else 0)

    def check_lists(self, k: int, why: str) -> None:
        """Refuse servers that do not list the `k` likeliest tokens.

        Raises:
            ConfigError: naming the setting to change.
        """
        for server in self.servers:
            try:
                self.ask_list(server, Row([0, 0], 1), k)
            except Refusal as refusal:
                raise ConfigError(
                    f"{why}, but {server.url} does not list {k}: {words_of(refusal)}; start it "
                    f"with --max-logprobs {k} or more"
                ) from None

    def after_step(self, step: int) -> None:
        """It does not move."""

    def state(self) -> dict[str, Tensor]:
        """By what the teacher is known again."""
        if self.known is None:
            return {}
        ids, nats = (torch.tensor(row).double() for row in (self.known.ids, self.known.nats))
        return {"known_ids": ids, "known_nats": nats}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue with the teacher that the run began with.

        Raises:
            ServerError: another model is served under its name.
        """
        if state and self.known:
            self.known.ids = state["known_ids"].long().tolist()
            self.known.nats = state["known_nats"].tolist()
            self.check_told()

    def ask_list(self, server: Server, row: Row, k: int) -> Scored:
        """One response's tokens with the `k` likeliest at each.

        Raises:
            Refusal: the server does not do this.
        """
        body = {
            "model": self.model,
            "prompt": row.ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
        }
        return server.ask(
            "/v1/completions",
            body,
            lambda reply: read_prompt_logprobs(reply, row, k, self.vocabulary),
        )

    def ask_ids(self, server: Server, row: Row, ids: list[list[int]]) -> Scored:
        """One response's tokens, and the given ones at each.

        Raises:
            Refusal: the server does not do this.
        """
        # The sampled token goes along, so that it is known even where it is an unlikely one.
        response = row.ids[-row.tokens :]
        asked = [[*own, token] for own, token in zip(ids, response, strict=True)]
        body = {
            "model": self.model,
            "token_ids": row.ids,
            "sampling_params": {
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprob_token_ids": asked,
                "prompt_logprob_start": len(row.ids) - row.tokens - 1,
            },
        }

        def read(reply: Any) -> Scored:
            table = read_scores(reply["prompt_token_id_logprobs"], row.tokens, len(asked[0]))
            return Scored(ids, [line[:-1] for line in table], [line[-1] for line in table])

        return server.ask("/inference/v1/generate", body, read)

    def _told(
        self, batch: Batch, k: int, asked: Sequence[T], ask: Callable[[Server, T], Scored]
    ) -> Listed:
        if not self.failures:
            try:
                return join(self._spread(asked, ask))
            except ServerError as error:
                if not self.others_wait:
                    raise
                self.failures.append(str(error))
        tokens, columns = len(batch.response_T), max(k, 1)
        alike = -math.log(self.vocabulary)
        ids_TK = torch.arange(columns).expand(tokens, columns)
        return Listed(ids_TK, torch.full((tokens, columns), alike), torch.full((tokens,), alike))

    def _spread(self, asked: Sequence[T], ask: Callable[[Server, T], Scored]) -> list[Scored]:
        def trusting(server: Server, thing: T) -> Scored:
            try:
                return ask(server, thing)
            except Refusal as refusal:
                raise ServerError(
                    f"{server.url} does not score any longer: {words_of(refusal)}; see to the "
                    "server, then continue with --resume"
                ) from None

        return spread(self.servers, asked, self.parallel, trusting)


def meet_teacher(
    config: Remote, loss: Loss, tokenizer: Any, vocabulary: int, prompt_ids: Sequence[int]
) -> tuple[RemoteTeacher, list[str]]:
    """Find out what the servers can do, and take the best of it that the loss wants.

    Args:
        config: the `[teacher]` table.
        loss: what is to be computed.
        tokenizer: the student's.
        vocabulary: how many ids there are.
        prompt_ids: the run's longest teacher prompt; the servers are tried on its first tokens.

    Returns:
        The teacher, and notes for the user.

    Raises:
        InputError: a server serves something else, or cannot do what was asked for.
    """
    servers = connect(config, "teacher")
    served = [find_model(server, config.model) for server in servers]
    if len({found.model for found in served}) > 1:
        raise ConfigError(
            f"teacher.servers serve different models, {sorted({f.model for f in served})}; give "
            "servers of one, or start them with one --served-model-name"
        )
    for server, found in zip(servers, served, strict=True):
        check_tokenizer(server, found.model, tokenizer, PROBES)
        check_room(server, found, len(prompt_ids), 1)
    k = loss.support.k if isinstance(loss.support, TopK) else 0
    model = served[0].model
    teacher = RemoteTeacher(servers, model, "sampled", k, vocabulary, config.parallel)
    level, refused = find_level(teacher, wanted_levels(config, loss), prompt_ids[:PROBE_TOKENS])
    teacher = know_again(replace(teacher, level=level), prompt_ids[:KNOWN_TOKENS])
    urls = ", ".join(server.url for server in servers)
    notes = [
        f"the teacher is {model!r} on {urls}: it {MEANING[level].format(k=k)}",
        *refused,
        "KL figures are those of the listed tokens, all others taken as one: a lower bound",
    ]
    return teacher, notes


def know_again(teacher: RemoteTeacher, ids: Sequence[int]) -> RemoteTeacher:
    """The teacher with a text by whose scores it is known.

    Raises:
        ConfigError: the servers score it differently.
    """
    first = teacher.servers[0]
    try:
        nats = teacher.score_row(first, Row(list(ids), len(ids) - 1)).sampled
    except Refusal as refusal:
        raise ConfigError(
            f"{first.url} does not score a text of {len(ids)} tokens: {words_of(refusal)}; see "
            "how it was started"
        ) from None
    found = replace(teacher, known=Known(list(ids), nats))
    if len(teacher.servers) > 1 and (strangers := found.strangers()):
        server, apart_nats = strangers[0]
        raise ConfigError(
            f"{first.url} and {server.url} score one text {apart_nats:.2f} nats a token apart, so "
            f"they serve different models under the name {teacher.model!r}; give servers of one "
            "model as teacher.servers"
        )
    return found


def wanted_levels(config: Remote, loss: Loss) -> list[Level]:
    """What may be asked for the loss's sake, the best first."""
    if config.ask != "auto":
        return [config.ask]
    if not isinstance(loss.support, TopK):
        return ["sampled"]
    levels: list[Level] = ["student_top_k"] if loss.support.of == "student" else []
    levels.append("teacher_top_k")
    directions = {loss.direction, loss.warmup.direction if loss.warmup else loss.direction}
    return [*levels, "sampled"] if directions == {"reverse_kl"} else levels


def find_level(
    teacher: RemoteTeacher, wanted: Sequence[Level], prompt_ids: Sequence[int]
) -> tuple[Level, list[str]]:
    """The first of some levels that all servers can do, and why not one before it.

    Raises:
        ConfigError: there is none.
    """
    refused: list[str] = []
    for level in wanted:
        reasons = [_why_not(teacher, server, level, prompt_ids) for server in teacher.servers]
        if not any(reasons):
            return level, refused
        refused.append(f"{level} is refused: {next(reason for reason in reasons if reason)}")
    raise ConfigError(
        f"teacher.servers do not tell what loss.support sums over ({refused[-1]}); start them "
        f"with --max-logprobs {teacher.k + 1} or more, lower loss.support.k, or write "
        'loss.support = {type = "sampled"} with direction = "reverse_kl"'
    )


def _why_not(
    teacher: RemoteTeacher, server: Server, level: Level, prompt_ids: Sequence[int]
) -> str | None:
    """Why a server refuses a level; `None` if it does not."""
    try:
        replace(teacher, level=level).score_row(server, Row(list(prompt_ids), 1))
    except Refusal as refusal:
        return words_of(refusal)
    return None


def words_of(refusal: Refusal) -> str:
    """What a server says, without its wrapping."""
    try:
        return str(json.loads(refusal.said)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return str(refusal)
