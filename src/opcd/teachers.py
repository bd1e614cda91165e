"""Who scores the responses: a model with the context, and weights of a certain kind.

    adapter_off   the student without its adapter: the base model, one copy of the weights
    frozen        another model of the same vocabulary, or the student's first weights
    ema           a running mean of the student
    refresh       a snapshot of the student, renewed every so many steps
    live          the student itself
    remote        a model on a server, which `remote` speaks to

Only the first two stand still, so only they can read a shared context once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opcd.adapters import adapter_off, trainable
from opcd.batching import Batch, Side
from opcd.chunking import Head, Hidden, TeacherScore
from opcd.config import training
from opcd.divergence import divergence
from opcd.models import compute_dtype, hidden_states, output_head, why_no_prefix
from opcd.prefix_cache import SharedPrefix, forward_after_prefix, read_prefix

MAX_PREFIX_KL_NATS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far the cached pass may be from the uncached one before it is not used."""


class Teacher(Protocol):
    """What the distillation step asks of a teacher, here or on a server."""

    moves: bool

    @property
    def prefix_tokens(self) -> int:
        """Tokens at the head of every prompt that it has read already."""
        ...

    def score(self, batch: Batch) -> TeacherScore:
        """What it says of the response tokens; the batch is cut by `prefix_tokens`, or not."""
        ...

    def after_step(self, step: int) -> None:
        """Take note that the student has moved."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a resumed run has to give back."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        ...


@dataclass
class Shadow:
    """Other values for a model's trainable weights, which can take their place for a while."""

    model: nn.Module
    follow: Callable[[int, Tensor, Tensor], object]
    """`(step, shadow, live)`: move the shadow weight in place."""
    weights: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Start from the student's first weights."""
        self.weights = {name: p.detach().clone() for name, p in trainable(self.model).items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the shadow's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Follow the student."""
        for name, live in trainable(self.model).items():
            self.follow(step, self.weights[name], live.detach())

    def _swap(self) -> None:
        for name, live in trainable(self.model).items():
            live.data, self.weights[name] = self.weights[name], live.data


@dataclass
class LocalTeacher:
    """A teacher in this process: a model, and a context manager that gives it its weights."""

    model: Any
    as_teacher: Callable[[], AbstractContextManager[Any, Any]]
    autocast: Callable[[], AbstractContextManager[Any, Any]]
    moves: bool = False
    shadow: Shadow | None = None
    prefix: SharedPrefix | None = None
    head: Head = field(init=False)

    def __post_init__(self) -> None:
        """Take the head once; where it is trained, with the teacher's weights in place."""
        head = output_head(self.model)

        def own_head(hidden_CD: Tensor) -> Tensor:
            with self.as_teacher():
                return head(hidden_CD)

        trained = any(p.requires_grad for p in self.model.get_output_embeddings().parameters())
        self.head = own_head if trained else head

    @property
    def prefix_tokens(self) -> int:
        """Tokens at the head of every prompt that it has read already."""
        return self.prefix.tokens if self.prefix else 0

    def score(self, batch: Batch) -> TeacherScore:
        """What it says of the response tokens, its head not yet applied."""
        return Hidden(self.hidden(batch.teacher), self.head)

    @torch.no_grad()
    def hidden(self, side: Side) -> Tensor:
        """`hidden_TD` at the response positions, without gradient."""
        with self._ready():
            if side.prefix_tokens == 0:
                return hidden_states(self.model, side)
            assert self.prefix and side.prefix_tokens == self.prefix.tokens, "another prefix"
            return side.take(forward_after_prefix(self.model, self.prefix, side.ids_BS))

    def share_prefix(self, ids: Sequence[int], probe: Sequence[int]) -> str | None:
        """Read the context that all prompts begin with, once and for all.

        Args:
            ids: the tokens shared by all teacher prompts.
            probe: some prompt's tokens after them, on which cached and uncached are compared.

        Returns:
            The reason why the prompts are read in full all the same; `None` if they are not.
        """
        if self.moves:
            return "the teacher's weights move"
        if reason := why_no_prefix(self.model):
            return reason
        with self._ready(), torch.no_grad():
            prefix = read_prefix(self.model, ids)
            kl_nats = self._prefix_error(prefix, probe)
            allowed_nats = MAX_PREFIX_KL_NATS.get(compute_dtype(self.model), 2e-2)
        if not kl_nats <= allowed_nats:
            return f"reading it once is {kl_nats:.2g} nats away from reading it every time"
        self.prefix = prefix
        return None

    def after_step(self, step: int) -> None:
        """Take note that the student has moved."""
        if self.shadow:
            self.shadow.after_step(step)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run has to give back."""
        return dict(self.shadow.weights) if self.shadow else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        if self.shadow:
            for name, weight in self.shadow.weights.items():
                weight.copy_(state[name])

    def _prefix_error(self, prefix: SharedPrefix, probe: Sequence[int]) -> float:
        device = next(self.model.parameters()).device
        whole = Side(
            torch.tensor([[*prefix.ids, *probe]], device=device),
            torch.zeros(len(probe), dtype=torch.long, device=device),
            torch.arange(len(probe), device=device) + prefix.tokens,
        )
        own_1S = torch.tensor([list(probe)], device=device)
        cached_TD = forward_after_prefix(self.model, prefix, own_1S)[0]
        sides = (hidden_states(self.model, whole), cached_TD)
        log_probs = [self.head(side_TD).log_softmax(-1) for side_TD in sides]
        return divergence(log_probs[0], log_probs[1], "reverse_kl").max().item()

    @contextmanager
    def _ready(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with self.as_teacher(), self.autocast():
                yield
        finally:
            self.model.train(was_training)


def build_teacher(
    config: training.TeacherConfig,
    student: Any,
    frozen: Any,
    autocast: Callable[[], AbstractContextManager[Any, Any]],
) -> LocalTeacher:
    """The teacher that a `[teacher]` table describes.

    Args:
        config: the table.
        student: the model in training.
        frozen: the other model, for `frozen`.
        autocast: the precision in which teachers run.
    """
    match config:
        case training.AdapterOff():
            return LocalTeacher(student, lambda: adapter_off(student), autocast)
        case training.Frozen():
            return LocalTeacher(frozen, nullcontext, autocast)
        case training.Live():
            return LocalTeacher(student, nullcontext, autocast, moves=True)
        case training.Ema(decay=decay):
            shadow = Shadow(student, lambda _, mean, live: mean.lerp_(live, 1.0 - decay))
        case training.Refresh(every_steps=every):
            shadow = Shadow(student, lambda step, copy, live: _renew(step, every, copy, live))
        case training.Remote():
            raise AssertionError("a teacher on a server is no model here: see opcd.remote")
    return LocalTeacher(student, shadow.in_place, autocast, moves=True, shadow=shadow)


def _renew(step: int, every_steps: int, copy: Tensor, live: Tensor) -> None:
    if (step + 1) % every_steps == 0:
        copy.copy_(live)
