"""New weights of the student for vLLM servers: written whole, then loaded over HTTP.

An adapter gets a new name with every version, so that nothing computed with an older one is ever
reused; the older one is unloaded. All weights take the place of those that are being served.
"""

import contextlib
import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from opcd.adapters import in_shards, save_weights, writes_to
from opcd.errors import OpcdError, ServerError
from opcd.rollouts.engine import Policy
from opcd.servers import Refusal, Server, spread
from opcd.sharding import weights_by_name

Once = Callable[[Callable[[], str]], str]
"""Runs a function in one process of many, and gives what it returns to all of them."""

LOST = "it had lost the student's weights; they were loaded again"


class Publisher(Protocol):
    """Sees to it that the servers have the weights of a policy."""

    model: str
    """What they are to be asked for."""

    def publish(self, policy: Policy, version: int) -> None:
        """Let all servers answer as this policy.

        Raises:
            ServerError: one of them does not take the weights.
        """
        ...

    def has_lost(self, server: Server) -> bool:
        """Whether a server has other weights than it was given, as after a restart."""
        ...

    def restore(self, server: Server) -> None:
        """Give a server the weights again."""
        ...


class Shelf:
    """A folder for versions of the weights, of which only the newest is kept."""

    def __init__(self, folder: Path | None) -> None:
        """Take a folder that servers can read, or one for this process alone."""
        self._folder = folder or Path(tempfile.mkdtemp(prefix="opcd-weights-"))
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._token = secrets.token_hex(4)
        self._count = 0

    def put(self, model: Any, weights: Mapping[str, Tensor] | None = None) -> Path:
        """What was trained, as a folder of a new name: whole, or not there.

        Args:
            model: the model.
            weights: what was trained, if the model does not hold it as a whole.

        Raises:
            ServerError: it could not be written.
        """
        self._count += 1
        target = self._folder.absolute() / f"opcd-{self._token}-{self._count}"
        draft = target.with_name(f".{target.name}")
        try:
            save_weights(model, draft, weights)
            for file in draft.iterdir():
                file.chmod(0o644)  # a server may be another user's
            draft.rename(target)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise ServerError(
                f"the weights for the servers could not be written ({error}); free space there, "
                "or name another folder as rollout.weights_folder, then continue with --resume"
            ) from error
        return target


class AdapterPublisher:
    """For LoRA: the servers hold the base model, and the student's adapter beside it."""

    def __init__(
        self, servers: Sequence[Server], base_name: str, student: Any, shelf: Shelf, once: Once
    ) -> None:
        """Note the parts; nothing is sent yet."""
        self.model = base_name
        self._servers = servers
        self._base_name = base_name
        self._student = student
        self._shelf = shelf
        self._once = once
        self._path: Path | None = None
        self._published: tuple[int, int] | None = None
        self._restoring = threading.Lock()

    def publish(self, policy: Policy, version: int) -> None:
        """Let all servers answer as the student of this version, or as the base model."""
        if policy == "base":
            self.model = self._base_name
            return
        wanted = version, writes_to(self._student)
        if self._published != wanted:
            weights = gathered(self._student)
            before, self._path = self._path, Path(self._once(lambda: self._send(weights)))
            self._published = wanted
            if before:
                shutil.rmtree(before, ignore_errors=True)
        assert self._path, "published above, or before"
        self.model = self._path.name

    def has_lost(self, server: Server) -> bool:
        """Never known beforehand: a server that lost it does not know its name when asked."""
        return False

    def restore(self, server: Server) -> None:
        """Load the adapter again on a server that does not know it any longer.

        Raises:
            ServerError: it does not take it, or does not know the base model either.
        """
        with self._restoring:
            try:
                known = server.ask("/v1/models", read=names_of)
            except Refusal as refusal:
                raise ServerError(
                    f"{server.url} does not tell which models it has: {refusal}; see to the "
                    "server, then continue with --resume"
                ) from None
            if self._path is None or self.model not in {self._path.name, *known}:
                raise ServerError(
                    f"{server.url} has {sorted(known)} and not {self.model!r}; see to the server, "
                    "then continue with --resume"
                )
            # Of many requests that missed it, the first has it loaded.
            if self.model not in known:
                server.note(LOST)
                load_adapter(server, self._path)

    def _send(self, weights: Mapping[str, Tensor] | None) -> str:
        path, before = self._shelf.put(self._student, weights), self._path

        def load(server: Server) -> None:
            load_adapter(server, path)
            if before:
                # One that has been restarted does not know it.
                with contextlib.suppress(Refusal):
                    server.ask("/v1/unload_lora_adapter", {"lora_name": before.name})

        on_each(self._servers, load)
        return str(path)


