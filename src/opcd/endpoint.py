"""Items of experience from a server that speaks OpenAI's protocol. The key is never shown."""

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from opcd.config.extractors import Endpoint
from opcd.config.servers import pause_s
from opcd.errors import ConfigError, ExtractorError
from opcd.extraction import Request, Written
from opcd.servers import spread

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same prompt may well be answered."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is refused: the key would go along to wherever it points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none."""
        return


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
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, body, headers)
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.endpoint.timeout_s) as reply:
                return self._read(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error.code, error.read().decode("utf-8", "replace"))
        except urllib.error.URLError as error:
            if isinstance(error.reason, socket.gaierror):
                raise ExtractorError(
                    f"{self.url}: there is no such host ({error.reason}); correct "
                    "experience.extractor.url"
                ) from None
            return f"no connection ({error.reason})"
        except TimeoutError:
            return f"no answer within {self.endpoint.timeout_s:g} s (extractor.timeout_s)"
        except (OSError, HTTPException) as error:
            return f"the connection broke ({type(error).__name__})"

    def _read(self, reply: bytes) -> Written:
        try:
            choice = json.loads(reply)["choices"][0]
            text = choice["message"]["content"]
            if text is not None and not isinstance(text, str):
                raise TypeError("content is no text")
        except (ValueError, LookupError, TypeError) as error:
            shown = self._without_key(reply[:200].decode("utf-8", "replace"))
            raise ExtractorError(
                f"{self.url}: no answer of the chat protocol ({type(error).__name__}): {shown!r}; "
                "give the address of an OpenAI-compatible server"
            ) from None
        return Written(text or "", choice.get("finish_reason") != "length")

    def _refused(self, status: int, said: str) -> Written | str:
        said = self._without_key(" ".join(said.split()))[:300]
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

    def _without_key(self, text: str) -> str:
        # Servers like to repeat the key that they refuse.
        return text.replace(self.key, "***") if self.key else text


def read_key(endpoint: Endpoint) -> str | None:
    """The key that the endpoint wants, from the environment.

    Raises:
        ConfigError: the variable is not set.
    """
    if endpoint.key_env is None:
        return None
    if key := os.environ.get(endpoint.key_env, "").strip():
        return key
    raise ConfigError(
        f"experience.extractor.key_env = {endpoint.key_env!r}: there is no such environment "
        "variable, or it is empty; set it to the key, or leave key_env out for a server without one"
    )
