"""A vLLM server over HTTP: asked again after what may pass, and checked to serve the right model.

Knows no tensors: token ids go in, and what comes back is read by whoever asked.
"""

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from opcd.config.servers import Servers, pause_s
from opcd.errors import ConfigError, ModelError, ServerError

S = TypeVar("S")
T = TypeVar("T")
U = TypeVar("U")
Done = tuple[int, Any, BaseException | None]
"""The place of what was asked, and its answer or the failure."""

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may well be answered."""
FINAL = ("max_lora_rank", "LoRA is not enabled", "No adapter found")
"""In what a server says with such a status, signs that it never will be."""
SHOWN = 300
"""Characters shown of what a server says."""
TOLD_WAIT_S = 2.0
"""A shorter wait is shown with its step alone."""
NONSENSE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What an answer raises, as it is read, that is not of the shape it should have."""


class Refusal(Exception):
    """The server will not do what it is asked, however often; for the asker to explain."""

    def __init__(self, status: int, said: str) -> None:
        """Note the HTTP status, and what was said with it."""
        super().__init__(f"HTTP {status} ({said})")
        self.status = status
        self.said = said


class Unreached(Exception):
    """No answer came; it may come later."""

    def __init__(self, trouble: str, unknown_host: str = "") -> None:
        """Note what happened, and what the system says where there is no such host."""
        super().__init__(trouble)
        self.unknown_host = unknown_host


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is refused: the key would go along to wherever it points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none."""
        return


def fetch(url: str, data: bytes | None, key: str | None, timeout_s: float, setting: str) -> bytes:
    """What a server answers, asked once; JSON is posted if there is any.

    Args:
        url: the whole address.
        data: what is posted.
        key: goes along, and is in no message.
        timeout_s: how long the answer may take.
        setting: what says so in the run.

    Raises:
        Refusal: it answers with an HTTP error.
        Unreached: it does not answer.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers)
    try:
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=timeout_s) as reply:
            return reply.read()
    except urllib.error.HTTPError as error:
        with error:
            said = " ".join(error.read().decode("utf-8", "replace").split())
        raise Refusal(error.code, without_key(said, key)[:SHOWN]) from None
    except urllib.error.URLError as error:
        unknown_host = str(error.reason) if isinstance(error.reason, socket.gaierror) else ""
        raise Unreached(f"no connection ({error.reason})", unknown_host) from None
    except TimeoutError:
        raise Unreached(f"no answer within {timeout_s:g} s ({setting})") from None
    except (OSError, HTTPException) as error:
        raise Unreached(f"the connection broke ({type(error).__name__})") from None


def without_key(text: str, key: str | None) -> str:
    """What a server says, fit to be shown: servers like to repeat the key that they refuse."""
    return text.replace(key, "***") if key else text


def find_key(key_env: str | None, setting: str) -> str | None:
    """The key that a server wants, from the environment.

    Raises:
        ConfigError: the variable is not set.
    """
    if key_env is None:
        return None
    if key := os.environ.get(key_env, "").strip():
        return key
    raise ConfigError(
        f"{setting} = {key_env!r}: there is no such environment variable, or it is empty; set it "
        "to the key, or leave key_env out for a server without one"
    )


