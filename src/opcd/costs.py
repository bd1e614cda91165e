"""What a context costs with every request, and when training it away has paid for itself.

Plain numbers, no tensors. Money and means are fractions until they are written down, so that a
break-even is exact.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, NamedTuple

from opcd.errors import CostsError
from opcd.types import Origin, PromptPair

OPTIONS = {
    "input_per_million_tokens": "--input-price",
    "output_per_million_tokens": "--output-price",
    "cached_per_million_tokens": "--cached-price",
    "training_per_hour": "--training-price",
}
"""Field of `Prices` -> the option that gives it."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prices:
    """What tokens and training cost, all in one currency; `None` where nobody said."""

    input_per_million_tokens: float | None = None
    output_per_million_tokens: float | None = None
    cached_per_million_tokens: float | None = None
    """Of input that the server has read before."""
    training_per_hour: float | None = None

    def __post_init__(self) -> None:
        """Refuse prices with which nothing can be computed.

        Raises:
            CostsError: a price is zero, negative or not finite.
        """
        for field in fields(self):
            price = getattr(self, field.name)
            if price is not None and not (math.isfinite(price) and price > 0):
                raise CostsError(_bad_price(field.name, price))

    @property
    def missing(self) -> list[str]:
        """The options without which there is no break-even."""
        needed = ("input_per_million_tokens", "training_per_hour")
        return [OPTIONS[name] for name in needed if getattr(self, name) is None]


@dataclass(frozen=True, slots=True)
class Request:
    """The mean request under one condition."""

    prompt_tokens: Fraction
    response_tokens: Fraction
    shared_tokens: int = 0
    """Of the prompt, those that the server has read before and keeps for all requests."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a model keeps of each token: full attention in all layers."""

    layers: int
    key_value_heads: int
    head_width: int
    bytes_per_value: int

    @property
    def bytes_per_token(self) -> int:
        """One key and one value for each head of each layer."""
        return 2 * self.layers * self.key_value_heads * self.head_width * self.bytes_per_value


class StepPrompts(NamedTuple):
    """The prompts of one training step, by who answered them."""

    taught: Sequence[PromptPair]
    asked: Sequence[PromptPair]


def read_batch_sizes(text: str) -> tuple[int, ...]:
    """Batch sizes written as `1,4,16`, each once and in order.

    Raises:
        CostsError: one is not a whole number from 1 on.
    """
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not word.isdecimal() or int(word) < 1]
    if wrong:
        raise CostsError(
            f"--batch-sizes {text!r}: {wrong[0]!r} is no batch size, since a batch has at least "
            "one request; write whole numbers from 1 on, such as 1,4,16"
        )
    return tuple(sorted({int(word) for word in words}))


def prompt_figures(pairs: Sequence[PromptPair], shared_tokens: int) -> Row:
    """Mean prompt tokens of a request without and with the context, and the share saved.

    Args:
        pairs: the prompts of the rows.
        shared_tokens: how many tokens all prompts with the context begin with.
    """
    without, with_context = mean_tokens(pairs)
    return {
        "rows": len(pairs),
        "with_context_tokens": float(with_context),
        "without_context_tokens": float(without),
        "context_tokens": float(with_context - without),
        "saved_share": float(1 - without / with_context),
        "shared_tokens": shared_tokens,
    }


def mean_tokens(pairs: Sequence[PromptPair]) -> tuple[Fraction, Fraction]:
    """Mean prompt tokens without and with the context."""
    without = Fraction(sum(len(pair.student_ids) for pair in pairs), len(pairs))
    return without, Fraction(sum(len(pair.teacher_ids) for pair in pairs), len(pairs))


def kv_rows(shape: KvShape, requests: Mapping[str, Request]) -> list[Row]:
    """Bytes of keys and values at a request's end, the prompt's and the answer's.

    What is shared is held once for all requests, and is not counted among a request's own.
    """
    rows: list[Row] = []
    for condition, request in requests.items():
        own = request.prompt_tokens - request.shared_tokens + request.response_tokens
        rows.append(
            {
                "condition": condition,
                "own_tokens_per_request": float(own),
                "bytes_per_request": round(own * shape.bytes_per_token),
                "shared_tokens_per_server": request.shared_tokens,
                "bytes_per_server": request.shared_tokens * shape.bytes_per_token,
                "bytes_per_token": shape.bytes_per_token,
            }
        )
    return rows


