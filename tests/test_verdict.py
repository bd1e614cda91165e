"""`opcd.verdict`: whether a context is worth baking, in words."""

from typing import Any

import pytest

from opcd.verdict import verdict


def number(mean: float) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean, mean], "n": 40}


def gap(
    base: float = 0.1, in_context: float = 0.9, p: float = 0.001, **more: Any
) -> dict[str, Any]:
    metric = {"base": number(base), "in_context": number(in_context), "p": p}
    return {
        "rows": 40,
        "context_type": "system_prompt",
        "context_tokens": 400,
        "selected_by": "correct",
        "metrics": {"correct": metric},
        "kl_nats_per_token": number(0.8),
        "margin_nats": number(1.5),
        "margin_nats_lowest_tenth": 0.4,
        "margin_nats_by_answer": {},
        **more,
    }


def said(text: str, share: float, right_share: float) -> dict[str, Any]:
    return {"text": text, "share": share, "right_share": right_share}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (gap(), "There is something to bake: expect a baked model near 90 %"),
        (gap(0.9, 0.4), "makes this model worse"),
        (gap(0.4, 0.42, 0.8), "no difference that 40 rows can show"),
        (gap(0.4, 0.4, 1.0, kl_nats_per_token=number(0.001)), "there is nothing to bake"),
        (gap(selected_by=None, metrics={}), "There is no grader"),
        (gap(margin_nats=number(0.2)), "The teacher hesitates"),
        (
            gap(margin_nats_by_answer={"yes": 1.9, "no": 0.4, "maybe": 0.7}),
            "no and maybe are 1.10 nats ahead of the next token, together",
        ),
        (gap(context_tokens=20_000), "20,000 tokens are more than a behaviour"),
        (gap(context_type="column"), "Every row brings a context of its own"),
        (gap(commonest=said("refund", 1.0, 0.25)), "100 % of the answers in context are the same"),
        (gap(truncated=0.72), "72 % of the answers in context were cut by rollout.max_new_tokens"),
    ],
)
def test_the_verdict_says_what_to_expect(found: dict[str, Any], words: str) -> None:
    lines = verdict(found)
    assert sum(words in line for line in lines) == 1
    assert "Retrieval" in lines[-1], "when not to bake at all is always said"


def test_a_class_that_the_context_fails_is_named() -> None:
    """A desk that never says yes is right half of the time; what is unsure is not blamed."""
    metrics = {
        name: {"base": number(0.0), "in_context": number(share), "p": 0.01}
        for name, share in (("correct", 0.5), ("correct_yes", 0.06), ("correct_no", 0.94))
    }
    lines = verdict(gap(metrics=metrics))
    assert [line for line in lines if "even in_context" in line] == [lines[1]]
    assert lines[1].startswith("correct_yes is 6 % even in_context")
    metrics["correct_yes"]["in_context"]["ci95"] = [0.01, 0.6]
    assert len(verdict(gap(metrics=metrics))) == 2


def test_a_sure_teacher_with_a_small_context_is_not_warned_of() -> None:
    assert len(verdict(gap())) == 2
    assert len(verdict(gap(margin_nats_by_answer={"yes": 0.9, "no": 0.8}))) == 2
    assert len(verdict(gap(truncated=0.05, commonest=said("refund", 0.5, 0.4)))) == 2
    mostly = gap(commonest=said("no", 0.95, 0.9))
    assert len(verdict(mostly)) == 2, "nearly all rows are of one kind"