@dataclass
class Server:
    """One server, with the trouble it has given."""

    url: str
    """Without `/v1`."""
    table: str
    """Which table of the run names it: `rollout` or `teacher`."""
    timeout_s: float = 300.0
    retries: int = 6
    key: str | None = field(default=None, repr=False)
    pause: Callable[[float], None] = time.sleep
    troubles: list[str] = field(default_factory=list)
    """Why something had to be sent or done again, once for each time."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _told_until: float = 0.0
    _has_answered: bool = False
    """Whether address and key have proved right, so that a doubt about them is a trouble."""

    def ask(self, path: str, body: Any = None, read: Callable[[Any], T] = lambda reply: reply) -> T:
        """What the server answers, as `read` takes it.

        Args:
            path: of the URL.
            body: is posted as JSON; without one, the path is only read.
            read: raises one of `NONSENSE` at an answer that means nothing.

        Raises:
            Refusal: it will not do this; asking again would not help.
            ServerError: it is gone, fails, or talks nonsense, each time it is asked.
        """
        trouble = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self.note(trouble)
                self._tell_of_waiting(trouble, pause_s(attempt))
                self.pause(pause_s(attempt))
            reply = self._send(path, body)
            if isinstance(reply, str):
                trouble = reply
                continue
            try:
                return read(_parsed(reply))
            except NONSENSE as error:
                shown = without_key(reply[:SHOWN].decode("utf-8", "replace"), self.key)
                trouble = f"nonsense in answer to {path}: {error!r} in {shown!r}"
        way = "see to the server, then continue with --resume"
        if not self._has_answered:
            way = f"see that it runs and that {self.table}.servers has its address, or {way}"
        raise ServerError(
            f"{self.url}: {trouble}, and so {self.retries + 1} times; {way}; or raise "
            f"{self.table}.retries (a server that starts anew takes about a minute)"
        )

    def note(self, trouble: str) -> None:
        """Remember a trouble, to be counted and shown with the step."""
        with self._lock:
            self.troubles.append(f"{self.url}: {trouble}")

    def _tell_of_waiting(self, trouble: str, wait_s: float) -> None:
        """Say that somebody waits, and for what: the step that would show it may not come.

        Once for all that wait at the same time.
        """
        with self._lock:
            is_told = time.monotonic() < self._told_until
            if wait_s < TOLD_WAIT_S or is_told:
                return
            self._told_until = time.monotonic() + wait_s
        print(f"{self.url}: {trouble}; asked again in {wait_s:.0f} s", file=sys.stderr)

    def take_troubles(self) -> list[str]:
        """The troubles since this was last asked."""
        with self._lock:
            taken, self.troubles = self.troubles, []
        return taken

    def _send(self, path: str, body: Any) -> bytes | str:
        """The answer, or the trouble if it may pass."""
        data = None if body is None else json.dumps(body).encode()
        setting = f"{self.table}.timeout_s"
        try:
            reply = fetch(self.url + path, data, self.key, self.timeout_s, setting)
        except Refusal as refusal:
            return self._failed(refusal.status, refusal.said)
        except Unreached as trouble:
            if trouble.unknown_host and not self._has_answered:
                raise ConfigError(
                    f"{self.url}: there is no such host ({trouble.unknown_host}); correct "
                    f"{self.table}.servers"
                ) from None
            return str(trouble)
        self._has_answered = True
        return reply

    def _failed(self, status: int, said: str) -> str:
        if status in (401, 403) and not self._has_answered:
            raise ConfigError(
                f"{self.url}: HTTP {status}, the key is refused ({said}); put the right one into "
                f"the environment variable that {self.table}.key_env names"
            )
        if status not in PASSING or any(sign in said for sign in FINAL):
            raise Refusal(status, said)
        return f"HTTP {status} ({said})"


@dataclass(frozen=True, slots=True)
class Served:
    """What a server has: the name of the model, and how many tokens a request may have."""

    model: str
    max_model_len: int


def connect(config: Servers, table: str) -> list[Server]:
    """The servers of a table, none of them asked yet.

    Raises:
        ConfigError: the variable that should hold the key is not set.
    """
    key = find_key(config.key_env or None, f"{table}.key_env")
    urls = [url.rstrip("/").removesuffix("/v1") for url in config.servers]
    return [Server(url, table, config.timeout_s, config.retries, key) for url in urls]


def spread(
    servers: Sequence[S],
    asked: Sequence[T],
    parallel: int,
    ask: Callable[[S, T], U],
) -> list[U]:
    """Each thing asked of one of the servers in turn, many under way together; in their order.

    The first failure ends it: what has not been sent by then, is not, and what has is waited for.
    Who is interrupted (Ctrl-C) waits for nothing: the threads are of those that no program waits
    for at its end, as a pool's would be, with all retries of a server that is gone.
    """
    work = _Work(len(asked))

    def answer(place: int) -> Done:
        try:
            return place, ask(servers[place % len(servers)], asked[place]), None
        except BaseException as error:
            return place, None, error

    threads = min(parallel * len(servers), len(asked))
    for _ in range(threads):
        threading.Thread(target=work.go_on, args=[answer], daemon=True).start()
    try:
        return work.results(threads)
    finally:
        work.stopped.set()


class _Work:
    """So many places to fill, by as many threads as there are."""

    def __init__(self, count: int) -> None:
        self.stopped = threading.Event()
        self._done: SimpleQueue[Done | None] = SimpleQueue()
        self._waiting: SimpleQueue[int] = SimpleQueue()
        for place in range(count):
            self._waiting.put(place)

    def go_on(self, answer: Callable[[int], Done]) -> None:
        """Take one place after the other until none is left, or it is stopped."""
        with contextlib.suppress(Empty):
            while not self.stopped.is_set():
                self._done.put(answer(self._waiting.get_nowait()))
        self._done.put(None)

    def results(self, threads: int) -> list[Any]:
        """What came to each place, once all threads have ended.

        A failure stops them; of those that there are by then, the first place's is raised.
        """
        found: dict[int, Any] = {}
        failed: dict[int, BaseException] = {}
        while threads:
            if (done := self._done.get()) is None:
                threads -= 1
                continue
            place, found[place], error = done
            if error:
                failed[place] = error
                self.stopped.set()
        if failed:
            raise failed[min(failed)]
        return [found[place] for place in sorted(found)]


def find_model(server: Server, wanted: str | None) -> Served:
    """The model on a server: the one that is wanted, or the only one.

    Raises:
        ConfigError: there is no vLLM server, or not that model, or no telling which.
    """
    try:
        cards = server.ask("/v1/models", read=_base_models)
    except Refusal as refusal:
        raise ConfigError(
            f"{server.url}: {refusal}; that is no vLLM server; correct {server.table}.servers"
        ) from None
    if wanted is None and len(cards) == 1:
        wanted = next(iter(cards))
    if wanted not in cards:
        found = f"not {wanted!r}" if wanted else "several"
        raise ConfigError(
            f"{server.url} serves {sorted(cards)}, {found}; write one of these names as "
            f"{server.table}.model"
        )
    return Served(wanted, cards[wanted])


def check_tokenizer(server: Server, model: str, tokenizer: Any, texts: Iterable[str]) -> None:
    """Compare what server and trainer make of some texts.

    Raises:
        ModelError: some text has other ids, so that the two speak of other words.
    """
    for text in texts:
        ours = tokenizer.encode(text, add_special_tokens=False)
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            theirs = server.ask("/tokenize", body, lambda reply: list(reply["tokens"]))
        except Refusal as refusal:
            raise ConfigError(
                f"{server.url}/tokenize: {refusal}; this needs a vLLM server with its tokenizer"
            ) from None
        if ours != theirs:
            raise ModelError(
                f"{server.url} serves {model!r} with another tokenizer: {text!r} is {ours[:6]} "
                f"here and {theirs[:6]} there, so that it would speak of other words; serve "
                f"the run's own model there, or correct {server.table}.servers"
            )


def check_room(server: Server, served: Served, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a run whose longest prompt and its response do not fit the server.

    Raises:
        ConfigError: naming what can be changed.
    """
    if prompt_tokens + new_tokens > served.max_model_len:
        raise ConfigError(
            f"{server.url} holds {served.max_model_len} tokens, but the run's longest prompt has "
            f"{prompt_tokens} and its response up to {new_tokens}; start the server with "
            f"--max-model-len {prompt_tokens + new_tokens} or more, lower rollout.max_new_tokens "
            "(or game.turns), or shorten the context"
        )


def _parsed(reply: bytes) -> Any:
    """JSON, or plain text where it is that: some of vLLM's answers are."""
    return json.loads(reply) if reply[:1] in (b"{", b"[") else reply.decode("utf-8")


def _base_models(reply: Any) -> dict[str, int]:
    return {
        str(card["id"]): int(card["max_model_len"])
        for card in reply["data"]
        if card.get("parent") is None
    }


def check_log_probs(values: Iterable[float]) -> None:
    """Look at what a server calls log-probabilities.

    Raises:
        ValueError: one of them can be none.
    """
    for value in values:
        # A little above 0 is rounding; nan is not below anything.
        if not -math.inf < value < 1e-2:
            raise ValueError(f"{value} is no log-probability")
