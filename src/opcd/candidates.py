"""Every intermediate experience as a candidate, with its score on validation rows.

The score of `experience-N.md` is that of `experience-N.md`, the one after N traces: a candidate and
its score never part. The one without items and the last one of each seed are always among them.
Test rows are never looked at.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd.assembly import Parts
from opcd.config.experience import Experience
from opcd.contexts import lessons_context
from opcd.errors import ConfigError, RunFolderError
from opcd.experience import items_in
from opcd.intervals import Estimate, estimate
from opcd.items import Item, with_context
from opcd.responses import respond
from opcd.runs import RoundFolder, append_jsonl, mend_jsonl, read_jsonl

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An experience as it was after some traces."""

    seed: int
    step: int
    """Traces it was made of."""
    text: str
    items: int
    tokens: int

    @property
    def name(self) -> str:
        """Its file, in the folder of its round."""
        return f"seed-{self.seed}/experience-{self.step:03d}.md"


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its score on each validation row."""

    candidate: Candidate
    marks: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Its score."""
        return statistics.fmean(self.marks)

    @property
    def interval(self) -> Estimate:
        """Its score with a 95 % interval."""
        return estimate(self.marks)

    def as_json(self) -> dict[str, Any]:
        """One row of `selection.json`."""
        one = self.candidate
        return {
            "file": one.name,
            "seed": one.seed,
            "step": one.step,
            "items": one.items,
            "tokens": one.tokens,
            "score": self.interval.as_json(),
        }


def find_candidates(
    folder: RoundFolder, score_every: int, count_tokens: Callable[[str], int]
) -> list[Candidate]:
    """The experiences of a round's seeds: none, the last, and every so many in between.

    Raises:
        RunFolderError: there are none.
    """
    found: list[Candidate] = []
    seeds = sorted(int(path.name.removeprefix("seed-")) for path in folder.path.glob("seed-*"))
    for seed in seeds:
        files = folder.experiences(seed)
        for step, file in enumerate(files):
            if step % score_every == 0 or step == len(files) - 1:
                text = file.read_text(encoding="utf-8").strip()
                tokens = count_tokens(text) if text else 0
                found.append(Candidate(seed, step, text, len(items_in(text)), tokens))
    if not found:
        raise RunFolderError(
            f"{folder.path} has no experiences to choose from; make them with opcd accumulate"
        )
    return found


def check_can_score(parts: Parts) -> None:
    """Refuse to choose where nothing tells a right answer from a wrong one.

    Raises:
        ConfigError: there is no grader, or no validation split.
    """
    instead = 'write experience.use = "pool" to train with all of them, unchosen'
    if parts.grader is None and parts.config.game is None:
        raise ConfigError(
            "without [grader] no candidate can be scored, so none can be chosen; add a grader, or "
            + instead
        )
    if not parts.items.get("validation"):
        raise ConfigError(
            "without a validation split no candidate can be scored (test rows never choose); add "
            f"tasks.validation or tasks.validation_share, or {instead}"
        )


def score_candidates(
    parts: Parts, candidates: Sequence[Candidate], file: Path, say: Say
) -> list[Scored]:
    """The candidates with their scores on validation rows; what `file` has is not measured again.

    Each distinct text is measured once, and the draws of a row are the same for all of them.

    Args:
        parts: the run; its base model answers.
        candidates: what to score.
        file: `scores.jsonl`, which new scores are added to as they are measured.
        say: told how far it is.

    Raises:
        ConfigError: there is nothing to score by.
    """
    check_can_score(parts)
    items = scored_rows(parts)
    measured_as = _settings(parts, items)
    mend_jsonl(file)
    known = {row["key"]: tuple(row["marks"]) for row in read_jsonl(file)}
    keys = {one.text: digest(f"{measured_as}\n{one.text}") for one in candidates}
    by_text = {one.text: one for one in candidates}
    missing = [one for text, one in by_text.items() if keys[text] not in known]
    if missing:
        say(f"scoring {len(missing)} experiences on {len(items)} validation rows")
    # Episodes of one call have ids of their own, and with those other draws.
    most_rows = parts.config.rollout.batch_rows if parts.config.game is None else 0
    for batch in batches(missing, len(items), most_rows):
        texts = [one.text for one in batch]
        for text, marks in zip(texts, _measure(parts, items, texts), strict=True):
            known[keys[text]] = tuple(marks)
            append_jsonl(file, [{"key": keys[text], "marks": marks}])
    return [Scored(one, known[keys[one.text]]) for one in candidates]


def scored_rows(parts: Parts) -> list[Item]:
    """The validation rows that candidates are scored on."""
    return list(parts.items["validation"][: experience_of(parts).select_rows])


def batches(candidates: Sequence[Candidate], rows: int, most_rows: int) -> list[list[Candidate]]:
    """Candidates whose rows are answered in one call: as many as fill the engine's batch.

    The engine reads each text once for all of its rows.
    """
    each = max(1, most_rows // max(rows, 1))
    return [list(candidates[start : start + each]) for start in range(0, len(candidates), each)]


def standard_error(marks: Sequence[float]) -> float:
    """Of a mean; a share counts as if one row more were right and one wrong: at 0 and 1 too."""
    if set(marks) <= {0.0, 1.0}:
        share = (sum(marks) + 1) / (len(marks) + 2)
        return math.sqrt(share * (1 - share) / len(marks))
    return statistics.stdev(marks) / math.sqrt(len(marks))


def _measure(parts: Parts, items: Sequence[Item], texts: Sequence[str]) -> Iterator[list[float]]:
    """Each text's marks, in the order of the rows."""
    experience, metric = experience_of(parts), parts.config.evaluation.select_by
    contexts = [lessons_context(experience.lessons(()), text) for text in texts]
    asked = [item for context in contexts for item in with_context(parts.renderer, items, context)]
    responses = respond(parts, asked, "in_context")
    for start in range(0, len(asked), len(items)):
        metrics = [r.score.metrics for r in responses[start : start + len(items)]]
        marks = [found[metric] for found in metrics if metric in found]
        if not marks:
            raise ConfigError(
                f"evaluation.select_by = {metric!r}, but the validation rows are graded by "
                f"{sorted(_names(metrics))}; write one of these"
            )
        yield marks


def _names(metrics: Iterable[Mapping[str, float]]) -> set[str]:
    return {name for found in metrics for name in found}


def _settings(parts: Parts, items: Sequence[Item]) -> str:
    """Everything besides the experience that a score depends on."""
    run, experience = parts.config, experience_of(parts)
    tree = run.model_dump(
        mode="json", include={"seed", "model", "grader", "game", "rendering", "rollout"}
    )
    rows = [(i.task.id, [m.content for m in i.task.messages], i.task.answer) for i in items]
    how = run.evaluation.model_dump(include={"temperature", "top_p", "top_k", "select_by"})
    return json.dumps([tree, rows, experience.placement, experience.template, how], default=str)


def experience_of(parts: Parts) -> Experience:
    """The run's `[experience]` table."""
    assert parts.config.experience, "checked by whoever opens the run"
    return parts.config.experience


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