class WeightPublisher:
    """For full fine-tuning: the servers' weights are replaced where they are."""

    def __init__(
        self,
        servers: Sequence[Server],
        base_name: str,
        student: Any,
        base_path: str,
        shelf: Shelf,
        once: Once,
    ) -> None:
        """Note the parts; nothing is sent yet."""
        self.model = base_name
        self._servers = servers
        self._student = student
        self._base_path = base_path
        self._shelf = shelf
        self._once = once
        self._path = ""
        self._version = ""
        self._written: tuple[tuple[int, int], str] | None = None

    def publish(self, policy: Policy, version: int) -> None:
        """Let all servers have the student's weights of this version, or the base model's."""
        path = self._base_path if policy == "base" else self._put(version)
        if path == self._path:
            return
        self._path, self._version = path, Path(path).name
        self._once(self._send)

    def has_lost(self, server: Server) -> bool:
        """Whether a server has other weights than it was given, as after a restart.

        Raises:
            ServerError: it does not tell.
        """
        try:
            told = server.ask("/weight_info", read=lambda reply: str(reply["weight_version"]))
        except Refusal as refusal:
            raise ServerError(
                f"{server.url} does not tell which weights it has: {refusal}; start it with "
                "VLLM_SERVER_DEV_MODE=1 in its environment, then continue with --resume"
            ) from None
        return told != self._version

    def restore(self, server: Server) -> None:
        """Give a server the weights again."""
        server.note(LOST)
        reload_weights(server, self._path, self._version)

    def _put(self, version: int) -> str:
        key = version, writes_to(self._student)
        if self._written is None or self._written[0] != key:
            before, weights = self._written, gathered(self._student)
            put = self._once(lambda: str(self._shelf.put(self._student, weights)))
            self._written = key, put
            if before:
                shutil.rmtree(before[1], ignore_errors=True)
        return self._written[1]

    def _send(self) -> str:
        on_each(self._servers, lambda one: reload_weights(one, self._path, self._version))
        return self._path


def gathered(model: Any) -> dict[str, Tensor] | None:
    """What was trained, if it is in shards, in the main process; all have to ask together."""
    return weights_by_name(model) if in_shards(model) else None


def load_adapter(server: Server, path: Path) -> None:
    """Load an adapter under its folder's name.

    Raises:
        ServerError: the server does not take it.
    """
    try:
        server.ask("/v1/load_lora_adapter", {"lora_name": path.name, "lora_path": str(path)})
    except Refusal as refusal:
        # As after an answer that did not come through.
        if "already been loaded" not in refusal.said:
            raise ServerError(why_no_adapter(server, path, refusal)) from None


def names_of(reply: Any) -> set[str]:
    """The models that a server says it has."""
    return {model["id"] for model in reply["data"]}


def reload_weights(server: Server, path: str, version: str) -> None:
    """Replace a server's weights while it answers nobody, and call them by a version.

    Raises:
        ServerError: the server does not do this.
    """
    rpc = {"method": "reload_weights", "kwargs": {"weights_path": path}}
    try:
        # The pause also clears what was computed with the weights before.
        server.ask("/pause?mode=wait", {})
        try:
            server.ask("/collective_rpc", rpc)
            server.ask("/update_weight_version", {"new_version": version})
        finally:
            with contextlib.suppress(OpcdError, Refusal):
                server.ask("/resume", {})
    except Refusal as refusal:
        raise ServerError(
            f"{server.url} does not take new weights: {refusal}; start it with "
            'VLLM_SERVER_DEV_MODE=1 in its environment, or write model.tuning = {type = "lora"}'
        ) from None


def why_no_adapter(server: Server, path: Path, refusal: Refusal) -> str:
    """What to change where a server does not take an adapter."""
    if "max_lora_rank" in refusal.said:
        way = "start it with a --max-lora-rank of at least model.tuning.rank, or lower that"
    elif "No adapter found" in refusal.said:
        way = (
            f"it cannot read {path}: give a folder that both can read under this very path as "
            "rollout.weights_folder"
        )
    elif refusal.status == 404:
        way = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    else:
        way = "start it with --enable-lora, and see what it says"
    return f"{server.url} does not take the student's adapter: {refusal}; {way}"


def on_each(servers: Sequence[Server], act: Callable[[Server], None]) -> None:
    """Do something with all servers at the same time; the first failure is raised."""
    spread(servers, range(len(servers)), 1, lambda server, _: act(server))
