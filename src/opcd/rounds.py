"""Learning from experience, round after round: each begins with the model that the last one baked.

A round gathers (solve, extract, accumulate), selects and consolidates. Every stage goes on where it
was and leaves alone what is done, so that the same command, interrupted anywhere, gives the same
result.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from opcd.comparing import tests_of
from opcd.config import Run, derive
from opcd.consolidation import consolidate
from opcd.errors import NothingLearnedError, RunFolderError
from opcd.exporting import export_run
from opcd.gathering import (
    Gathering,
    accumulate,
    check_experience,
    extract,
    gather_traces,
    open_round,
    skipped_notes,
)
from opcd.learning_tables import gathered_words
from opcd.runs import RoundFolder, RunFolder, make_folder, read_jsonl, round_folder, write_json
from opcd.selection import Selection, select
from opcd.traces import Trace, read_traces

Say = Callable[[str], object]


def learn(run: Run, rounds: int, say: Say) -> dict[str, Any]:
    """Run what is missing of so many rounds; write and return `experience.json`.

    Where no experience helps, the rounds end there: the model would be the same in the next one.

    Raises:
        InputError: the input, or a folder, does not fit; what is there is kept.
        RunError: a stage failed; the same command goes on from there.
    """
    check_experience(run)
    folder = make_folder(run)
    done: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}")
        done.append(_learn_round(run, number, say))
        found = {"name": run.name, "rounds": done, "paired": paired_rounds(run, done)}
        write_json(folder.experience, found)
        if not done[-1]["conditions"]:
            break
    return found


def begin_round(run: Run, number: int, say: Say) -> Gathering:
    """A round of a run, with the model that it begins with.

    Raises:
        InputError: the run has no `[experience]` table, or something in it is wrong.
        RunFolderError: the round before it was not consolidated.
    """
    check_experience(run)
    round_ = open_round(run_of_round(run, number, say), number, say)
    if told := starts_again(run, number, len(round_.parts.items.get("extraction", []))):
        say(told)
    return round_


def traces_of(run: Run, round_: Gathering) -> list[list[Trace]]:
    """What each accumulation of a round learns from: its own traces, and what others appended."""
    others = others_of(run, round_) if "extraction" in round_.parts.items else []
    return [[*own, *others] for own in gather_traces(round_)]


def gather_round(run: Run, number: int, say: Say) -> Gathering:
    """A round with what it learns from gathered, as far as that is missing.

    Raises:
        RunFolderError: the round before it was not consolidated.
    """
    round_ = begin_round(run, number, say)
    traces = traces_of(run, round_)
    answers = extract(round_, traces)
    found = accumulate(round_, traces, answers)
    words = gathered_words(traces, answers, found)
    for note in (*words, *round_.notes, *skipped_notes(answers)):
        say(note)
    return round_


def others_of(run: Run, round_: Gathering) -> list[Trace]:
    """What a service has appended to the store since the rounds before: learned from as well.

    Which these are is settled when a round first looks, so that it gives the same result whenever
    it is taken up again; what comes later is for the next one.
    """
    earlier = [round_folder(run, number) for number in range(1, round_.number)]
    if not earlier:
        return []
    stores = sorted({round_.experience.store or folder.traces for folder in earlier})
    # Rows without an id are named by their line, which two stores may both have.
    named = [(f"{store.parent.name}/{t.id}", t) for store in stores for t in read_traces(store)]
    found = {id_: replace(t, id=id_) for id_, t in named if t.seed is None}
    if not round_.folder.others.is_file():
        taken = {id_ for folder in earlier for id_ in _ids_in(folder)}
        write_json(round_.folder.others, [id_ for id_ in found if id_ not in taken])
    return [found[id_] for id_ in _ids_in(round_.folder) if id_ in found]


def select_round(run: Run, number: int, say: Say) -> Selection:
    """Gather what is missing of a round, and choose.

    Raises:
        ConfigError: there is nothing to choose by.
    """
    round_ = gather_round(run, number, say)
    return select(round_.parts, round_.folder, say)


def consolidate_round(run: Run, number: int, say: Say) -> dict[str, Any]:
    """Gather and choose what is missing of a round, train, and measure it.

    Raises:
        NothingLearnedError: no experience helps.
    """
    selected: dict[str, Any] = {}
    folder = round_folder(run, number)
    if check_experience(run).use == "selected":
        selected = dict(select_round(run, number, say).table)
        del selected["candidates"], selected["rows"]
        say(f"{folder.growth}: the score by the number of items")
        if folder.selected.is_file():
            say(f"chosen: {selected['verdict']}")
    else:
        gather_round(run, number, say)
    found = consolidate(run_of_round(run, number, say), number, folder, say)
    return {**found, "selected": selected}


def run_of_round(run: Run, number: int, say: Say) -> Run:
    """The run with the model that a round begins with: from the second on, the one baked before.

    Raises:
        RunFolderError: the round before was not consolidated.
    """
    if number == 1:
        return run
    baked, target = RunFolder(run.out / f"{run.name}-round-{number - 1}"), round_folder(run, number)
    if not target.model.is_dir():
        if not baked.best.is_dir():
            raise RunFolderError(
                f"round {number} begins with the model of {baked.path}, which has no best/ yet; "
                f"finish round {number - 1} first, with opcd experience"
            )
        agreed = export_run(baked.path, target.model)
        say(f"{target.model}: the model of round {number - 1}, {agreed} of its answers compared")
    return derive(run, model={"path": str(target.model.resolve()), "revision": None})


def starts_again(run: Run, number: int, problems: int) -> str:
    """Words on problems that come a second time in a round, if any do."""
    assert run.experience, "a run that learns"
    steps = run.experience.steps
    if not problems or number * steps <= problems:
        return ""
    return (
        f"round {number} needs problems {(number - 1) * steps + 1} to {number * steps} of each "
        f"seed's order, but there are {problems}: they start again"
    )


def paired_rounds(run: Run, done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """McNemar's exact test of each round's baked model against the first base and the last one.

    On the test rows that all rounds have.
    """
    marks: dict[str, dict[str, float]] = {}
    for one in done:
        if not one["conditions"]:
            continue
        rows = list(read_jsonl(RunFolder(run.out / one["runs"]["baked"]).answers))
        if rows and "correct" in rows[0]["baked"]:
            marks.setdefault("base", {row["id"]: row["base"]["correct"] for row in rows})
            marks[f"round {one['round']}"] = {row["id"]: row["baked"]["correct"] for row in rows}
    if not marks:
        return []
    # A longer experience may have crowded out a row that is too long beside it.
    known = set[str].intersection(*(set(found) for found in marks.values()))
    ids = [id_ for id_ in marks["base"] if id_ in known]
    names = list(marks)
    pairs = [(name, "base") for name in names[1:]]
    pairs += list(zip(names[2:], names[1:], strict=False))
    if not ids:
        return []
    return tests_of({name: [found[id_] for id_ in ids] for name, found in marks.items()}, pairs)


def _ids_in(folder: RoundFolder) -> list[str]:
    file = folder.others
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def _learn_round(run: Run, number: int, say: Say) -> dict[str, Any]:
    """A consolidated round, or one in which nothing was learned, with the words for that."""
    try:
        return consolidate_round(run, number, say)
    except NothingLearnedError as error:
        return {"round": number, "conditions": {}, "paired": [], "verdict": str(error)}
