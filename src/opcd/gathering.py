"""The stages of a round with their files: solve, extract, accumulate.

Each runs what is missing before it and nothing that is there already, so that an interrupted one
goes on where it was. Answers of the extractor are appended as they come; items and experiences are
computed from them, and so come out the same however often one was interrupted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from opcd.assembly import Parts, assemble
from opcd.config import Run, flat_differences
from opcd.config.experience import Experience
from opcd.config.extractors import Endpoint
from opcd.endpoint import read_key
from opcd.errors import ConfigError, RunFolderError, TraceError
from opcd.experience import Accumulation, Limits, raw_text
from opcd.extraction import (
    Extractor,
    build_extractor,
    instructions_of,
    items_of,
    request_for,
    settings_of,
)
from opcd.runs import (
    RoundFolder,
    append_jsonl,
    mend_jsonl,
    read_jsonl,
    round_folder,
    write_json,
    write_text,
)
from opcd.solving import solve
from opcd.traces import Trace, read_traces


@dataclass(frozen=True, slots=True)
class Answer:
    """What the extractor wrote of one trace; a row of `answers.jsonl`."""

    step: int
    trace: str
    model: str
    text: str
    finished: bool = True
    skipped: str = ""
    """Why it was not asked: its prompt did not fit."""

    @property
    def items(self) -> list[str]:
        """The items in it."""
        return items_of(self.text, self.finished)[0]

    @property
    def malformed(self) -> int:
        """How many of its pieces are none."""
        return items_of(self.text, self.finished)[1]


@dataclass
class Gathering:
    """One round of a run: what it learns from, and where that is kept."""

    parts: Parts
    folder: RoundFolder
    number: int = 1
    """The round."""
    say: Callable[[str], object] = field(default=lambda _: None)
    notes: list[str] = field(default_factory=list)
    """What was left out, for people."""

    @property
    def experience(self) -> Experience:
        """The run's `[experience]` table."""
        assert self.parts.config.experience, "see check_experience"
        return self.parts.config.experience

    @property
    def store(self) -> Path:
        """The trajectory store."""
        return self.experience.store or self.folder.traces

    @cached_property
    def extractor(self) -> Extractor:
        """Whoever writes the items; loaded when there is something to write."""
        return build_extractor(self.parts, self.experience)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text in the run's own tokenizer."""
        return len(self.parts.renderer.encode(text))


def open_round(
    run: Run, number: int = 1, say: Callable[[str], object] = lambda _: None
) -> Gathering:
    """A round of a run, with everything loaded.

    Raises:
        InputError: the run has no `[experience]` table, or something in it is wrong.
    """
    check_experience(run)
    round_ = Gathering(assemble(run), round_folder(run, number), number, say)
    for note in round_.parts.notes:
        say(note)
    return round_


def check_experience(run: Run) -> Experience:
    """What can be said before a model is loaded.

    Raises:
        ConfigError: the run has no `[experience]` table, or an endpoint's key is not set.
        AuthoringError: the extractor's instructions are malformed.
    """
    if run.experience is None:
        raise ConfigError(
            "the run has no [experience] table, so nothing is to be gathered; write one, with "
            'problems = "problems.jsonl"'
        )
    instructions_of(run.experience)
    if isinstance(run.experience.extractor, Endpoint):
        read_key(run.experience.extractor)
    return run.experience


def gather_traces(round_: Gathering) -> list[list[Trace]]:
    """The traces of each accumulation: solved, or dealt out from a store that others filled.

    Raises:
        TraceError: there are none.
        RunFolderError: those that are there were made with other settings.
    """
    experience, number = round_.experience, round_.number
    stored = read_traces(round_.store)
    if "extraction" not in round_.parts.items:
        return deal(round_, [t for t in stored if t.round in (None, number)])
    own = [t for t in stored if t.id.startswith(f"round-{number}/")]
    _check_settings(round_, "solving", _solving_settings(round_), bool(own))
    others = sum(t.seed is None for t in stored)
    if others and number == 1:
        round_.notes.append(
            f"{others} traces of others in {round_.store.name} are not read before the second "
            "round, since the run has problems of its own; leave experience.problems out to learn "
            "from those alone"
        )
    return solve(round_.parts, experience, round_.store, number, round_.say)


