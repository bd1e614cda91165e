"""`opcd.batching`: both sides score the same tokens, in the right place."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from opcd.batching import WIDTH_STEP, Batch, Side, collate
from opcd.models import hidden_states, output_head
from opcd.types import PromptPair, Rollout
from tiny import log_probs_of, pair_of, random_ids, rollout_of
from worlds import END_ID, tiny_llama

PREFIX = 20
PAIRS = [
    pair_of("a", 7, 41, seed=1, shared=PREFIX),
    pair_of("b", 3, 30, seed=2, shared=PREFIX),
    pair_of("c", 12, 64, seed=3, shared=PREFIX),
]
ROLLOUTS = [rollout_of("a", 5, 1), rollout_of("b", 9, 2), rollout_of("c", 1, 3)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(seed=4)


def scored(model: Any, side: Side) -> Tensor:
    """The log-probabilities `_TV` at a side's response positions, as the library reads them."""
    with torch.no_grad():
        return output_head(model)(hidden_states(model, side)).double().log_softmax(-1)


def reference(model: Any, prompts: list[tuple[int, ...]]) -> Tensor:
    with torch.no_grad():
        rows = zip(prompts, ROLLOUTS, strict=True)
        return torch.cat([log_probs_of(model, p, r.response_ids) for p, r in rows])


def test_both_sides_equal_a_token_by_token_reference(model: Any) -> None:
    """A shift common to both sides would still give KL 0 to itself; this sees it."""
    batch = collate(PAIRS, ROLLOUTS)
    student = reference(model, [pair.student_ids for pair in PAIRS])
    teacher = reference(model, [pair.teacher_ids for pair in PAIRS])
    torch.testing.assert_close(scored(model, batch.student), student, rtol=0, atol=1e-4)
    torch.testing.assert_close(scored(model, batch.teacher), teacher, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_reference_would_see_a_shift_by_one(model: Any, shift: int) -> None:
    """Tests the test above: positions moved by one give other values."""
    side = collate(PAIRS, ROLLOUTS).student
    padded_BS = torch.nn.functional.pad(side.ids_BS, (0, 1))
    shifted = replace(side, ids_BS=padded_BS, column_T=side.column_T + shift)
    student = reference(model, [pair.student_ids for pair in PAIRS])
    assert (scored(model, shifted) - student).abs().max() > 0.5


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_rows_may_be_taken_apart_and_their_heads_left_out(model: Any, rows: list[int]) -> None:
    """Glued behind what was left out, they are scored as before, and know their places among T."""
    side, cuts = collate(PAIRS, ROLLOUTS).teacher, [PREFIX, 29, 7]
    own, place_T = side.part(rows, [cuts[row] for row in rows])
    assert place_T.tolist() == [t for t, row in enumerate(side.row_T.tolist()) if row in rows]
    wanted_TV = scored(model, side)[place_T]
    assert own.ids_BS.shape[1] % WIDTH_STEP == 0
    for new, row in enumerate(rows):
        ids_S = torch.cat([side.ids_BS[row, : cuts[row]], own.ids_BS[new]])
        mine_T = own.row_T == new
        glued = Side(ids_S[None], torch.zeros_like(own.row_T[mine_T]), own.column_T[mine_T])
        glued = replace(glued, column_T=glued.column_T + cuts[row])
        found_TV = scored(model, glued)
        torch.testing.assert_close(found_TV, wanted_TV[mine_T], rtol=0, atol=1e-4)


def test_a_side_knows_its_prompts() -> None:
    assert collate(PAIRS, ROLLOUTS).teacher.prompts() == [pair.teacher_ids for pair in PAIRS]
    assert collate(PAIRS, ROLLOUTS).student.prompts() == [pair.student_ids for pair in PAIRS]


def test_something_is_left_of_every_prompt() -> None:
    """The last prompt token predicts the first of the response."""
    side = collate(PAIRS, ROLLOUTS).teacher
    side.part([1], [29])
    with pytest.raises(AssertionError, match="leave nothing of a prompt"):
        side.part([1], [30])


def test_the_end_of_sequence_token_is_trained_on() -> None:
    """Every response token counts, the end included, though padding may have the same id."""
    batch = collate(PAIRS, ROLLOUTS)
    assert batch.response_T.tolist() == [t for r in ROLLOUTS for t in r.response_ids]
    assert (batch.response_T == END_ID).sum() == len(ROLLOUTS)
    assert len(batch.response_T) == len(batch.student.row_T) == len(batch.teacher.row_T) == 15


@pytest.mark.parametrize("filler", [END_ID, 299])
def test_the_contents_of_padding_never_change_a_value(model: Any, filler: int) -> None:
    batch = collate(PAIRS, ROLLOUTS)
    for side in (batch.student, batch.teacher):
        last_B = torch.stack([side.column_T[side.row_T == row].max() for row in range(3)])
        padding_BS = torch.arange(side.ids_BS.shape[1]) > last_B.unsqueeze(-1)
        assert padding_BS.any()
        refilled = replace(side, ids_BS=side.ids_BS.masked_fill(padding_BS, filler))
        assert not torch.equal(refilled.ids_BS, side.ids_BS)
        torch.testing.assert_close(scored(model, refilled), scored(model, side), rtol=0, atol=1e-5)


def test_the_last_response_token_is_read_by_nobody() -> None:
    """It predicts nothing, so a row is one token shorter than prompt and response."""
    response = (*random_ids(4, 9), 299)
    batch = collate([PromptPair("x", (1, 2, 3), (1, 2, 3, 4))], [Rollout("x", response, False)])
    assert batch.student.ids_BS.tolist() == [[1, 2, 3, *response[:-1], 0]]
    assert batch.teacher.ids_BS.tolist() == [[1, 2, 3, 4, *response[:-1]]]
    assert batch.student.ids_BS.shape[1] % WIDTH_STEP == 0
    assert batch.student.column_T.tolist() == [2, 3, 4, 5, 6]


def test_each_token_knows_the_length_of_its_response() -> None:
    batch = collate(PAIRS, ROLLOUTS)
    assert batch.length_T.tolist() == [5] * 5 + [9] * 9 + [1]
    assert batch.sequences == 3
    per_sequence = (1.0 / batch.length_T).sum()
    assert per_sequence == pytest.approx(3.0), "each response weighs one under `sequence`"


def test_moving_a_batch_moves_everything() -> None:
    batch = collate(PAIRS, ROLLOUTS).to(torch.device("meta"))
    assert isinstance(batch, Batch)
    tensors = (batch.response_T, batch.length_T, batch.student.ids_BS, batch.teacher.column_T)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        ([ROLLOUTS[1], ROLLOUTS[0], ROLLOUTS[2]], "a is not b"),
        ([Rollout("a", (), True), *ROLLOUTS[1:]], "a has an empty response"),
    ],
)
def test_what_cannot_be_aligned_is_refused(rollouts: list[Rollout], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        collate(PAIRS, rollouts)
