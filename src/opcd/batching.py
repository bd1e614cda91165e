"""Pairs and rollouts become padded ids, and maps to the same T response positions on both sides.

Alignment lives here alone. With a prompt of P tokens, the logits at P-1 ... P+T-2 predict the
response tokens 0 ... T-1. Rows are padded on the right, so that a causal model never sees
padding from a real position: no mask is needed, whatever id the padding has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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

    def to(self, device: torch.device) -> "Side":
        """The same on another device."""
        return Side(*(t.to(device) for t in (self.ids_BS, self.row_T, self.column_T)))

    def prompts(self) -> list[tuple[int, ...]]:
        """Each row's tokens up to the first that predicts one of the response."""
        return self._up_to("amin")

    def rows(self) -> list[tuple[int, ...]]:
        """Each row's tokens up to the last that predicts one of the response."""
        return self._up_to("amax")

    def part(self, rows: Sequence[int], cuts: Sequence[int]) -> tuple["Side", Tensor]:
        """Some rows without tokens at their heads, and where among all T theirs are.

        Args:
            rows: which, in the order that they shall have.
            cuts: how many tokens each of them leaves out; fewer than its prompt has.
        """
        device, whole = self.ids_BS.device, self.rows()
        own = [whole[row][cut:] for row, cut in zip(rows, cuts, strict=True)]
        new_B = torch.full((len(self.ids_BS),), -1, device=device)
        new_B[torch.tensor(rows, device=device)] = torch.arange(len(rows), device=device)
        place_T = (new_B[self.row_T] >= 0).nonzero().squeeze(-1)
        row_T = new_B[self.row_T[place_T]]
        column_T = self.column_T[place_T] - torch.tensor(list(cuts), device=device)[row_T]
        assert int(column_T.min()) >= 0, f"{cuts} tokens leave nothing of a prompt"
        return Side(pad_right(own).to(device), row_T, column_T), place_T

    def _up_to(self, which: Literal["amin", "amax"]) -> list[tuple[int, ...]]:
        """Each row up to the first or the last column that predicts something."""
        end_B = torch.zeros(len(self.ids_BS), dtype=torch.long, device=self.row_T.device)
        end_B.scatter_reduce_(0, self.row_T, self.column_T, which, include_self=False)
        ends = zip(self.ids_BS.tolist(), end_B.tolist(), strict=True)
        return [tuple(ids[: end + 1]) for ids, end in ends]

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


def collate(pairs: Sequence[PromptPair], rollouts: Sequence[Rollout]) -> Batch:
    """One batch from pairs and their rollouts, in the same order.

    Args:
        pairs: prompts of both sides.
        rollouts: the responses to them; response ids are shared verbatim by both sides.
    """
    for pair, rollout in zip(pairs, rollouts, strict=True):
        assert pair.task_id == rollout.task_id, f"{pair.task_id} is not {rollout.task_id}"
        assert rollout.response_ids, f"{rollout.task_id} has an empty response"
    responses = [rollout.response_ids for rollout in rollouts]
    lengths = torch.tensor([len(response) for response in responses])
    return Batch(
        student=_side([pair.student_ids for pair in pairs], responses),
        teacher=_side([pair.teacher_ids for pair in pairs], responses),
        response_T=torch.tensor([token for response in responses for token in response]),
        length_T=lengths.repeat_interleave(lengths),
        sequences=len(pairs),
    )


def padded_width(rows: Sequence[Sequence[int]]) -> int:
    """The width of a batch: the longest row, rounded up to a multiple of `WIDTH_STEP`."""
    return math.ceil(max(len(row) for row in rows) / WIDTH_STEP) * WIDTH_STEP


def pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows as one batch, `_BS`."""
    width = padded_width(rows)
    return torch.tensor([(*row, *(0,) * (width - len(row))) for row in rows])


def _side(prompts: Sequence[tuple[int, ...]], responses: Sequence[tuple[int, ...]]) -> Side:
    # The last response token predicts nothing that is trained on, so no model needs to read it.
    rows = [prompt + response[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    row_T = [row for row, response in enumerate(responses) for _ in response]
    column_T = [
        len(prompt) - 1 + offset
        for prompt, response in zip(prompts, responses, strict=True)
        for offset in range(len(response))
    ]
    return Side(pad_right(rows), torch.tensor(row_T), torch.tensor(column_T))