def deal(round_: Gathering, stored: Sequence[Trace]) -> list[list[Trace]]:
    """Traces of a store, in an order of its own for each accumulation.

    Those that an accumulation has learned from already stay where they are, so that a store may
    grow in between.
    """
    if not stored:
        raise TraceError(
            f"experience.store = {str(round_.store)!r} holds no trace of round {round_.number}; "
            "let the service append some, or give the run problems of its own"
        )
    by_id = {trace.id: trace for trace in stored}
    steps = min(round_.experience.steps, len(stored))
    if steps < round_.experience.steps:
        round_.notes.append(
            f"the store holds {steps} traces, so accumulations stop there instead of at "
            f"experience.steps = {round_.experience.steps}"
        )
    dealt: list[list[Trace]] = []
    for seed in range(round_.experience.seeds):
        used = [answer.trace for answer in read_answers(round_, seed)]
        rest = sorted(by_id.keys() - set(used), key=lambda id_: _hash(f"{seed}/{id_}"))
        dealt.append([by_id[id_] for id_ in [*used, *rest][:steps] if id_ in by_id])
    return dealt


def extract(round_: Gathering, traces: Sequence[Sequence[Trace]]) -> list[list[Answer]]:
    """What the extractor writes of every trace, in the order of each accumulation.

    Without the items so far in its view, all are asked side by side; with them, one step of all
    accumulations after another.
    """
    experience = round_.experience
    seeds = range(experience.seeds)
    has_answers = any(round_.folder.answers(seed).is_file() for seed in seeds)
    settings = settings_of(round_.parts.config, experience)
    _check_settings(round_, "extracting", settings, has_answers)
    known = [read_answers(round_, seed)[: len(traces[seed])] for seed in seeds]
    for seed, answers in enumerate(known):
        _check_order(round_, seed, traces[seed], answers)
    longest = max(map(len, traces))
    if not experience.with_previous:
        _ask(round_, traces, known, longest)
    for step in range(1, longest + 1):
        _ask(round_, traces, known, step)
    return known


def _check_order(
    round_: Gathering, seed: int, traces: Sequence[Trace], answers: Sequence[Answer]
) -> None:
    """Refuse answers that are not of the traces in their places.

    Raises:
        RunFolderError: a trace has gone, or others have come before it.
    """
    for trace, answer in zip(traces, answers, strict=False):
        if trace.id != answer.trace:
            raise RunFolderError(
                f"{round_.folder.answers(seed)}: step {answer.step} was extracted from "
                f"{answer.trace!r}, but now {trace.id!r} stands there, since the traces or "
                "experience.steps changed; put them back, or delete the file to extract anew"
            )


def _ask(
    round_: Gathering,
    traces: Sequence[Sequence[Trace]],
    known: Sequence[list[Answer]],
    until: int,
) -> None:
    """Have the missing answers up to a step written, saved and added to the known ones."""
    missing = [
        (seed, step)
        for step in range(1, until + 1)
        for seed, done in enumerate(known)
        if len(done) < step <= len(traces[seed])
    ]
    instructions = instructions_of(round_.experience)
    shown = [""] * len(known)
    if missing and round_.experience.with_previous:
        shown = [grow(round_, traces[s], done).text for s, done in enumerate(known)]
    rows = round_.parts.config.rollout.batch_rows
    for start in range(0, len(missing), rows):
        chunk = missing[start : start + rows]
        requests = [
            request_for(
                instructions,
                traces[seed][step - 1],
                f"round-{round_.number}/seed-{seed}/step-{step}/items",
                step,
                shown[seed],
            )
            for seed, step in chunk
        ]
        for (seed, step), written in zip(chunk, round_.extractor.write(requests), strict=True):
            trace = traces[seed][step - 1].id
            model = round_.extractor.name
            known[seed].append(
                Answer(step, trace, model, written.text, written.finished, written.skipped)
            )
            _append_answer(round_, seed, known[seed][-1])
        round_.say(f"extracted from {start + len(chunk)} of {len(missing)} traces")


