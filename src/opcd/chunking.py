"""Head and divergence over slices of tokens, with the memory of one slice.

The only place that ever sees `[C, V]` logits: neither side's `[T, V]` exists. Knows of a model
only its head, a function from hidden states to logits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from opcd.config.training import Loss
from opcd.divergence import (
    Listed,
    TokenStats,
    listed_token_stats,
    stats_and_gradient,
    stats_by_autograd,
    token_stats,
)

Head = Callable[[Tensor], Tensor]
"""hidden_CD -> logits_CV"""


class Scoring(NamedTuple):
    """What is made of the student's logits of some tokens, and what else belongs to them."""

    stats: Callable[..., TokenStats]
    """With a graph."""
    stats_and_gradient: Callable[..., tuple[TokenStats, Tensor]]
    """Without one, and the gradient of each token's divergence, `_CV`."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a teacher here says of response tokens: its whole distribution, not yet written out."""

    hidden_TD: Tensor
    head: Head


@dataclass(frozen=True, slots=True)
class Asked:
    """A teacher far away that scores the tokens it is asked for: the student's likeliest."""

    k: int
    ask: Callable[[Tensor], Listed]
    """`ids_TK` -> what it says of them."""


TeacherScore = Hidden | Listed | Asked


def stats_against(
    student_TD: Tensor,
    student_head: Head,
    teacher: TeacherScore,
    response_T: Tensor,
    loss: Loss,
) -> TokenStats:
    """Statistics of each response token against what its teacher says of it."""
    if isinstance(teacher, Hidden):
        sides = student_TD, student_head, teacher.hidden_TD, teacher.head
        return chunked_stats(*sides, response_T, loss)
    if isinstance(teacher, Asked):
        ids_TK = top_ids(student_TD, student_head, teacher.k, loss.chunk_tokens)
        teacher = teacher.ask(ids_TK)
    device = student_TD.device
    listed = Listed(*(column.to(device) for column in teacher))
    return listed_stats(student_TD, student_head, listed, response_T, loss)


@torch.no_grad()
def top_ids(student_TD: Tensor, student_head: Head, k: int, chunk_tokens: int) -> Tensor:
    """The student's `k` likeliest tokens at each position, `ids_TK`."""
    parts = student_TD.detach().split(chunk_tokens)
    return torch.cat([student_head(student_CD).topk(k).indices for student_CD in parts])


