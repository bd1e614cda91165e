"""Items of experience from a server that speaks OpenAI's protocol. The key is never shown."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opcd.config.extractors import Endpoint
from opcd.config.servers import pause_s
from opcd.errors import ExtractorError
from opcd.extraction import Request, Written
from opcd.servers import NONSENSE, PASSING, Refusal, Unreached, fetch, find_key, spread, without_key


@dataclass(frozen=True, slots=True)
class EndpointExtractor:
    """Asks a server, several prompts at a time."""

    endpoint: Endpoint
    temperature: float
    max_new_tokens: int
    seed: int = 0
    key: str | None = field(default=None, repr=False)
    pause: Callable[[float], None] = time.sleep

    @property
    def name(self) -> str:
        """The model's name on the server."""
        return self.endpoint.model

    @property
    def url(self) -> str:
        """Where prompts are sent, with or without `/v1` in what the user wrote."""
        base = self.endpoint.url.rstrip("/").removesuffix("/chat/completions")
        return f"{base if base.endswith('/v1') else f'{base}/v1'}/chat/completions"

    def write(self, requests: Sequence[Request]) -> list[Written]:
        """An answer to each.

        Raises:
            ExtractorError: the server cannot be reached, refuses, or talks nonsense.
        """
        return spread([self], requests, self.endpoint.parallel, EndpointExtractor._ask)

    def _ask(self, request: Request) -> Written:
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            "seed": self.seed,
        }
        found: Written | str = ""
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                self.pause(pause_s(attempt))
            found = self._send(json.dumps(body).encode())
            if isinstance(found, Written):
                return found
        raise ExtractorError(
            f"{self.url}: {found}, and so {self.endpoint.retries + 1} times; see to the server and "
            "start again (what is written stays), or raise experience.extractor.retries"
        )

    def _send(self, body: bytes) -> Written | str:
        """An answer, or the trouble if it may pass.

        Raises:
            ExtractorError: the trouble will not pass by itself.
        """
        timeout_s = self.endpoint.timeout_s
        try:
            reply = fetch(self.url, body, self.key, timeout_s, "extractor.timeout_s")
        except Refusal as refusal:
            return self._refused(refusal.status, refusal.said)
        except Unreached as trouble:
            if trouble.unknown_host:
                raise ExtractorError(
                    f"{self.url}: there is no such host ({trouble.unknown_host}); correct "
                    "experience.extractor.url"
                ) from None
            return str(trouble)
        return self._read(reply)

    def _read(self, reply: bytes) -> Written:
        try:
            choice = json.loads(reply)["choices"][0]
            text = choice["message"]["content"]
            if text is not None and not isinstance(text, str):
                raise TypeError("content is no text")
        except NONSENSE as error:
            shown = without_key(reply[:200].decode("utf-8", "replace"), self.key)
            raise ExtractorError(
                f"{self.url}: no answer of the chat protocol ({type(error).__name__}): {shown!r}; "
                "give the address of an OpenAI-compatible server"
            ) from None
        return Written(text or "", choice.get("finish_reason") != "length")

    def _refused(self, status: int, said: str) -> Written | str:
        if status in PASSING:
            return f"HTTP {status} ({said})"
        if status in (400, 413, 422) and "context" in said and "length" in said:
            return Written("", skipped=f"the server holds no prompt as long: {said}")
        if status in (401, 403):
            name = self.endpoint.key_env
            way = f"correct the key in {name}" if name else "name the key's variable in key_env"
            raise ExtractorError(f"{self.url}: HTTP {status}, the key is refused ({said}); {way}")
        if 300 <= status < 400:
            way = "it redirects elsewhere; write the address it points to"
        elif status == 404:
            way = "there is no such address or model; correct url and model"
        else:
            way = "see what it says"
        raise ExtractorError(f"{self.url}: HTTP {status} ({said}); {way} in experience.extractor")


def read_key(endpoint: Endpoint) -> str | None:
    """The key that the endpoint wants, from the environment.

    Raises:
        ConfigError: the variable is not set.
    """
    return find_key(endpoint.key_env, "experience.extractor.key_env")
