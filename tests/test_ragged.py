"""`opcd.ragged`: rows in one sequence attend as rows of their own would."""

from typing import Any

import pytest
import torch
from torch import Tensor

from opcd.ragged import Layout, attend

HEADS, KEY_HEADS, WIDTH = 6, 2, 4
LENGTHS = (5, 1, 9, 3)


def layout_of(lengths: tuple[int, ...] = LENGTHS, opening: int = 0) -> Layout:
    """Rows of these lengths behind an opening."""
    return Layout(lengths, opening, torch.device("cpu"))


def sides_of(layout: Layout, dtype: torch.dtype = torch.float64) -> Any:
    """Queries, keys and values, with gradients."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(layout.tokens, heads, WIDTH, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def attended(sides: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """What `attend` makes of queries, keys and values."""
    query_THd, key_Thd, value_Thd = sides
    return attend(query_THd, key_Thd, value_Thd, layout)


def attend_alone(query_Nhd: Tensor, key_Nhd: Tensor, value_Nhd: Tensor) -> tuple[Tensor, Tensor]:
    """One row by the book: each query with the head of its group, token by token."""
    outs, lses = torch.zeros_like(query_Nhd), torch.zeros_like(query_Nhd[..., 0])
    for token in range(len(query_Nhd)):
        for head in range(HEADS):
            own = head // (HEADS // KEY_HEADS)
            scores = key_Nhd[: token + 1, own] @ query_Nhd[token, head]
            outs[token, head] = scores.softmax(0) @ value_Nhd[: token + 1, own]
            lses[token, head] = scores.logsumexp(0)
    return outs, lses


def attend_by_the_book(sides: Any, layout: Layout) -> Any:
    """Each row behind its own copy of the opening, what comes of that once, 0 in the fill."""
    opening: Any = [side[: layout.opening] for side in sides]
    rows: list[Any] = [attend_alone(*opening)] if layout.opening else []
    for start, length in zip(layout.starts, layout.lengths, strict=True):
        own = [side[start : start + length] for side in sides]
        whole: Any = [torch.cat(pair) for pair in zip(opening, own, strict=True)]
        found = attend_alone(*whole)
        rows.append([column[layout.opening :] for column in found])
    fill = layout.tokens - layout.used
    return tuple(
        torch.cat([*column, column[0].new_zeros(fill, *column[0].shape[1:])])
        for column in zip(*rows, strict=True)
    )


@pytest.mark.parametrize("opening", [0, 4, 11])
def test_rows_attend_to_the_opening_and_to_themselves(opening: int) -> None:
    """Value, log-sum-exp and all gradients; rows shorter and longer than the opening."""
    layout = layout_of(opening=opening)
    ours, wanted = sides_of(layout), sides_of(layout)
    out_THd, lse_TH = attended(ours, layout)
    wanted_THd, wanted_TH = attend_by_the_book(wanted, layout)
    torch.testing.assert_close(out_THd, wanted_THd)
    torch.testing.assert_close(lse_TH, wanted_TH)
    weight_THd = torch.linspace(-1.0, 2.0, out_THd.numel(), dtype=out_THd.dtype).view_as(out_THd)
    # The loss sees nothing of the fill, whatever stands there.
    weight_THd[layout.used :] = 0.0
    (out_THd * weight_THd).sum().backward()
    (wanted_THd * weight_THd).sum().backward()
    for our, side in zip(ours, wanted, strict=True):
        torch.testing.assert_close(our.grad, side.grad)
        assert our.grad is not None
        assert not our.grad[layout.used :].any() and our.grad[: layout.used].any()


def test_bfloat16_is_attended_in_float32() -> None:
    """Rounded once at the end, under autocast too, and never between scores and softmax."""
    layout = layout_of(opening=3)
    narrow = sides_of(layout, dtype=torch.bfloat16)
    wide: Any = [side.detach().float().requires_grad_() for side in narrow]
    wanted_THd, _ = attended(wide, layout)
    with torch.autocast("cpu", torch.bfloat16):
        found_THd, _ = attended(narrow, layout)
    assert found_THd.dtype == torch.float32
    torch.testing.assert_close(found_THd, wanted_THd)
    for out_THd in (found_THd, wanted_THd):
        out_THd[: layout.used].square().sum().backward()
    for ours, side in zip(narrow, wide, strict=True):
        assert ours.grad is not None and side.grad is not None
        torch.testing.assert_close(ours.grad, side.grad.bfloat16())


def test_a_layout_joins_rows_and_finds_their_tokens_again() -> None:
    layout = layout_of((2, 3), opening=2)
    ids_1T = layout.join([(7, 8, 1, 2), (7, 8, 3, 4, 5)])
    assert ids_1T.shape == (1, 32) and ids_1T[0, :7].tolist() == [7, 8, 1, 2, 3, 4, 5]
    places = layout.places(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2]))
    assert ids_1T[0, places].tolist() == [2, 3, 5]
    assert layout.positions()[0, :7].tolist() == [0, 1, 2, 3, 2, 3, 4]


def test_positions_count_what_stands_before_each_row() -> None:
    positions_1T = layout_of((2, 3)).positions([10, 4])
    assert positions_1T[0, :5].tolist() == [10, 11, 4, 5, 6]


def test_there_is_always_a_fill() -> None:
    """Padding of rows has to stand somewhere that no loss sees."""
    layout = layout_of((30, 2))
    assert layout.used == 32 and layout.tokens == 64