def chunked_stats(
    student_TD: Tensor,
    student_head: Head,
    teacher_TD: Tensor,
    teacher_head: Head,
    response_T: Tensor,
    loss: Loss,
) -> TokenStats:
    """`token_stats` of all tokens with the memory of `loss.chunk_tokens`.

    Values and gradients are those of the unchunked computation. A head that is trained runs once
    more in the backward pass; one that is not runs once, since the gradient of a hidden state
    is then known as soon as its divergence is.

    Args:
        student_TD: the student's hidden states at the response positions, with gradient.
        student_head: the student's output head.
        teacher_TD: the teacher's hidden states at the same positions.
        teacher_head: the teacher's output head.
        response_T: the sampled tokens.
        loss: what to compute.
    """

    def sides(student_CV: Tensor, teacher_CD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_CV = teacher_head(teacher_CD)
        # Two models of one vocabulary may pad their heads to different widths.
        width = min(student_CV.shape[-1], teacher_CV.shape[-1])
        return student_CV[:, :width], teacher_CV[:, :width]

    def one_chunk(student_CV: Tensor, teacher_CD: Tensor, response_C: Tensor) -> TokenStats:
        return token_stats(*sides(student_CV, teacher_CD), response_C, loss)

    def differentiate(
        student_CV: Tensor, teacher_CD: Tensor, response_C: Tensor
    ) -> tuple[TokenStats, Tensor]:
        stats, gradient_CV = stats_and_gradient(*sides(student_CV, teacher_CD), response_C, loss)
        missing = student_CV.shape[-1] - gradient_CV.shape[-1]
        return stats, pad(gradient_CV, (0, missing)) if missing else gradient_CV

    others = (teacher_TD, response_T)
    return _in_chunks(student_TD, student_head, others, Scoring(one_chunk, differentiate), loss)


def listed_stats(
    student_TD: Tensor, student_head: Head, teacher: Listed, response_T: Tensor, loss: Loss
) -> TokenStats:
    """`listed_token_stats` of all tokens with the memory of `loss.chunk_tokens`.

    Args:
        student_TD: the student's hidden states at the response positions, with gradient.
        student_head: the student's output head.
        teacher: what is known of the teacher at the same positions.
        response_T: the sampled tokens.
        loss: what to compute.
    """

    def one_chunk(student_CV: Tensor, *known: Tensor) -> TokenStats:
        *listed, response_C = known
        return listed_token_stats(student_CV, Listed(*listed), response_C, loss)

    def differentiate(student_CV: Tensor, *known: Tensor) -> tuple[TokenStats, Tensor]:
        return stats_by_autograd(lambda leaf_CV: one_chunk(leaf_CV, *known), student_CV)

    others = (*teacher, response_T)
    return _in_chunks(student_TD, student_head, others, Scoring(one_chunk, differentiate), loss)


def _in_chunks(
    student_TD: Tensor,
    student_head: Head,
    others: Sequence[Tensor],
    scoring: Scoring,
    loss: Loss,
) -> TokenStats:
    """What is known of each token, `loss.chunk_tokens` at a time."""

    def one_chunk(student_CD: Tensor, *rest: Tensor) -> TokenStats:
        return scoring.stats(student_head(student_CD), *rest)

    def slices(*sides: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(side_T.split(loss.chunk_tokens) for side_T in sides), strict=True)

    def run_frozen(student_TD: Tensor) -> tuple[TokenStats, Tensor]:
        # What stays is there before the logits come and go: between them it would keep the C
        # library from using their places again.
        gradient_TD = torch.empty_like(student_TD)
        precise = torch.promote_types(student_TD.dtype, torch.float32)
        found = TokenStats(
            *(student_TD.new_empty(len(student_TD), dtype=precise) for _ in TokenStats._fields)
        )
        end = 0
        for student_CD, *rest in slices(student_TD, *others):
            start, end = end, end + len(student_CD)
            leaf_CD = student_CD.detach().requires_grad_()
            with torch.enable_grad():
                student_CV = student_head(leaf_CD)
            stats, gradient_CV = scoring.stats_and_gradient(student_CV.detach(), *rest)
            (gradient_TD[start:end],) = torch.autograd.grad(student_CV, leaf_CD, gradient_CV)
            for column_T, column_C in zip(found, stats, strict=True):
                column_T[start:end] = column_C
        return found, gradient_TD

    # The head of no token costs nothing, and tells whether it would be trained.
    if torch.is_grad_enabled() and not student_head(student_TD[:0].detach()).requires_grad:
        return TokenStats(*_FrozenHead.apply(student_TD, run_frozen))
    parts = slices(student_TD, *others)
    return _join([checkpoint(one_chunk, *part, use_reentrant=False) for part in parts])


class _FrozenHead(torch.autograd.Function):
    """Divergences together with the gradients of their hidden states.

    A token's divergence hangs on no other token's hidden state, so the gradient of their sum holds
    that of each, and the backward pass only has to scale it.
    """

    @staticmethod
    def forward(ctx: Any, student_TD: Tensor, run: Callable[..., Any]) -> tuple[Tensor, ...]:
        stats, gradient_TD = run(student_TD)
        ctx.save_for_backward(gradient_TD)
        ctx.mark_non_differentiable(*stats[1:])
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, *weights: Any) -> tuple[Tensor, None]:
        (gradient_TD,), weight_T = ctx.saved_tensors, weights[0]
        return (gradient_TD * weight_T.unsqueeze(-1)).to(gradient_TD.dtype), None


def _join(chunks: list[TokenStats]) -> TokenStats:
    return TokenStats(*(torch.cat(column) for column in zip(*chunks, strict=True)))
