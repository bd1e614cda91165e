"""What to expect of baking a context, in words, from `gap.json`; no model is needed to say it."""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from opcd.intervals import SIGNIFICANT

NOTHING_NATS_PER_TOKEN = 0.02
"""Below it, the context hardly changes what is answered."""
UNSURE_NATS = 0.5
"""A teacher whose two likeliest tokens are nearer than this, on average, hesitates."""
APART_NATS = 1.5
"""So much, summed over the two least sure answers, is wanted between them: a desk with 1.15 was
baked to 11 points below its context, one with 2.1 was not."""
SELDOM_RIGHT = 0.5
"""A class is said to fail where even the upper end of its interval is below this."""
ALIKE_SHARE = 0.8
"""So many answers in context that are the same say that the model hardly looks at the rows,"""
ALIKE_MORE = 0.2
"""if the commonest right answer is rarer by so much."""
CUT_SHARE = 0.1
"""So many answers in context that the token limit cuts are worth a word."""
SHOWN_WIDTH = 60
"""Characters of an answer that are shown."""
LARGE_CONTEXT_TOKENS = 8_000
"""More than this is a library rather than a behaviour."""


def verdict(gap: Mapping[str, Any]) -> list[str]:
    """What to expect of baking this context, in words."""
    lines = [*_on_gain(gap), *_on_reading(gap), *_on_classes(gap), *_on_sureness(gap)]
    if gap["context_type"] == "column":
        lines.append(
            "Every row brings a context of its own. Lessons and rubrics can be baked in that way; "
            "facts that are looked up for a row cannot: keep those in retrieval."
        )
    if gap["context_tokens"] > LARGE_CONTEXT_TOKENS:
        lines.append(
            f"{gap['context_tokens']:,} tokens are more than a behaviour: weights will keep the "
            "manner and lose facts. Bake the rules, keep the facts in retrieval."
        )
    lines.append(
        "If the context changes every week, do not bake it: each change is a training run. "
        "Retrieval, or a server that caches the prompt, is the better place for it."
    )
    return lines


def _on_gain(gap: Mapping[str, Any]) -> list[str]:
    kl_nats = gap["kl_nats_per_token"]["mean"]
    name = gap["selected_by"]
    found = gap["metrics"].get(name) if name else None
    if found is None:
        return [
            f"There is no grader, so only the distance speaks: the context moves the model by "
            f"{kl_nats:.2f} nats a token"
            + (
                ", which is next to nothing: there is nothing to bake."
                if kl_nats < NOTHING_NATS_PER_TOKEN
                else ". Whether that is for the better has to be judged by a grader or by reading."
            )
        ]
    base, after = found["base"]["mean"], found["in_context"]["mean"]
    points, sure = 100 * (after - base), found["p"] < SIGNIFICANT
    seen = f"{name}: base {100 * base:.1f} %, in_context {100 * after:.1f} % ({points:+.1f} points)"
    if points < 0 and sure:
        return [
            f"{seen}. The context makes this model worse, as happens to small models that read a "
            "larger one's lessons: baking it in would bake in the harm. A larger frozen teacher "
            'that the context helps may still work: teacher = {type = "frozen", path = ...}.'
        ]
    if not sure and kl_nats < NOTHING_NATS_PER_TOKEN:
        return [f"{seen}. The context changes next to nothing: there is nothing to bake."]
    if not sure:
        return [
            f"{seen}, p = {found['p']:.2g}: no difference that {gap['rows']} rows can show. The "
            f"context does change the answers ({kl_nats:.2f} nats a token), so style may be baked "
            "in; do not expect this metric to move."
        ]
    return [
        f"{seen}, p = {found['p']:.2g}. There is something to bake: expect a baked model near "
        f"{100 * after:.0f} %, and seldom above."
    ]


def _on_reading(gap: Mapping[str, Any]) -> list[str]:
    """Whether the answers in context can be those of a model that does the task."""
    lines, found = [], gap.get("commonest")
    if found and found["share"] >= max(ALIKE_SHARE, found["right_share"] + ALIKE_MORE):
        text = shorten(found["text"], SHOWN_WIDTH)
        lines.append(
            f"{100 * found['share']:.0f} % of the answers in context are the same, {text!r}, "
            f"which is right for {100 * found['right_share']:.0f} % of the rows at most: "
            "this model does not follow the context, whatever the gain. Worked examples, fewer "
            "rules or a larger teacher come first."
        )
    if gap.get("truncated", 0.0) > CUT_SHARE:
        lines.append(
            f"{100 * gap['truncated']:.0f} % of the answers in context were cut by "
            "rollout.max_new_tokens, and are graded as they stand: raise it, or say in the context "
            "how short an answer is."
        )
    return lines


def _on_classes(gap: Mapping[str, Any]) -> list[str]:
    """The classes that the context fails, which a share over all rows hides."""
    of_classes = f"{gap['selected_by']}_"
    failed = {
        name: found["in_context"]["mean"]
        for name, found in gap["metrics"].items()
        if name.startswith(of_classes) and found["in_context"]["ci95"][1] < SELDOM_RIGHT
    }
    return [
        f"{name} is {100 * share:.0f} % even in_context: the context does not work for those rows, "
        "and a student learns that too. Mend the context, or take a larger teacher, first."
        for name, share in failed.items()
    ]


def _on_sureness(gap: Mapping[str, Any]) -> list[str]:
    margin, tenth = gap["margin_nats"]["mean"], gap["margin_nats_lowest_tenth"]
    help_ = (
        "A student learns the hesitation too. Other words for the labels, or clearer examples, "
        "often cost nothing and help; or lower loss.temperature."
    )
    least = sorted(gap["margin_nats_by_answer"].items(), key=lambda pair: pair[1])[:2]
    apart = sum(nats for _, nats in least)
    if least and apart < APART_NATS:
        names = " and ".join(answer for answer, _ in least)
        return [
            f"The teacher hardly tells its two least sure answers apart: {names} are {apart:.2f} "
            f"nats ahead of the next token, together. {help_}"
        ]
    if margin >= UNSURE_NATS:
        return []
    return [
        f"The teacher hesitates: where an answer is least sure its likeliest token is only "
        f"{margin:.2f} nats ahead of the next ({tenth:.2f} in the lowest tenth). {help_}"
    ]