def accumulate(
    round_: Gathering, traces: Sequence[Sequence[Trace]], answers: Sequence[Sequence[Answer]]
) -> list[Accumulation]:
    """Every experience after every trace, written with the fate of all items."""
    found = [grow(round_, *both) for both in zip(traces, answers, strict=True)]
    for seed, grown in enumerate(found):
        for stale in round_.folder.experiences(seed)[len(grown.texts) :]:
            stale.unlink()
        for number, text in enumerate(grown.texts):
            write_text(round_.folder.experience(seed, number), text)
        rows = [json.dumps(row, ensure_ascii=False) for row in grown.rows()]
        write_text(round_.folder.items(seed), "".join(f"{row}\n" for row in rows))
        write_raw(round_, seed, traces[seed])
    for folder in round_.folder.path.glob("seed-*"):
        if (seed := int(folder.name.removeprefix("seed-"))) >= len(found):
            # Of a run with more seeds: they would be taken for candidates.
            for stale in round_.folder.experiences(seed):
                stale.unlink()
    return found


def write_raw(round_: Gathering, seed: int, traces: Sequence[Trace]) -> None:
    """The traces of an accumulation as a context, within the budget of its experience."""
    raw = raw_text(traces, round_.experience.max_tokens, round_.count_tokens)
    write_text(round_.folder.raw(seed), raw)
    if not raw:
        round_.notes.append(
            f"no trace of seed {seed} fits into experience.max_tokens = "
            f"{round_.experience.max_tokens}, so its raw.md is empty"
        )


def grow(round_: Gathering, traces: Sequence[Trace], answers: Sequence[Answer]) -> Accumulation:
    """The experience that answers make, as far as there are any."""
    found = round_.experience
    shown = [item for text in instructions_of(found).demonstrations for item in items_of(text)[0]]
    limits = Limits(found.max_tokens, found.keep, found.near_duplicate)
    grown = Accumulation(limits, round_.count_tokens, shown)
    for trace, answer in zip(traces, answers, strict=False):
        grown.add(trace, answer.items, answer.model)
    return grown


def gather(round_: Gathering) -> list[Accumulation]:
    """All three stages, each as far as it is missing."""
    traces = gather_traces(round_)
    return accumulate(round_, traces, extract(round_, traces))


def read_answers(round_: Gathering, seed: int) -> list[Answer]:
    """The answers of one accumulation that are there, in the order of its steps."""
    return [Answer(**row) for row in read_jsonl(round_.folder.answers(seed))]


def skipped_notes(answers: Sequence[Sequence[Answer]]) -> list[str]:
    """What was too long to be asked, once for each reason."""
    found = Counter(a.skipped for own in answers for a in own if a.skipped)
    return [f"{count} traces were not read: {why}" for why, count in found.most_common(3)]


def _append_answer(round_: Gathering, seed: int, answer: Answer) -> None:
    path = round_.folder.answers(seed)
    path.parent.mkdir(exist_ok=True)
    mend_jsonl(path)
    append_jsonl(path, [{name: getattr(answer, name) for name in Answer.__slots__}])


def _solving_settings(round_: Gathering) -> dict[str, Any]:
    tree = round_.parts.config.model_dump(mode="json")
    told = {name: tree["experience"][name] for name in ("problems", "feedback")}
    rollout = {name: tree["rollout"][name] for name in ("max_new_tokens", "temperature", "top_p")}
    model = {name: tree["model"][name] for name in ("path", "revision")}
    others = {name: tree[name] for name in ("seed", "game", "grader", "rendering")}
    return {"model": model, "rollout": rollout, "experience": told, **others}


def _check_settings(
    round_: Gathering, stage: str, settings: dict[str, Any], has_results: bool
) -> None:
    """Remember what results depend on; refuse to mix those of different settings.

    Raises:
        RunFolderError: there are results of other settings.
    """
    file = round_.folder.settings
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    now = json.loads(json.dumps(settings))
    if has_results and stage in known and known[stage] != now:
        changed = "; ".join(flat_differences(known[stage], now))[:400]
        raise RunFolderError(
            f"{round_.folder.path} holds results of {stage} with other settings ({changed}), and "
            "the two are not mixed; give name=... another value, or delete that folder"
        )
    if known.get(stage) != now:
        write_json(file, {**known, stage: now})


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
