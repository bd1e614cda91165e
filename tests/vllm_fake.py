"""A server in this process that answers as vLLM 0.32 was seen to, with a tiny model behind it.

Paths, statuses and shapes of answers are those recorded from the real server (see docs/vllm.md);
`make test-vllm` runs the same against the real one. What can go wrong is switched on by a test.
"""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from opcd.servers import Server

Fault = Callable[["FakeVllm"], tuple[int, bytes] | None]
"""What happens instead of an answer; `None` lets the answer come, late or wrong as it may be."""

LOADING = threading.Lock()
"""While transformers reads a model, no thread's models are tied: of two that read at one time, the
second would leave it at that for good."""


def read_model(path: Path) -> Any:
    """The model in a folder."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@dataclass
class FakeVllm:
    """What the server has, what it was asked, and what is wrong with it."""

    path: Path
    """The model's folder."""
    tokenizer: Any
    name: str = "base"
    max_model_len: int = 512
    max_logprobs: int = 256
    max_lora_rank: int = 32
    takes_adapters: bool = True
    scores_ids: bool = False
    """Whether it has `prompt_logprob_token_ids`, as on a GPU."""
    processed: bool = False
    """Whether log-probabilities come divided by the temperature (`--logprobs-mode`)."""
    dev_mode: bool = True
    adapters: dict[str, Any] = field(default_factory=dict)
    weight_version: str = "default"
    asked: list[tuple[str, Any]] = field(default_factory=list)
    faults: dict[str, list[Any]] = field(default_factory=dict)
    """By path: each `Fault` happens to one of the next requests of it."""
    url: str = ""
    spoil: Callable[[Any], Any] = lambda reply: reply
    """Changes every answer to `/v1/completions`."""
    lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Load the model."""
        with LOADING:
            self.first = read_model(self.path)
        self.model = self._load(self.path)

    def _load(self, path: Path) -> Any:
        if path == self.path:
            return deepcopy(self.first)
        with LOADING:
            return read_model(path)

    def restart(self) -> None:
        """As after a crash: everything that came over HTTP is gone."""
        self.adapters.clear()
        self.model, self.weight_version = self._load(self.path), "default"

    def paths_asked(self) -> list[str]:
        """Of all requests, in their order."""
        return [path for path, _ in self.asked]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer."""
        routes: dict[str, Callable[[Any], tuple[int, Any]]] = {
            "/v1/models": self._models,
            "/tokenize": self._tokenize,
            "/v1/completions": self._complete,
        }
        if self.takes_adapters:
            routes |= {
                "/v1/load_lora_adapter": self._load_adapter,
                "/v1/unload_lora_adapter": self._unload_adapter,
            }
        if self.scores_ids:
            routes["/inference/v1/generate"] = self._score_ids
        if self.dev_mode:
            routes |= {
                "/weight_info": lambda _: (200, {"weight_version": self.weight_version}),
                "/pause?mode=wait": lambda _: (200, {"status": "paused"}),
                "/resume": lambda _: (200, {"status": "resumed"}),
                "/collective_rpc": self._reload,
                "/update_weight_version": self._set_version,
            }
        return routes[path](body) if path in routes else (404, {"detail": "Not Found"})

    def _models(self, _: Any) -> tuple[int, Any]:
        base = {"id": self.name, "parent": None, "max_model_len": self.max_model_len}
        loras = [{"id": n, "parent": self.name, "max_model_len": None} for n in self.adapters]
        return 200, {"object": "list", "data": [base, *loras]}

    def _tokenize(self, body: Any) -> tuple[int, Any]:
        ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return 200, {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids}

    def _load_adapter(self, body: Any) -> tuple[int, Any]:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return said(400, f"The lora adapter '{name}' has already been loaded. If you want to")
        if not (path / "adapter_config.json").is_file():
            return said(404, f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads((path / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            why = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            return said(500, f"Call to add_lora method failed: Worker failed with error '{why}'")
        self.adapters[name] = PeftModel.from_pretrained(self._load(self.path), path).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload_adapter(self, body: Any) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return said(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def _reload(self, body: Any) -> tuple[int, Any]:
        self.model = self._load(Path(body["kwargs"]["weights_path"]))
        return 200, {"results": [None]}

    def _set_version(self, body: Any) -> tuple[int, Any]:
        self.weight_version = body["new_version"]
        return 200, {"success": True, "new_version": self.weight_version}

    def _complete(self, body: Any) -> tuple[int, Any]:
        known = {self.name: self.model, **self.adapters}
        if body["model"] not in known:
            return said(404, f"The model `{body['model']}` does not exist.")
        model, prompt = known[body["model"]], body["prompt"]
        if len(prompt) >= self.max_model_len:
            return said(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        if (body.get("prompt_logprobs") or 0) > self.max_logprobs:
            return said(
                400,
                f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than "
                f"max allowed: {self.max_logprobs}",
            )
        most = min(body["max_tokens"], self.max_model_len - len(prompt))
        ids, log_probs = sample(model, body, most, self.processed)
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(ids)}
        choice["prompt_logprobs"] = None
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = prompt_log_probs(model, prompt, body["prompt_logprobs"])
        choice["finish_reason"] = "length" if ids[-1] not in body_ends(body) else "stop"
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": log_probs}
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        return 200, self.spoil({"object": "text_completion", "choices": [choice]})

    def _score_ids(self, body: Any) -> tuple[int, Any]:
        how = body["sampling_params"]
        rows = how["prompt_logprob_token_ids"]
        if len(rows[0]) > self.max_logprobs:
            return said(400, f"Set max_logprobs (--max-logprobs) to at least {len(rows[0])}.")
        log_probs_SV = next_log_probs(self.model, body["token_ids"])
        start = how["prompt_logprob_start"]
        table = [
            [log_probs_SV[start + i, token].item() if token >= 0 else -numpy.inf for token in row]
            for i, row in enumerate(rows)
        ]
        buffer = io.BytesIO()
        numpy.save(buffer, numpy.array(table, dtype=numpy.float32), allow_pickle=False)
        encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
        return 200, {"prompt_token_id_logprobs": encoded, "choices": [{"token_ids": [0]}]}


def said(status: int, message: str) -> tuple[int, Any]:
    """An error in vLLM's wrapping."""
    return status, {"error": {"message": message, "type": "Error", "code": status}}


def body_ends(body: Any) -> Sequence[int]:
    """The tokens that end a response, as the request has them."""
    return body.get("stop_token_ids") or ()


@torch.no_grad()
def next_log_probs(model: Any, ids: Sequence[int]) -> Tensor:
    """`_SV`: at each token, of the next one."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)


def sample(model: Any, body: Any, most: int, processed: bool) -> tuple[list[int], list[float]]:
    """A response, one token after the other, and its tokens' log-probabilities."""
    ids: list[int] = []
    found: list[float] = []
    temperature = body["temperature"]
    generator = torch.Generator().manual_seed(body.get("seed", 0) % 2**31)
    while len(ids) < most and not (ids and ids[-1] in body_ends(body)):
        raw_V = next_log_probs(model, [*body["prompt"], *ids])[-1]
        warm_V = (raw_V / (temperature or 1.0)).log_softmax(-1)
        drawn = torch.multinomial(warm_V.exp(), 1, generator=generator)
        token = int(drawn if temperature else raw_V.argmax())
        ids.append(token)
        found.append((warm_V if processed else raw_V)[token].item())
    return ids, found


def prompt_log_probs(model: Any, ids: Sequence[int], k: int) -> list[Any]:
    """As vLLM writes them: `k` entries a token, and the token itself."""
    log_probs_SV = next_log_probs(model, ids)
    told: list[Any] = [None]
    for position, token in enumerate(ids[1:]):
        row_V = log_probs_SV[position]
        rank = int((row_V > row_V[token]).sum()) + 1
        entries = {str(token): {"logprob": row_V[token].item(), "rank": rank}}
        top = row_V.topk(k) if k else None
        for place, i in enumerate(top.indices.tolist() if top else [], start=1):
            entries.setdefault(str(i), {"logprob": row_V[i].item(), "rank": place})
        told.append(entries)
    return told


@contextmanager
def serving(fake: FakeVllm) -> Iterator[FakeVllm]:
    """The fake on a free port of this machine, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            fake.asked.append((self.path, body))
            waiting = fake.faults.get(self.path) or fake.faults.get("*")
            wrong = waiting.pop(0)(fake) if waiting else None
            if wrong is None:
                with fake.lock:
                    status, reply = fake.answer(self.path, body)
                text = reply if isinstance(reply, str) else json.dumps(reply)
                wrong = status, text.encode()
            self.send_response(wrong[0])
            self.send_header("Content-Length", str(len(wrong[1])))
            self.end_headers()
            self.wfile.write(wrong[1])

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def handle(self) -> None:
            """As always, but in silence where the other side has hung up."""
            try:
                super().handle()
            except ConnectionError:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def failing(status: int, message: str = "EngineCore encountered an issue.") -> Fault:
    """An error in vLLM's wrapping, such as that of an engine out of memory."""
    return lambda _: (status, json.dumps(said(status, message)[1]).encode())


def garbage(_: FakeVllm) -> tuple[int, bytes]:
    """What a proxy says in the server's place."""
    return 200, b"<html>Please log in</html>"


def slow(seconds: float) -> Fault:
    """An answer that comes late."""
    return lambda _: time.sleep(seconds)


def restarted(fake: FakeVllm) -> None:
    """The server has been started anew just before."""
    fake.restart()


def impatient(url: str, retries: int = 2, timeout_s: float = 5.0) -> Server:
    """A server that is asked again at once."""
    return Server(url, "rollout", timeout_s, retries, pause=lambda _: None)
