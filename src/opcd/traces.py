"""The trajectory store: what a model was asked and what it did, one object a line.

It is only appended to, and a deployed service may append traces of its own. Of those only
`prompt` and `response` are required. Knows nothing of models.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import TaskError, TraceError
from opcd.runs import mend_jsonl
from opcd.tasks import read_messages
from opcd.types import Message

SHAPE = '{"prompt": [{"role": "user", "content": "..."}], "response": "..."}'
"""The least that a row of the store has to be."""


class Turn(NamedTuple):
    """One prompt and the response to it."""

    prompt: tuple[Message, ...]
    response: str


@dataclass(frozen=True, slots=True)
class Trace:
    """What a model did with one problem."""

    id: str
    prompt: tuple[Message, ...]
    """Of the last turn; that of a game tells all that happened before."""
    response: str
    problem: str = ""
    """The id of the row or the board."""
    turns: tuple[Turn, ...] = ()
    """All of them, where there were several."""
    outcome: float | None = None
    """1 is right or won, 0 is not; `None` where nobody knows."""
    feedback: str = ""
    """What was said about it afterwards."""
    model: str = ""
    round: int | None = None
    seed: int | None = None
    """Which accumulation it belongs to; `None` in rows that others wrote."""
    step: int | None = None
    """Its place in there, from 1 on."""
    cut: bool = False
    """Whether the token limit ended a reply, as far as is known."""


def append_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Add traces to a store, all at once, so that what others append stays whole."""
    mend_jsonl(path)
    lines = [json.dumps(_row_of(trace), ensure_ascii=False, allow_nan=False) for trace in traces]
    with path.open("ab", buffering=0) as stream:
        stream.write("".join(f"{line}\n" for line in lines).encode())


def read_traces(path: Path) -> list[Trace]:
    """All traces of a store; a last line that a crash cut off is left out.

    Raises:
        TraceError: a row is malformed, or two have one id.
    """
    if not path.is_file():
        return []
    traces: dict[str, Trace] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise TraceError(f"{where}: not JSON ({error}); write {SHAPE}") from error
        trace = _trace_of(row, where, number)
        if trace.id in traces:
            raise TraceError(f"{where}: a second trace {trace.id!r}; make ids unique")
        traces[trace.id] = trace
    return list(traces.values())


def trace_text(trace: Trace) -> str:
    """A trace as a model reads it: who said what, the response last."""
    said = (*trace.prompt, Message("assistant", trace.response))
    return "\n\n".join(f"{m.role.capitalize()}:\n{m.content.strip()}" for m in said)


def saved_prefixes(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Every prompt of every turn once, as task rows: one trains on them without an environment.

    Raises:
        TraceError: there is none.
    """
    rows: dict[tuple[Message, ...], dict[str, Any]] = {}
    for trace in traces:
        turns = trace.turns or (Turn(trace.prompt, trace.response),)
        for number, turn in enumerate(turns, start=1):
            name = trace.id if len(turns) == 1 else f"{trace.id}/turn-{number}"
            rows.setdefault(turn.prompt, {"id": name, "prompt": _turns_of(turn.prompt)})
    if not rows:
        raise TraceError(
            'experience.train_on = "store" but the trajectory store holds no trace; run opcd solve '
            f"first, name another experience.store, or put rows in: {SHAPE}"
        )
    return list(rows.values())


def _row_of(trace: Trace) -> dict[str, Any]:
    return {
        "id": trace.id,
        "problem": trace.problem,
        "prompt": _turns_of(trace.prompt),
        "response": trace.response,
        "turns": [{"prompt": _turns_of(t.prompt), "response": t.response} for t in trace.turns],
        "outcome": trace.outcome,
        "feedback": trace.feedback,
        "model": trace.model,
        "round": trace.round,
        "seed": trace.seed,
        "step": trace.step,
        "cut": trace.cut,
    }


def _trace_of(row: Any, where: str, number: int) -> Trace:
    turn = _turn_of(row, where)
    named = row.get("id")
    texts = {name: _typed(row, name, (str,), where) or "" for name in ("feedback", "model")}
    numbers = {name: _typed(row, name, (int,), where) for name in ("round", "seed", "step")}
    outcome = _typed(row, "outcome", (int, float), where)
    if outcome is not None and not math.isfinite(outcome):
        raise TraceError(f"{where}: outcome is {outcome}; write a number, or null if unknown")
    turns = row.get("turns") or ()
    if not isinstance(turns, list | tuple):
        raise TraceError(f"{where}: turns is a {type(turns).__name__}; write a list of {SHAPE}")
    return Trace(
        id=f"line-{number}" if named is None else str(named),
        problem=str(row.get("problem") or ""),
        prompt=turn.prompt,
        response=turn.response,
        turns=tuple(_turn_of(t, f"{where}, turn {n}") for n, t in enumerate(turns, start=1)),
        outcome=None if outcome is None else float(outcome),
        cut=bool(_typed(row, "cut", (bool,), where)),
        **texts,
        **numbers,
    )


def _turn_of(row: Any, where: str) -> Turn:
    if not isinstance(row, Mapping) or not row.get("prompt"):
        raise TraceError(f"{where}: no trace, since there is no prompt; write {SHAPE}")
    if not isinstance(row.get("response"), str):
        raise TraceError(f"{where}: response is no text; write {SHAPE}")
    try:
        return Turn(read_messages(row["prompt"], where), row["response"])
    except TaskError as error:
        raise TraceError(f"{error}; write {SHAPE}") from error


def _typed(row: Mapping[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    value = row.get(name)
    if value is None or isinstance(value, kinds):
        return value
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise TraceError(f"{where}: {name} is {value!r}; write a {wanted}, or leave it out")


def _turns_of(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]
