"""The folder of a run: what lies where, and who may write into it.

runs/NAME/
  gap.json           what the context changes, measured before training
  search.json        learning rates, and which one validation chose
  config.json        the resolved run
  metrics.jsonl      one object a step
  validation.jsonl   one object a validation
  rollouts.jsonl     a sample of the responses
  checkpoints/       step-N folders, see opcd.checkpoint
  best/              the weights chosen on validation
  evaluation.json    what was measured on the test split
  answers.jsonl      every graded answer of that measurement
  token_kl.jsonl     some of its answers, with what the context changes at each token
  comparison.json    the same rows beside those of other ways to train
  costs.json         what the context costs a request, what training cost
  harness.json       public benchmarks by lm-eval: the base model and the baked one
  experience.json    what experience gained, over all conditions and rounds
  experience/        what was gathered, a folder for each round:
    round-N/settings.json            what its traces and items depend on
    round-N/traces.jsonl             the trajectory store: one object a trace
    round-N/seed-K/answers.jsonl     what the extractor wrote of each trace
    round-N/seed-K/items.jsonl       every item with where it comes from and what became of it
    round-N/seed-K/experience-M.md   the experience after M traces
    round-N/seed-K/raw.md            the traces themselves as a context
    round-N/scores.jsonl             what each candidate got on each validation row
    round-N/selection.json           candidates with their scores
    round-N/growth.svg               score against number of items
    round-N/selected.md              the experience that was chosen; absent where none is best
    round-N/consolidation.json       what was baked in, beside its baselines on the test rows
    round-N/model/                   what the round begins with, from the second on
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd.config import Run, dump_config, load_config
from opcd.errors import RunFolderError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def gap(self) -> Path:
        """What the context changes, measured before training."""
        return self.path / "gap.json"

    @property
    def search(self) -> Path:
        """Learning rates, and which one validation chose."""
        return self.path / "search.json"

    @property
    def found_before(self) -> set[Path]:
        """What was found out before training, and outlives a run that is started anew."""
        return {self.gap, self.search, self.experience, self.rounds}

    @property
    def comparison(self) -> Path:
        """The same rows beside those of other ways to train."""
        return self.path / "comparison.json"

    @property
    def config(self) -> Path:
        """The resolved run."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One object a step."""
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """One object a validation."""
        return self.path / "validation.jsonl"

    @property
    def rollouts(self) -> Path:
        """A sample of the responses."""
        return self.path / "rollouts.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Everything needed to go on."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The weights chosen on validation."""
        return self.path / "best"

    @property
    def evaluation(self) -> Path:
        """What was measured on the test split."""
        return self.path / "evaluation.json"

    @property
    def answers(self) -> Path:
        """Every graded answer of that measurement."""
        return self.path / "answers.jsonl"

    @property
    def token_kl(self) -> Path:
        """Some of its answers, with what the context changes at each token."""
        return self.path / "token_kl.jsonl"

    @property
    def costs(self) -> Path:
        """What the context costs a request, and what training cost."""
        return self.path / "costs.json"

    @property
    def harness(self) -> Path:
        """Public benchmarks by lm-eval."""
        return self.path / "harness.json"

    @property
    def experience(self) -> Path:
        """What experience gained, over all conditions and rounds."""
        return self.path / "experience.json"

    @property
    def rounds(self) -> Path:
        """What was gathered, a folder for each round."""
        return self.path / "experience"


@dataclass(frozen=True, slots=True)
class RoundFolder:
    """Paths of one round of gathering experience."""

    path: Path

    @property
    def settings(self) -> Path:
        """What its traces and items depend on."""
        return self.path / "settings.json"

    @property
    def traces(self) -> Path:
        """The trajectory store, where the run names no other."""
        return self.path / "traces.jsonl"

    @property
    def selection(self) -> Path:
        """Candidates with their scores."""
        return self.path / "selection.json"

    @property
    def growth(self) -> Path:
        """Score against number of items."""
        return self.path / "growth.svg"

    @property
    def scores(self) -> Path:
        """What each candidate got on each row."""
        return self.path / "scores.jsonl"

    @property
    def selected(self) -> Path:
        """The experience that was chosen."""
        return self.path / "selected.md"

    @property
    def others(self) -> Path:
        """Which traces that others wrote into the stores of rounds before are learned from."""
        return self.path / "others.json"

    @property
    def prefixes(self) -> Path:
        """Stored prompts to train on."""
        return self.path / "prefixes.jsonl"

    @property
    def baked_from(self) -> Path:
        """Which texts the round's runs were trained with."""
        return self.path / "baked_from.json"

    @property
    def raw_traces(self) -> Path:
        """What was measured with traces themselves as the context."""
        return self.path / "raw_traces.json"

    @property
    def consolidation(self) -> Path:
        """All conditions on the test rows."""
        return self.path / "consolidation.json"

    @property
    def model(self) -> Path:
        """The model that the round begins with, where that is another round's."""
        return self.path / "model"

    def seed(self, seed: int) -> Path:
        """The folder of one accumulation."""
        return self.path / f"seed-{seed}"

    def answers(self, seed: int) -> Path:
        """What the extractor wrote of each trace."""
        return self.seed(seed) / "answers.jsonl"

    def items(self, seed: int) -> Path:
        """Every item, with where it comes from and what became of it."""
        return self.seed(seed) / "items.jsonl"

    def raw(self, seed: int) -> Path:
        """The traces of one accumulation themselves as a context."""
        return self.seed(seed) / "raw.md"

    def experience(self, seed: int, traces: int) -> Path:
        """The experience after so many traces; after none it is empty."""
        return self.seed(seed) / f"experience-{traces:03d}.md"

    def experiences(self, seed: int) -> list[Path]:
        """All of one accumulation, the empty one first."""
        return sorted(self.seed(seed).glob("experience-*.md"), key=lambda path: int(path.stem[11:]))


