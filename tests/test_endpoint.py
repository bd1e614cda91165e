"""The OpenAI protocol against a real server on the loopback: answers, refusals, nonsense, keys."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from opcd.config.experience import Endpoint
from opcd.endpoint import EndpointExtractor, read_key
from opcd.errors import ConfigError, ExtractorError
from opcd.extraction import Request, Written
from opcd.types import Message

KEY = "sk-very-secret"


class Fake:
    """A server that answers as told and remembers what it was sent."""

    def __init__(self) -> None:
        """Listen on a free port; `thread` serves."""
        self.seen: list[dict[str, Any]] = []
        self.replies: list[tuple[int, Any]] = []
        """Status and body, one a request; the answer repeats the prompt when they are used up."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
                said = f"re: {body['messages'][-1]['content']}"
                status, reply = fake.replies.pop(0) if fake.replies else (200, answer(said))
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", f"{fake.url}/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def extractor(self, key: str | None = None, **table: Any) -> EndpointExtractor:
        endpoint = Endpoint(**{"url": self.url, "model": "m", "retries": 2, **table})
        self.pauses: list[float] = []
        return EndpointExtractor(endpoint, 0.7, 99, 5, key, pause=self.pauses.append)


def answer(text: str | None, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


@pytest.fixture
def fake() -> Iterator[Fake]:
    found = Fake()
    found.thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    found.thread.join()


def ask(*texts: str) -> list[Request]:
    return [Request(text, (Message("system", "s"), Message("user", text)), "- X") for text in texts]


def test_what_is_sent_is_the_protocol(fake: Fake) -> None:
    (written,) = fake.extractor(KEY).write(ask("a"))
    assert written == Written("re: a")
    assert fake.seen == [
        {
            "path": "/v1/chat/completions",
            "key": f"Bearer {KEY}",
            "model": "m",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
            "temperature": 0.7,
            "max_tokens": 99,
            "seed": 5,
        }
    ]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_address_may_be_written_in_any_usual_way(fake: Fake, suffix: str) -> None:
    fake.extractor(url=fake.url + suffix).write(ask("a"))
    assert [seen["path"] for seen in fake.seen] == ["/v1/chat/completions"]
    assert fake.seen[0]["key"] is None


def test_answers_come_in_the_order_of_the_prompts(fake: Fake) -> None:
    texts = [f"prompt {n}" for n in range(30)]
    written = fake.extractor(parallel=7).write(ask(*texts))
    assert [w.text for w in written] == [f"re: {text}" for text in texts]


def test_an_answer_at_the_token_limit_is_known_as_cut(fake: Fake) -> None:
    fake.replies = [(200, answer("a", "length")), (200, answer(None))]
    assert fake.extractor(parallel=1).write(ask("a", "b")) == [Written("a", False), Written("")]


def test_what_passes_is_tried_again_with_longer_pauses(fake: Fake) -> None:
    fake.replies = [(503, b"busy"), (429, b"slow down")]
    assert fake.extractor().write(ask("a")) == [Written("re: a")]
    assert fake.pauses == [1.0, 2.0]


def test_retries_have_an_end(fake: Fake) -> None:
    fake.replies = [(500, b"oops")] * 9
    with pytest.raises(ExtractorError, match=r"HTTP 500 \(oops\), and so 3 times; .*retries"):
        fake.extractor().write(ask("a"))
    assert len(fake.seen) == 3


def test_pauses_do_not_grow_without_end(fake: Fake) -> None:
    fake.replies = [(500, b"")] * 9
    fake.extractor(retries=9).write(ask("a"))
    assert max(fake.pauses) == 30.0 and len(fake.pauses) == 9


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the key is refused .*; name the key's variable in key_env"),
        (404, "no such address or model; correct url and model"),
        (302, "redirects elsewhere"),
        (400, "see what it says"),
    ],
)
def test_what_does_not_pass_is_told_at_once(fake: Fake, status: int, message: str) -> None:
    fake.replies = [(status, b"no")]
    with pytest.raises(ExtractorError, match=message):
        fake.extractor().write(ask("a"))
    assert len(fake.seen) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 500, 200])
def test_the_key_is_in_no_message(fake: Fake, status: int) -> None:
    """Servers repeat the key that they refuse."""
    fake.replies = [(status, f"wrong key {KEY}".encode())] * 3
    extractor = fake.extractor(KEY, key_env="MY_KEY")
    with pytest.raises(ExtractorError) as caught:
        extractor.write(ask("a"))
    assert "***" in str(caught.value)
    assert "secret" not in f"{caught.value} {extractor!r}"


def test_a_redirect_does_not_carry_the_key_away(fake: Fake) -> None:
    fake.replies = [(307, b"")]
    with pytest.raises(ExtractorError):
        fake.extractor(KEY).write(ask("a"))
    assert [seen["path"] for seen in fake.seen] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "reply", [b"<html>", b"[]", b"{}", {"choices": []}, {"choices": [{"message": {"content": 3}}]}]
)
def test_nonsense_is_no_answer(fake: Fake, reply: Any) -> None:
    fake.replies = [(200, reply)]
    with pytest.raises(
        ExtractorError, match=r"no answer of the chat protocol .* OpenAI-compatible"
    ):
        fake.extractor().write(ask("a"))


def test_a_prompt_the_server_does_not_hold_is_skipped(fake: Fake) -> None:
    said = {"error": {"message": "This model's maximum context length is 9 tokens"}}
    fake.replies = [(400, said)]
    first, second = fake.extractor(parallel=1).write(ask("a", "b"))
    assert "maximum context length" in first.skipped and not first.text
    assert second == Written("re: b")


def test_a_host_that_is_none_is_told_at_once() -> None:
    endpoint = Endpoint(url="http://nowhere.invalid/v1", model="m")
    pauses: list[float] = []
    with pytest.raises(ExtractorError, match=r"no such host .*correct experience.extractor.url"):
        EndpointExtractor(endpoint, 0.0, 9, pause=pauses.append).write(ask("a"))
    assert pauses == []


def test_a_server_that_is_not_up_is_waited_for_and_named(fake: Fake) -> None:
    closed = Fake()
    closed.server.server_close()
    extractor = closed.extractor()
    with pytest.raises(ExtractorError, match=r"no connection .*, and so 3 times"):
        extractor.write(ask("a"))
    assert closed.pauses == [1.0, 2.0]


def test_a_server_that_never_answers_is_given_up() -> None:
    slow, release = Fake(), threading.Event()
    handler = slow.server.RequestHandlerClass
    handler.do_POST = lambda self: release.wait(30)  # type: ignore[attr-defined]
    slow.thread.start()
    try:
        with pytest.raises(ExtractorError, match=r"no answer within 0.05 s .*timeout_s"):
            slow.extractor(timeout_s=0.05, retries=0).write(ask("a"))
    finally:
        release.set()
        slow.server.shutdown()
        slow.server.server_close()
        slow.thread.join()


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(url="http://h", model="m", key_env="OPCD_TEST_KEY")
    monkeypatch.setenv("OPCD_TEST_KEY", f"{KEY}\n")
    assert read_key(endpoint) == KEY
    monkeypatch.setenv("OPCD_TEST_KEY", " ")
    with pytest.raises(ConfigError, match=r"OPCD_TEST_KEY.*or it is empty; set it to the key"):
        read_key(endpoint)
    assert read_key(Endpoint(url="http://h", model="m")) is None
