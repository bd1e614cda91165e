"""Head and divergence over slices of tokens, with the memory of one slice.

The only place that ever sees `[C, V]` logits: neither side's `[T, V]` exists. Knows of a model
only its head, a function from hidden states to logits.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opcd.config.training import Loss
from opcd.divergence import TokenStats, stats_and_gradient, token_stats

Head = Callable[[Tensor], Tensor]
"""hidden_CD -> logits_CV"""


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

    def logits_of(student_CD: Tensor, teacher_CD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_CV = teacher_head(teacher_CD)
        student_CV = student_head(student_CD)
        # Two models of one vocabulary may pad their heads to different widths.
        width = min(student_CV.shape[-1], teacher_CV.shape[-1])
        return student_CV[:, :width], teacher_CV[:, :width]

    def one_chunk(student_CD: Tensor, teacher_CD: Tensor, response_C: Tensor) -> TokenStats:
        return token_stats(*logits_of(student_CD, teacher_CD), response_C, loss)

    def slices(*sides: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(side_T.split(loss.chunk_tokens) for side_T in sides), strict=True)

    def run_frozen(student_TD: Tensor) -> tuple[TokenStats, Tensor]:
        found, gradients = [], []
        for student_CD, teacher_CD, response_C in slices(student_TD, teacher_TD, response_T):
            leaf_CD = student_CD.detach().requires_grad_()
            with torch.enable_grad():
                student_CV, teacher_CV = logits_of(leaf_CD, teacher_CD)
            stats, gradient_CV = stats_and_gradient(student_CV, teacher_CV, response_C, loss)
            gradients += torch.autograd.grad(student_CV, leaf_CD, gradient_CV)
            found.append(stats)
        return _join(found), torch.cat(gradients)

    # The head of no token costs nothing, and tells whether it would be trained.
    if torch.is_grad_enabled() and not student_head(student_TD[:0].detach()).requires_grad:
        return TokenStats(*_FrozenHead.apply(student_TD, run_frozen))
    parts = slices(student_TD, teacher_TD, response_T)
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