def training_rows(
    steps: Sequence[StepPrompts],
    metrics: Sequence[Mapping[str, Any]],
    opening_of: Callable[[tuple[int, ...]], tuple[int, ...]],
    most_tokens: Mapping[Origin, int],
) -> list[Row]:
    """Tokens and seconds of a run's steps: answering, the teacher's pass, the student's.

    Prompts and the tasks' responses are counted. Those to anchors and to tasks with the context
    were not, so they are given as the most they can have been; where student and teacher both
    answered tasks of one step, its response tokens are divided by their numbers of tasks.

    Args:
        steps: the prompts of each step.
        metrics: the rows of `metrics.jsonl`, in the same order.
        opening_of: what the teacher has read of a prompt once for all that begin with it; `()`
            where it read every prompt in full.
        most_tokens: the most that a response to an anchor and to a context_return may have.
    """
    taught = [pair for step in steps for pair in step.taught]
    asked = [pair for step in steps for pair in step.asked]
    total = sum(int(row["response_tokens"]) for row in metrics)
    taught_tokens = round(
        sum(
            int(row["response_tokens"]) * _taught_share(step)
            for step, row in zip(steps, metrics, strict=True)
        )
    )
    seconds = {
        name: math.fsum(float(row[name]) for row in metrics)
        for name in ("rollout_s", "teacher_s", "train_s", "wall_s")
    }
    answers = [
        _pass("answers, by the student", asked, total - taught_tokens, False),
        _pass("answers, by the teacher", taught, taught_tokens, True, opening_of),
    ]
    passes = [
        _pass("teacher scores", [*taught, *asked], total, True, opening_of),
        _pass("student learns", [*taught, *asked], total, False),
    ]
    walls = (None, None, seconds["teacher_s"], seconds["train_s"])
    rows = [_with_wall(row, wall) for row, wall in zip([*answers, *passes], walls, strict=True)]
    rows.insert(2, _with_wall(_sum("answers, both", answers), seconds["rollout_s"]))
    rows.append(_with_wall(_sum("all", [*answers, *passes]), seconds["wall_s"]))
    for row in rows:
        for origin, most in most_tokens.items():
            row[f"{origin}_response_tokens_at_most"] = row.pop(origin) * most
    return rows


def price_of(request: Request, prices: Prices) -> Fraction:
    """What one request costs, in the currency of the prices.

    Shared tokens are paid as cached ones where there is a price for those. Without a price for
    output, answers are left out.
    """
    full = _exact(prices.input_per_million_tokens)
    cached = _exact(prices.cached_per_million_tokens or prices.input_per_million_tokens)
    fresh_tokens = request.prompt_tokens - request.shared_tokens
    answer = request.response_tokens * _exact(prices.output_per_million_tokens)
    return (fresh_tokens * full + request.shared_tokens * cached + answer) / 1_000_000


def break_even(prices: Prices, requests: Mapping[str, Request], wall_s: float) -> list[Row]:
    """After how many requests training has paid for itself, against each other condition.

    Empty where a price is missing that it takes; without a price for cached input, requests that
    share tokens are not compared.

    Args:
        prices: in one currency.
        requests: the mean request of each condition, `baked` among them.
        wall_s: how long training took.
    """
    if prices.missing:
        return []
    cost = Fraction(str(wall_s)) / 3600 * _exact(prices.training_per_hour)
    baked = price_of(requests["baked"], prices)
    rows: list[Row] = []
    for condition, request in requests.items():
        shares = request.shared_tokens > 0
        if condition == "baked" or (shares and prices.cached_per_million_tokens is None):
            continue
        other = price_of(request, prices)
        count = requests_until(cost, other - baked)
        rows.append(
            {
                "against": condition,
                "training_currency": float(cost),
                "request_currency": float(other),
                "baked_request_currency": float(baked),
                "saving_currency_per_request": float(other - baked),
                "requests": count,
                "verdict": _verdict(count, other, baked),
            }
        )
    return rows


def requests_until(cost: Fraction, saving: Fraction) -> int | None:
    """The fewest requests that save a cost together; `None` where no number of them does."""
    return math.ceil(cost / saving) if saving > 0 else None


def _verdict(count: int | None, other: Fraction, baked: Fraction) -> str:
    if count is not None:
        return f"after {count:,} requests"
    if other == baked:
        return f"never: a baked request costs the same, {float(baked):.3g}"
    return f"never: a baked request costs more, {float(baked):.3g} instead of {float(other):.3g}"


def _taught_share(step: StepPrompts) -> Fraction:
    taught, asked = (sum(p.origin == "task" for p in pairs) for pairs in step)
    return Fraction(taught, taught + asked)


def _pass(
    part: str,
    pairs: Sequence[PromptPair],
    response_tokens: int,
    with_context: bool,
    opening_of: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda _: (),
) -> Row:
    count = Counter(pair.origin for pair in pairs)
    # All prompts but those of anchors begin with a context, on the teacher's side.
    uses = Counter(opening_of(pair.teacher_ids) for pair in pairs if pair.origin != "anchor")
    again = sum((times - 1) * len(opening) for opening, times in uses.items())
    tokens = sum(len(p.teacher_ids if with_context else p.student_ids) for p in pairs)
    return {
        "part": part,
        "sequences": len(pairs),
        "prompt_tokens": tokens,
        "prompt_tokens_with_shared_once": tokens - again,
        "task_response_tokens": response_tokens,
        "anchor": count["anchor"],
        "context_return": count["context_return"],
    }


def _sum(part: str, rows: Sequence[Row]) -> Row:
    return {"part": part} | {k: sum(row[k] for row in rows) for k in rows[0] if k != "part"}


def _with_wall(row: Row, wall_s: float | None) -> Row:
    return {**row, "wall_s": wall_s}


def _exact(price: float | None) -> Fraction:
    return Fraction(str(price)) if price is not None else Fraction(0)


def _bad_price(name: str, price: float) -> str:
    reason = "a price is a number above 0"
    if price == 0 and name == "input_per_million_tokens":
        reason = "where input costs nothing, nothing can be saved by leaving the context out"
    elif price == 0 and name == "training_per_hour":
        reason = "training that costs nothing has paid for itself before the first request"
    unit = "hour of the training machine" if name == "training_per_hour" else "million tokens"
    return f"{OPTIONS[name]} {price:g}: {reason}; give the price of a {unit}, or leave it out"
