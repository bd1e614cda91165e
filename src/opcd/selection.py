"""Which experience is baked in: the shortest of those that are not seen to be worse than the best.

The highest mean on validation rows need not win: among the candidates within one standard error of
it, the one with the fewest tokens does, so that nothing is carried along that shows no gain. "No
items" may be that one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from opcd.assembly import Parts
from opcd.candidates import (
    Say,
    Scored,
    digest,
    experience_of,
    find_candidates,
    score_candidates,
    scored_rows,
    standard_error,
)
from opcd.growth import write_growth
from opcd.runs import RoundFolder, write_json, write_text


class Choice(NamedTuple):
    """What was chosen, and why."""

    chosen: Scored
    highest: Scored
    standard_error: float
    """Of the highest mean."""


class Selection(NamedTuple):
    """A round's choice, and what it was made from."""

    table: dict[str, Any]
    """The contents of `selection.json`."""
    scored: list[Scored]
    choice: Choice


def choose(scored: Sequence[Scored]) -> Choice:
    """The shortest candidate that is within one standard error of the highest mean.

    Of equally short ones the better, then the earlier.
    """
    highest = max(scored, key=lambda s: (s.mean, -s.candidate.tokens))
    error = standard_error(highest.marks)
    near = [s for s in scored if s.mean >= highest.mean - error]
    chosen = min(
        near, key=lambda s: (s.candidate.tokens, -s.mean, s.candidate.step, s.candidate.seed)
    )
    return Choice(chosen, highest, error)


def select(parts: Parts, folder: RoundFolder, say: Say) -> Selection:
    """Score what is not scored yet, choose, and write it down: table, figure, `selected.md`.

    Raises:
        ConfigError: there is nothing to score by.
        RunFolderError: there are no experiences.
    """
    count = lambda text: len(parts.renderer.encode(text))  # noqa: E731
    candidates = find_candidates(folder, experience_of(parts).score_every, count)
    scored = score_candidates(parts, candidates, folder.scores, say)
    choice = choose(scored)
    table = describe(parts, scored, choice)
    chosen = choice.chosen.candidate
    if chosen.text:
        write_text(folder.selected, (folder.path / chosen.name).read_text(encoding="utf-8"))
    else:
        folder.selected.unlink(missing_ok=True)
    write_growth(folder.growth, scored, choice.chosen, table["metric"])
    # The table last: whoever sees it can rely on the rest.
    write_json(folder.selection, table)
    return Selection(table, scored, choice)


def describe(parts: Parts, scored: Sequence[Scored], choice: Choice) -> dict[str, Any]:
    """The contents of `selection.json`."""
    chosen = choice.chosen.candidate
    return {
        "split": "validation",
        "metric": parts.config.evaluation.select_by,
        "rows": [item.task.id for item in scored_rows(parts)],
        "chosen": choice.chosen.as_json(),
        "chosen_text": digest(chosen.text),
        "highest": choice.highest.as_json(),
        "standard_error": choice.standard_error,
        "verdict": verdict(choice),
        "candidates": [one.as_json() for one in scored],
    }


def verdict(choice: Choice) -> str:
    """What was chosen, in a sentence."""
    chosen, highest = choice.chosen, choice.highest
    best = f"{highest.mean:.3f} +- {choice.standard_error:.3f} (one standard error)"
    if not chosen.candidate.text:
        return (
            f"no items: {chosen.mean:.3f} without any experience, and the highest score is {best}, "
            "so nothing that was learned is seen to help"
        )
    items = f"{chosen.candidate.items} item{'s' * (chosen.candidate.items != 1)}"
    what = f"{chosen.candidate.name}: {items}, {chosen.candidate.tokens}"
    if chosen == highest:
        return f"{what} tokens, score {chosen.mean:.3f}, the highest"
    return f"{what} tokens, score {chosen.mean:.3f}; the highest is {best}, and has more tokens"
