"""Who scores the responses: a model with the context, and weights of a certain kind.

    adapter_off   the student without its adapter: the base model, one copy of the weights
    frozen        another model of the same vocabulary, or the student's first weights
    ema           a running mean of the student
    refresh       a snapshot of the student, renewed every so many steps
    live          the student itself
    remote        a model on a server, which `remote` speaks to

Only the first two stand still, so only they can read a shared context once for the whole run; the
others read it again when they have moved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opcd.adapters import adapter_off, at_rest, trainable, writes_to
from opcd.attention import compute_dtype, why_no_prefix
from opcd.batching import Batch, Side
from opcd.chunking import Head, Hidden, TeacherScore
from opcd.config import training
from opcd.divergence import divergence
from opcd.models import hidden_states, output_head
from opcd.openings import Ids, Openings, find_openings, in_passes
from opcd.prefix_cache import SharedPrefix, read_prefix, states_after_prefix
from opcd.prefix_store import PREFIX_BYTES, PrefixStore
from opcd.sharding import collected, give, own_part

MAX_PREFIX_KL_NATS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far the cached pass may be from the uncached one before it is not used."""
WHOLE_TOKENS = 2**15
"""Tokens of rows without a shared opening that are read together, or one row if that has more."""


class Teacher(Protocol):
    """What the distillation step asks of a teacher, here or on a server."""

    moves: bool

    def score(self, batch: Batch) -> TeacherScore:
        """What it says of the response tokens."""
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
        self.start()

    def start(self) -> None:
        """Take the student's weights as they are now, in shards if they are."""
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
    def after_step(self, step: int) -> bool:
        """Follow the student; whether anything was written."""
        parts = {name: own_part(weight) for name, weight in self.weights.items()}
        before = sum(part._version for part in parts.values())
        for name, live in trainable(self.model).items():
            self.follow(step, parts[name], own_part(live.detach()))
        return sum(part._version for part in parts.values()) != before

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in trainable(self.model).items():
            if not isinstance(live, DTensor):
                live.data, self.weights[name] = self.weights[name], live.data
                continue
            # FSDP2 puts a weight together from the memory that its shard was given at first.
            ours, theirs = own_part(live), own_part(self.weights[name])
            kept = ours.clone()
            ours.copy_(theirs)
            theirs.copy_(kept)


