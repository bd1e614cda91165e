"""`opcd.scored`: what servers tell, taken for what it is."""

from typing import Any

import pytest

from opcd.batching import collate
from opcd.scored import read_prompt_logprobs, rows_of
from tiny import VOCABULARY, pair_of, rollout_of

PAIRS = [pair_of(f"t{i}", 5 + i, 20 + 3 * i, i) for i in range(3)]
ROLLOUTS = [rollout_of(f"t{i}", 4 + i, i) for i in range(3)]
BATCH = collate(PAIRS, ROLLOUTS)


def test_rows_are_whole_prompts_with_their_responses() -> None:
    assert [(tuple(row.ids), row.tokens) for row in rows_of(BATCH)] == [
        (pair.teacher_ids + rollout.response_ids, len(rollout.response_ids))
        for pair, rollout in zip(PAIRS, ROLLOUTS, strict=True)
    ]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"5": {"logprob": -1.0}}, "1 tokens instead of 2"),
        ({"5": {"logprob": float("nan")}, "6": {"logprob": -1.0}}, "no log-probability"),
        ({"5": {"logprob": -1.0}, "300": {"logprob": -1.0}}, "none of 300"),
        ({"6": {"logprob": -1.0}, "7": {"logprob": -1.0}}, "5"),
    ],
)
def test_nonsense_is_no_score(entries: Any, message: str) -> None:
    row = rows_of(BATCH)[0]._replace(ids=[4, 5], tokens=1)
    reply = {"choices": [{"prompt_logprobs": [None, entries]}]}
    with pytest.raises((ValueError, LookupError), match=message):
        read_prompt_logprobs(reply, row, 2, VOCABULARY)
