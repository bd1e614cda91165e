"""Pairs and rollouts become padded ids, and maps to the same T response positions on both sides.

Alignment lives here alone. With a prompt of P tokens, the logits at P-1 ... P+T-2 predict the
response tokens 0 ... T-1. Rows are padded on the right, so that a causal model never sees
padding from a real position: no mask is needed, whatever id the padding has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opcd.types import PromptPair, Rollout

WIDTH_STEP = 8
"""Batches differ in width by this much, since a CPU compiles and keeps a matrix product for every
new shape: with any width, a run grew by 40 MB a step."""


@dataclass(frozen=True, slots=True)
class Side:
    """What one of the two models reads."""

    ids_BS: Tensor
    row_T: Tensor
    column_T: Tensor
    """Where the hidden state that predicts each response token stands."""
    prefix_tokens: int = 0
    """Tokens that every row has in front of `ids_BS` and that are not in it."""

    def to(self, device: torch.device) -> "Side":
        """The same on another device."""
        tensors = (t.to(device) for t in (self.ids_BS, self.row_T, self.column_T))
        return Side(*tensors, prefix_tokens=self.prefix_tokens)

    def take(self, hidden_BSD: Tensor) -> Tensor:
        """The hidden states that predict the response tokens, `hidden_TD`."""
        return hidden_BSD[self.row_T, self.column_T]


@dataclass(frozen=True, slots=True)
class Batch:
    """The same responses behind the student's and the teacher's prompts."""

    student: Side
    teacher: Side
    response_T: Tensor
    length_T: Tensor
    """How many tokens the response has that each token belongs to."""
    sequences: int

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        sides = (self.student.to(device), self.teacher.to(device))
        return Batch(*sides, self.response_T.to(device), self.length_T.to(device), self.sequences)


def collate(
    pairs: Sequence[PromptPair], rollouts: Sequence[Rollout], prefix_tokens: int = 0
) -> Batch:
    """One batch from pairs and their rollouts, in the same order.

    Args:
        pairs: prompts of both sides.
        rollouts: the responses to them; response ids are shared verbatim by both sides.
        prefix_tokens: how many tokens at the head of every teacher prompt are left out, because
            the teacher has read them already; less than the shortest teacher prompt.
    """
    for pair, rollout in zip(pairs, rollouts, strict=True):
        assert pair.task_id == rollout.task_id, f"{pair.task_id} is not {rollout.task_id}"
        assert rollout.response_ids, f"{rollout.task_id} has an empty response"
    responses = [rollout.response_ids for rollout in rollouts]
    lengths = torch.tensor([len(response) for response in responses])
    return Batch(
        student=_side([pair.student_ids for pair in pairs], responses, 0),
        teacher=_side([pair.teacher_ids for pair in pairs], responses, prefix_tokens),
        response_T=torch.tensor([token for response in responses for token in response]),
        length_T=lengths.repeat_interleave(lengths),
        sequences=len(pairs),
    )


def padded_width(rows: Sequence[Sequence[int]]) -> int:
    """The width of a batch: the longest row, rounded up to a multiple of `WIDTH_STEP`."""
    return math.ceil(max(len(row) for row in rows) / WIDTH_STEP) * WIDTH_STEP


def _side(
    prompts: Sequence[tuple[int, ...]], responses: Sequence[tuple[int, ...]], prefix_tokens: int
) -> Side:
    prompts = [prompt[prefix_tokens:] for prompt in prompts]
    assert all(prompts), f"a prefix of {prefix_tokens} tokens leaves nothing of a prompt"
    # The last response token predicts nothing that is trained on, so no model needs to read it.
    rows = [prompt + response[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    width = padded_width(rows)
    row_T = [row for row, response in enumerate(responses) for _ in response]
    column_T = [
        len(prompt) - 1 + offset
        for prompt, response in zip(prompts, responses, strict=True)
        for offset in range(len(response))
    ]
    return Side(
        ids_BS=torch.tensor([row + (0,) * (width - len(row)) for row in rows]),
        row_T=torch.tensor(row_T),
        column_T=torch.tensor(column_T),
        prefix_tokens=prefix_tokens,
    )
