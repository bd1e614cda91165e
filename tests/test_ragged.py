"""`opcd.ragged`: rows in one sequence attend as rows of their own would."""

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from opcd.ragged import Layout, attend, find_distinct, lay_out

HEADS, KEY_HEADS, WIDTH = 6, 2, 4
CPU = torch.device("cpu")
ROWS = {
    "nothing shared": [(1, 2, 3, 4, 5), (6,), (7, 2, 3, 4, 5, 6, 7, 8, 9), (8, 2, 3)],
    "an opening": [(1, 2, 3, 4), (1, 2, 5), (1, 2, 6, 4, 7, 8)],
    "a longer opening than what follows": [(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 7)],
    "turns of a game, and another": [(1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7), (1, 9, 3, 4)],
    "the longest first, one twice": [(1, 2, 3, 4, 5), (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 6)],
    "one row": [(4, 4, 4)],
}


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
    """One row by the book: each query with the keys of its group, token by token."""
    outs, lses = [], []
    for token in range(len(query_Nhd)):
        for head in range(HEADS):
            own = head // (HEADS // KEY_HEADS)
            scores = key_Nhd[: token + 1, own] @ query_Nhd[token, head]
            outs.append(scores.softmax(0) @ value_Nhd[: token + 1, own])
            lses.append(scores.logsumexp(0))
    return torch.stack(outs).view(-1, HEADS, WIDTH), torch.stack(lses).view(-1, HEADS)


def places_of(layout: Layout, row: int, length: int) -> Tensor:
    """Where a row's tokens stand."""
    return layout.places(torch.full((length,), row), torch.arange(length))


@pytest.mark.parametrize("name", list(ROWS))
def test_each_row_attends_to_itself(name: str) -> None:
    """Value, log-sum-exp, and the gradients of all rows' losses in one shared sequence."""
    rows = ROWS[name]
    layout = lay_out(rows, CPU)
    ours, wanted = sides_of(layout), sides_of(layout)
    out_THd, lse_TH = attended(ours, layout)
    losses: list[Tensor] = []
    for row, ids in enumerate(rows):
        place_N = places_of(layout, row, len(ids))
        query_Nhd, key_Nhd, value_Nhd = (side[place_N] for side in wanted)
        found_NHd, found_NH = attend_alone(query_Nhd, key_Nhd, value_Nhd)
        torch.testing.assert_close(out_THd[place_N], found_NHd)
        torch.testing.assert_close(lse_TH[place_N], found_NH)
        weight_NHd = torch.randn(found_NHd.shape, dtype=torch.float64)
        losses += [(out_THd[place_N] * weight_NHd).sum(), (found_NHd * weight_NHd).sum()]
    sum(losses[::2]).backward()  # pyright: ignore[reportAttributeAccessIssue]
    sum(losses[1::2]).backward()  # pyright: ignore[reportAttributeAccessIssue]
    used = len(layout.side_N)
    assert not out_THd[used:].any()
    for our, side in zip(ours, wanted, strict=True):
        torch.testing.assert_close(our.grad, side.grad)
        assert our.grad[:used].any() and not our.grad[used:].any()


def test_bfloat16_is_attended_in_float32() -> None:
    """Rounded once at the end, under autocast too, and never between scores and softmax."""
    layout = lay_out(ROWS["an opening"], CPU)
    narrow = sides_of(layout, dtype=torch.bfloat16)
    wide: Any = [side.detach().float().requires_grad_() for side in narrow]
    wanted_THd, _ = attended(wide, layout)
    with torch.autocast("cpu", torch.bfloat16):
        found_THd, _ = attended(narrow, layout)
    assert found_THd.dtype == torch.float32
    torch.testing.assert_close(found_THd, wanted_THd)
    for out_THd in (found_THd, wanted_THd):
        out_THd[: len(layout.side_N)].square().sum().backward()
    for ours, side in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.grad, side.grad.bfloat16())


@pytest.mark.parametrize("name", list(ROWS))
def test_a_layout_holds_each_distinct_token_once(name: str) -> None:
    """Its ids and positions are those of the rows, wherever a token stands first."""
    rows = ROWS[name]
    layout = lay_out(rows, CPU)
    assert len(layout.side_N) == len({row[: end + 1] for row in rows for end in range(len(row))})
    before = list(range(10, 10 + len(rows)))
    for row, ids in enumerate(rows):
        place_N = places_of(layout, row, len(ids))
        assert tuple(layout.ids_1T[0, place_N].tolist()) == ids
        assert layout.positions()[0, place_N].tolist() == list(range(len(ids)))
    if name == "nothing shared":
        for row, first in enumerate(before):
            (place,) = places_of(layout, row, 1).tolist()
            assert layout.positions(before)[0, place] == first


def test_rows_of_different_groups_share_nothing() -> None:
    """What stands before them is not the same, so neither are their states."""
    rows = [(1, 2, 3), (1, 2, 4), (1, 2, 3)]
    assert len(lay_out(rows, CPU, [0, 0, 1]).side_N) == 4 + 3
    assert len(lay_out(rows, CPU, [0, 0, 0]).side_N) == 4


def test_all_of_one_group_stand_behind_the_same_number_of_tokens() -> None:
    """The opening's row, too."""
    layout = lay_out([(1, 2, 3), (1, 4)], CPU, [7, 7])
    assert layout.opening == 1
    assert layout.positions([5, 5])[0, : len(layout.side_N)].tolist() == [5, 6, 7, 6]


def test_there_is_always_a_fill() -> None:
    """Padding of rows has to stand somewhere that no loss sees."""
    assert lay_out([tuple(range(32))], CPU).tokens == 64
    assert lay_out([tuple(range(31))], CPU).tokens == 32


def test_tokens_are_the_same_behind_the_same() -> None:
    """Against comparing all that stands in front of every two."""
    rows, groups = [(1, 2, 3), (1, 2), (2, 2, 3), (1, 2, 3, 3), (1, 2)], [0, 0, 0, 0, 1]
    places, firsts = find_distinct(rows, groups)
    heads = [
        [(group, ids[: column + 1]) for column in range(len(ids))]
        for ids, group in zip(rows, groups, strict=True)
    ]
    flat_heads, flat_places = list(chain(*heads)), list(chain(*places))
    for head, place in zip(flat_heads, flat_places, strict=True):
        same = [other == head for other in flat_heads]
        assert same == [other == place for other in flat_places]
    assert [heads[row][column] for row, column in firsts] == list(dict.fromkeys(flat_heads))