@dataclass
class LocalTeacher:
    """A teacher in this process: a model, and a context manager that gives it its weights."""

    model: Any
    as_teacher: Callable[[], AbstractContextManager[Any, Any]]
    autocast: Callable[[], AbstractContextManager[Any, Any]]
    moves: bool = False
    shadow: Shadow | None = None
    prefix_bytes: int = PREFIX_BYTES
    inside: Callable[[Callable[[], Tensor]], Tensor] | None = None
    """Does work where the model's weights are whole, if they are in shards."""
    head: Head = field(init=False)
    openings: Openings = field(init=False, default_factory=Openings)
    """Those of the run's prompts, each read when it is first needed and kept."""
    prefixes: PrefixStore = field(init=False)
    """What it has read of them."""
    whole: str | None = None
    """Why every prompt is read in full; `None` where none has to be."""
    _is_ready: bool = field(init=False, default=False)
    _read_at: int = field(init=False, default=0)
    """How often the weights of a live teacher had been written to when an opening was read."""

    def __post_init__(self) -> None:
        """Take the head once; where it is trained, with the teacher's weights in place."""
        self.whole = why_no_prefix(self.model)
        self.prefixes = PrefixStore(self.model, self._read, self.prefix_bytes)
        head = output_head(self.model)

        def own_head(hidden_CD: Tensor) -> Tensor:
            with self.as_teacher():
                return head(hidden_CD)

        trained = any(p.requires_grad for p in self.model.get_output_embeddings().parameters())
        self.head = own_head if trained else head

    def score(self, batch: Batch) -> TeacherScore:
        """What it says of the response tokens, its head not yet applied."""
        return Hidden(self.hidden(batch.teacher), self.head)

    @torch.no_grad()
    def hidden(self, side: Side) -> Tensor:
        """`hidden_TD` at the response positions, without gradient.

        Rows that open alike are read behind one copy of their opening, the others in full.
        """
        if self.inside:
            with self._ready():
                return self.inside(partial(self._at_one_go, side))
        self._forget_if_written()
        prompts = side.prompts()
        cuts = [0] * len(prompts) if self.whole else self._cuts(prompts)
        if not any(cuts) and side.ids_BS.numel() <= WHOLE_TOKENS:
            with self._ready():
                return hidden_states(self.model, side)
        openings = [ids[:cut] for ids, cut in zip(prompts, cuts, strict=True)]
        order = sorted(range(len(prompts)), key=lambda row: (openings[row], len(prompts[row])))
        most_whole = max(1, WHOLE_TOKENS // side.ids_BS.shape[1])
        parts, places = [], []
        with self._ready():
            most = (len(prompts), self.prefixes.most_tokens, most_whole)
            for part in in_passes([openings[row] for row in order], *most):
                rows = [order[place] for place in part]
                own, place_T = side.part(rows, [cuts[row] for row in rows])
                parts.append(self._behind([openings[row] for row in rows], own))
                places.append(place_T)
        hidden_TD = torch.cat(parts)
        return hidden_TD[torch.cat(places).argsort()]

    def share(self, openings: Openings, probe: Ids) -> str | None:
        """Read what a run's prompts share once, each when it is first needed.

        A teacher that moves reads it again when it has moved.

        Args:
            openings: of all prompts of the run.
            probe: a prompt that has one, on which cached and uncached are compared.

        Returns:
            The reason why the prompts are read in full all the same; `None` if they are not.
        """
        if self.whole:
            return self.whole
        self._forget_if_written()
        cut = openings.of(probe)
        with self._ready(), torch.no_grad():
            kl_nats = self._prefix_error(self.prefixes.get(probe[:cut]), probe[cut:])
            allowed_nats = MAX_PREFIX_KL_NATS.get(compute_dtype(self.model), 2e-2)
        if not kl_nats <= allowed_nats:
            self.prefixes.clear()
            self.whole = f"reading it once is {kl_nats:.2g} nats away from reading it every time"
            return self.whole
        self.openings = openings
        return None

    def go_inside(self, inside: Callable[[Callable[[], Tensor]], Tensor]) -> None:
        """Take note that the weights are about to be cut, and are whole only within `inside`.

        Passes over them are from then on one for each batch, as in all processes. So what fits of
        the run's openings is read now, and nothing afterwards: a teacher that moves reads in full.
        """
        room = self.prefixes.most_tokens
        for ids in () if self.whole or self.moves else self.openings.known:
            room -= len(ids)
            if room >= 0:
                self.prefixes.get(ids)
        self.inside = inside

    def _at_one_go(self, side: Side) -> Tensor:
        """`hidden_TD` in one pass: behind openings that are all known, or in full."""
        prompts = side.prompts()
        openings = [ids[: self.openings.of(ids)] for ids in prompts]
        if not all(ids in self.prefixes for ids in openings):
            return hidden_states(self.model, side)
        own, place_T = side.part(list(range(len(prompts))), [len(ids) for ids in openings])
        prefixes = [self.prefixes.get(ids) for ids in openings]
        hidden_TD = states_after_prefix(self.model, prefixes, own)
        return hidden_TD[place_T.argsort()]

    def after_step(self, step: int) -> None:
        """Take note that the student has moved."""
        has_moved = self.shadow.after_step(step) if self.shadow else self.moves
        if has_moved:
            self.prefixes.clear()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run has to give back; the main process has it, and all ask together."""
        return collected(self.shadow.weights.items()) if self.shadow else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.prefixes.clear()
        if self.shadow:
            for name, weight in self.shadow.weights.items():
                give(weight, state[name])

    def _forget_if_written(self) -> None:
        """A live teacher's weights may be written between steps too, as when a run is measured."""
        if self.moves and not self.shadow and self._read_at != writes_to(self.model):
            self._read_at = writes_to(self.model)
            self.prefixes.clear()

    def _cuts(self, prompts: Sequence[Ids]) -> list[int]:
        """How many tokens of each are read once: of the run's openings, or the batch's own."""
        cuts = [self.openings.of(ids) for ids in prompts]
        rest = [row for row, cut in enumerate(cuts) if not cut]
        for row, cut in zip(rest, find_openings([prompts[row] for row in rest]), strict=True):
            cuts[row] = cut
        return cuts

    def _behind(self, openings: Sequence[Ids], own: Side) -> Tensor:
        """`hidden_TD` of rows that all have an opening, or none."""
        if not openings[0]:
            return hidden_states(self.model, own)
        # The batch's own openings are not kept: others will take their place.
        read = {
            ids: self.prefixes.get(ids) if ids in self.openings else read_prefix(self.model, ids)
            for ids in dict.fromkeys(openings)
        }
        prefixes = [read[ids] for ids in openings]
        return states_after_prefix(self.model, prefixes, own)

    def _read(self, ids: Ids) -> SharedPrefix:
        with self._ready(), torch.no_grad():
            return read_prefix(self.model, ids)

    def _prefix_error(self, prefix: SharedPrefix, probe: Sequence[int]) -> float:
        device = next(self.model.parameters()).device
        row_T = torch.zeros(len(probe), dtype=torch.long, device=device)
        column_T = torch.arange(len(probe), device=device)
        ids_1S = torch.tensor([[*prefix.ids, *probe]], device=device)
        whole = Side(ids_1S, row_T, column_T + prefix.tokens)
        own = Side(ids_1S[:, prefix.tokens :], row_T, column_T)
        sides = hidden_states(self.model, whole), states_after_prefix(self.model, [prefix], own)
        log_probs = [self.head(side_TD).log_softmax(-1) for side_TD in sides]
        return divergence(log_probs[0], log_probs[1], "reverse_kl").max().item()

    @contextmanager
    def _ready(self) -> Iterator[None]:
        # An opening may be read in the middle of it: a shadow must not be put back by that.
        if self._is_ready:
            yield
            return
        self._is_ready = True
        try:
            with at_rest(self.model), self.as_teacher(), self.autocast():
                yield
        finally:
            self._is_ready = False


def build_teacher(
    config: training.TeacherConfig,
    student: Any,
    frozen: Any,
    autocast: Callable[[], AbstractContextManager[Any, Any]],
    prefix_bytes: int = PREFIX_BYTES,
) -> LocalTeacher:
    """The teacher that a `[teacher]` table describes.

    Args:
        config: the table.
        student: the model in training.
        frozen: the other model, for `frozen`.
        autocast: the precision in which teachers run.
        prefix_bytes: keys and values of shared openings that it may keep.
    """
    match config:
        case training.AdapterOff():
            off = partial(adapter_off, student)
            return LocalTeacher(student, off, autocast, prefix_bytes=prefix_bytes)
        case training.Frozen():
            return LocalTeacher(frozen, nullcontext, autocast, prefix_bytes=prefix_bytes)
        case training.Live():
            return LocalTeacher(student, nullcontext, autocast, True, None, prefix_bytes)
        case training.Ema(decay=decay):
            shadow = Shadow(student, lambda _, mean, live: mean.lerp_(live, 1.0 - decay))
        case training.Refresh(every_steps=every):
            shadow = Shadow(student, lambda step, copy, live: _renew(step, every, copy, live))
        case training.Remote():
            raise AssertionError("a teacher on a server is no model here: see opcd.remote")
    return LocalTeacher(student, shadow.in_place, autocast, True, shadow, prefix_bytes)


def _renew(step: int, every_steps: int, copy: Tensor, live: Tensor) -> None:
    if (step + 1) % every_steps == 0:
        copy.copy_(live)