def round_folder(config: Run, number: int = 1) -> RoundFolder:
    """The folder of a round, the first being 1; it is made if it is not there.

    Raises:
        RunFolderError: a file is in the run folder's place.
    """
    folder = RoundFolder(make_folder(config).rounds / f"round-{number}")
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder


def create_run(config: Run, overwrite: bool = False) -> RunFolder:
    """Make the folder of a new run; what was found out before training stays in it.

    Raises:
        RunFolderError: it exists and may not be overwritten.
    """
    check_free(config, overwrite)
    folder = make_folder(config)
    for path in folder.path.iterdir():
        if path not in folder.found_before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_text(folder.config, dump_config(config))
    return folder


def make_folder(config: Run) -> RunFolder:
    """The folder for what is written about a run, before it is started too.

    Raises:
        RunFolderError: a file is in its place.
    """
    folder = _folder_of(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder


def check_free(config: Run, overwrite: bool = False) -> None:
    """Refuse a folder that a new run may not have; it is not made yet.

    Raises:
        RunFolderError: it exists and may not be overwritten.
    """
    folder = _folder_of(config)
    found = set(folder.path.iterdir()) if folder.path.exists() else set[Path]()
    others = found - folder.found_before
    if others and not overwrite:
        raise RunFolderError(
            f"{folder.path} exists, and a run never overwrites another by itself; continue it "
            "with --resume, replace it with --overwrite, or give name=... another value"
        )
    if others and not folder.config.is_file():
        raise RunFolderError(
            f"{folder.path} exists but is not a run (it has no config.json), so it is not "
            "deleted; give name=... another value"
        )


def open_run(path: str | Path) -> tuple[RunFolder, Run]:
    """The folder and the configuration of a run that was started before.

    Raises:
        RunFolderError: the path is not the folder of a run.
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        way = "give a folder that opcd train made"
        if folder.rounds.is_dir():
            way = f"its rounds are trained in runs of their own: give {folder.path}-round-1"
        raise RunFolderError(f"{folder.path} is not a run: it has no config.json; {way}")
    return folder, load_config(folder.config)


def read_best(folder: RunFolder) -> dict[str, Any]:
    """Which step `best/` holds, and why.

    Raises:
        RunFolderError: the run has not come so far.
    """
    file = folder.best / "best.json"
    if not file.is_file():
        raise RunFolderError(
            f"{folder.path} has no best/ yet; train it to its first validation with opcd train"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: readers never see half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one line for each row; JSON has no nan or infinity, so they become null."""
    with path.open("a", encoding="utf-8") as stream:
        for row in rows:
            finite = {key: None if _is_nonfinite(value) else value for key, value in row.items()}
            stream.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")


def mend_jsonl(path: Path) -> None:
    """Make a file fit to be appended to: a last line that a crash cut off is dropped.

    One that is whole and only lacks its line end, as people's files do, gets it.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    last = content.rpartition(b"\n")[2]
    if last.strip() and not _is_json(last):
        os.truncate(path, len(content) - len(last))
    elif last:
        with path.open("ab") as stream:
            stream.write(b"\n")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        yield json.loads(line)


def rewind_jsonl(path: Path, steps: int) -> None:
    """Drop the rows of steps from `steps` on, which a resumed run will write again."""
    rows = [row for row in read_jsonl(path) if row["step"] < steps]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _folder_of(config: Run) -> RunFolder:
    folder = RunFolder(config.out / config.name)
    if folder.path.is_file():
        raise RunFolderError(f"{folder.path} is a file; give name=... another value")
    return folder


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
