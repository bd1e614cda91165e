"""Head and divergence over slices of tokens, recomputed in the backward pass.

The only place that ever sees `[C, V]` logits: neither side's `[T, V]` exists. Knows of a model
only its head, a function from hidden states to logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opcd.config.training import Loss
from opcd.divergence import TokenStats, token_stats

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

    Values and gradients are those of the unchunked computation; the heads run once more in the
    backward pass.

    Args:
        student_TD: the student's hidden states at the response positions, with gradient.
        student_head: the student's output head.
        teacher_TD: the teacher's hidden states at the same positions.
        teacher_head: the teacher's output head.
        response_T: the sampled tokens.
        loss: what to compute.
    """

    def one_chunk(student_CD: Tensor, teacher_CD: Tensor, response_C: Tensor) -> TokenStats:
        with torch.no_grad():
            teacher_CV = teacher_head(teacher_CD)
        student_CV = student_head(student_CD)
        # Two models of one vocabulary may pad their heads to different widths.
        width = min(student_CV.shape[-1], teacher_CV.shape[-1])
        return token_stats(student_CV[:, :width], teacher_CV[:, :width], response_C, loss)

    slices = (side_T.split(loss.chunk_tokens) for side_T in (student_TD, teacher_TD, response_T))
    chunks = [
        checkpoint(one_chunk, *parts, use_reentrant=False) for parts in zip(*slices, strict=True)
    ]
    return TokenStats(*(torch.cat(column) for column in zip(*chunks, strict=True)))
