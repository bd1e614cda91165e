"""What a server tells of a response's tokens: read, checked, put together."""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from numpy.lib.format import read_array

from opcd.batching import Batch
from opcd.divergence import ABSENT, Listed
from opcd.servers import check_log_probs


class Scored(NamedTuple):
    """One response's tokens, as a server scores them."""

    ids: list[list[int]]
    log_probs: list[list[float]]
    sampled: list[float]


class Row(NamedTuple):
    """A prompt with its response: the last `tokens` of `ids`."""

    ids: list[int]
    tokens: int


def rows_of(batch: Batch) -> list[Row]:
    """Each teacher prompt of a batch with its response."""
    side, rows = batch.teacher, []
    counts = torch.bincount(side.row_T, minlength=batch.sequences).tolist()
    ends = torch.tensor(counts).cumsum(0).sub(1).tolist()
    for row, (count, end) in enumerate(zip(counts, ends, strict=True)):
        last = int(side.column_T[end])
        # The last response token predicts nothing here, and so is not on the side.
        read = side.ids_BS[row, : last + 1].tolist()
        rows.append(Row([*read, int(batch.response_T[end])], count))
    return rows


def read_prompt_logprobs(reply: Any, row: Row, k: int, vocabulary: int) -> Scored:
    """The response tokens' part of vLLM's `prompt_logprobs`.

    Raises:
        ValueError: it does not belong to this row, or means nothing.
    """
    told = reply["choices"][0]["prompt_logprobs"]
    if len(told) != len(row.ids):
        raise ValueError(f"{len(told)} positions instead of {len(row.ids)}")
    found = Scored([], [], [])
    for token, entries in zip(row.ids[-row.tokens :], told[-row.tokens :], strict=True):
        known = {int(i): float(entry["logprob"]) for i, entry in entries.items()}
        check_log_probs(known.values())
        if not all(0 <= i < vocabulary for i in known):
            raise ValueError(f"an id that is none of {vocabulary}")
        if len(known) < k:
            raise ValueError(f"{len(known)} tokens instead of {k}")
        found.sampled.append(known[token])
        first = sorted(known, key=lambda i: -known[i])[:k] if k else [token]
        found.ids.append(first)
        found.log_probs.append([known[i] for i in first])
    return found


def read_scores(encoded: str, rows: int, columns: int) -> list[list[float]]:
    """A table of scores, as vLLM sends it: an array file in base 64.

    Raises:
        ValueError: it has another shape, or holds what is no log-probability.
    """
    table = read_array(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    if table.shape != (rows, columns):
        raise ValueError(f"a table of {table.shape} instead of {(rows, columns)}")
    # A log-probability of -inf is one that rounds to nothing.
    found = numpy.maximum(table.astype(float), ABSENT).tolist()
    for line in found:
        check_log_probs(line)
    return found


def join(found: Sequence[Scored]) -> Listed:
    """Rows of several responses as tensors."""
    ids = [line for one in found for line in one.ids]
    log_probs = [line for one in found for line in one.log_probs]
    sampled = [value for one in found for value in one.sampled]
    return Listed(torch.tensor(ids), torch.tensor(log_probs), torch.tensor(sampled))
