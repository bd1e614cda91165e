"""A whole run as one typed tree: load it from TOML, override keys, check it, dump it.

People write TOML; the resolved tree is written back as `config.json`. Nothing here imports
torch, so that a mistake in a run is told in a fraction of a second.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from opcd.config import inputs, training
from opcd.config.experience import Experience, check_beside
from opcd.config.games import GameConfig
from opcd.config.section import Count, Section
from opcd.errors import ConfigError, ContextError, TaskError


class Run(Section):
    """One run: everything that a result depends on."""

    name: str
    seed: int = 0
    steps: Count = 30
    out: Path = Path("runs")
    """Run folders are made in here, by name."""
    model: training.Model = training.Model()
    context: inputs.ContextConfig = inputs.Lessons()
    tasks: inputs.Tasks | None = None
    """Single answers; a run has either these or a game."""
    game: GameConfig | None = None
    """Episodes of several turns, on boards."""
    grader: inputs.GraderConfig | None = None
    experience: Experience | None = None
    """Where the context is not given, but learned."""
    rendering: training.Rendering = training.Rendering()
    rollout: training.Rollout = training.Rollout()
    loss: training.Loss = training.Loss()
    teacher: training.TeacherConfig = training.AdapterOff()
    optimizer: training.Optimizer = training.Optimizer()
    batch: training.Batch = training.Batch()
    anchor: training.Anchor = training.Anchor()
    evaluation: training.Evaluation = training.Evaluation()
    checkpoint: training.Checkpoint = training.Checkpoint()
    tracking: training.Tracking = training.Tracking()

    @property
    def anchors_per_step(self) -> int:
        """Anchor prompts in each step."""
        return round(self.batch.prompts_per_step * self.anchor.share)

    @property
    def bare_anchors_per_step(self) -> int:
        """How many of the anchors have no system message."""
        return self.anchors_per_step // 2 if self.anchor.scope == "tasks" else 0

    @property
    def returns_per_step(self) -> int:
        """Task prompts that are given with the context, on average over the steps."""
        return round(self.batch.prompts_per_step * self.anchor.context_return)

    @property
    def tasks_per_step(self) -> int:
        """Task prompts in each step."""
        return self.batch.prompts_per_step - self.anchors_per_step - self.returns_per_step

    @property
    def is_graded(self) -> bool:
        """Whether an answer is right or wrong: says the grader, or the game."""
        return self.grader is not None or self.game is not None

    @property
    def has_validation(self) -> bool:
        """Whether there are rows or boards to choose weights on."""
        if self.game:
            return self.game.boards.validation > 0
        return bool(self.tasks and (self.tasks.validation or self.tasks.validation_share))

    @property
    def most_teacher_answers(self) -> float:
        """The largest share of a step's tasks and anchors that their teachers answer."""
        of_warmup = self.loss.warmup.teacher_fraction if self.loss.warmup else None
        return max(self.rollout.teacher_fraction, of_warmup or 0.0)

    @model_validator(mode="after")
    def _asks_tasks_or_plays_a_game(self) -> Self:
        if self.tasks is None and self.game is None:
            raise ValueError(
                "there is neither a [tasks] table nor a [game] table, so there is nothing to "
                'answer; write [tasks] with train = "train.jsonl", or [game] with '
                'type = "frozen_lake"'
            )
        if self.game is None:
            return self
        if self.tasks is not None:
            raise ValueError(
                "there are a [tasks] and a [game] table, but a game's boards are its tasks; "
                "remove one of the two (game.boards says how many boards each split has)"
            )
        if self.grader is not None:
            raise ValueError(
                "there are a [grader] and a [game] table, but the game itself says what is "
                "solved; remove [grader]"
            )
        if self.context.type == "column":
            raise ValueError(
                "context.type is column but a board brings no text of its own; write another "
                'kind of context, such as context.type = "system_prompt"'
            )
        if not self.game.boards.train:
            raise ValueError("game.boards.train = 0 leaves nothing to train on; write at least 1")
        return self

    @model_validator(mode="after")
    def _context_is_given_or_learned(self) -> Self:
        if self.experience:
            graded, share = self.grader is not None, getattr(self.tasks, "extraction_share", 0.0)
            check_beside(self.experience, self.context, self.game, graded, share)
        elif isinstance(self.context, inputs.Lessons) and not self.context.files:
            raise ValueError(
                "there is no context to bake in; write [context] with its type and path, or "
                "[experience] to have it gathered"
            )
        return self

    @model_validator(mode="after")
    def _coach_can_be_told(self) -> Self:
        context = self.context
        if not isinstance(context, inputs.Coach):
            return self
        if context.feedback in ("outcome", "answer") and not self.is_graded:
            raise ValueError(
                f'context.feedback = "{context.feedback}" but there is no [grader] to say what is '
                'right; add one, or write context.feedback = "none" or "rubric"'
            )
        if context.feedback in ("answer", "rubric") and self.game:
            raise ValueError(
                f'context.feedback = "{context.feedback}" but a board brings no answer and no '
                'rubric; write context.feedback = "outcome": what the game said at the end'
            )
        if self.most_teacher_answers or self.anchor.context_return:
            raise ValueError(
                "teacher_fraction (of rollout or loss.warmup) or anchor.context_return is above "
                "0, but a coach writes the context after the student's response: nobody could "
                "answer with it before; set them to 0"
            )
        return self

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Self:
        if self.teacher.type == "remote" and self.loss.support.type == "exact":
            raise ValueError(
                "loss.support is exact but teacher.type is remote: a server returns a few "
                "log-probabilities a token, never the whole vocabulary; write "
                'loss.support = {type = "top_k", of = "teacher"}'
            )
        answers = self.most_teacher_answers
        if answers and self.loss.support.type == "sampled":
            raise ValueError(
                f"teacher_fraction = {answers} but loss.support is sampled, which estimates the KL "
                'from the student\'s own tokens; write loss.support = {type = "exact"}'
            )
        if answers and self.teacher.type not in ("adapter_off", "frozen"):
            raise ValueError(
                f"teacher_fraction = {answers} (of rollout or loss.warmup) lets the teacher "
                f"answer, but teacher.type = {self.teacher.type!r} has no weights of its own to "
                'answer with; write teacher.type = "adapter_off" or "frozen"'
            )
        if self.teacher.type == "adapter_off" and self.model.tuning.type == "full":
            raise ValueError(
                "teacher.type is adapter_off but model.tuning is full: there is no adapter to "
                'switch off; write teacher.type = "frozen", or model.tuning.type = "lora"'
            )
        if self.tasks_per_step < 1:
            raise ValueError(
                f"anchor.share = {self.anchor.share} and anchor.context_return = "
                f"{self.anchor.context_return} leave no task among "
                f"{self.batch.prompts_per_step} prompts a step; lower them or raise "
                "batch.prompts_per_step"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run from TOML (written by people) or JSON (written by a run).

    Relative paths inside the file are taken from the folder the file lies in, so that a recipe
    can be started from anywhere; those of overrides, from the working directory.

    Args:
        path: the `.toml` or `.json` file.
        overrides: `key.path=value` strings; the value is read as TOML, else as plain text.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value in it is wrong.
    """
    path = Path(path)
    tree = _read_tree(path)
    tree = _absolute_paths(_parse(tree, path), path.parent)
    for override in overrides:
        _apply_override(tree, override)
    return _parse(_absolute_paths(_parse(tree, path), Path.cwd()), path)


def derive(run: Run, **changes: Any) -> Run:
    """The run with other values; a table's keys are changed one by one, the rest stay.

    Raises:
        ConfigError: the changed run is impossible.
    """
    tree = run.model_dump(mode="json")
    for key, value in changes.items():
        tree[key] = {**(tree[key] or {}), **value} if isinstance(value, dict) else value
    return _parse(tree, run.out / str(tree["name"]))


def read_rates(text: str) -> tuple[float, ...]:
    """Learning rates written as `1e-4,5e-4`.

    Raises:
        ConfigError: there are fewer than two, or one is no positive number.
    """
    try:
        rates = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        rates = ()
    if len(rates) < 2 or not all(0.0 < rate < 1.0 for rate in rates):
        raise ConfigError(
            f"--lr {text!r}: a search takes two or more different learning rates between 0 and 1; "
            "write for example --lr 1e-4,3e-4,1e-3"
        )
    return rates


def dump_config(run: Run) -> str:
    """The resolved tree as JSON text, which `load_config` reads back to an equal tree."""
    return json.dumps(run.model_dump(mode="json"), indent=1) + "\n"


def check_files(run: Run) -> None:
    """Check that every local file that the run names is there and not empty.

    Raises:
        ContextError: a context file is missing or empty.
        TaskError: a task file is missing or empty.
    """
    for key, path in _paths_of(run):
        if key in ("experience.instructions", "context.instructions") or (
            key == "experience.store" and not _starts_from_store(run)
        ):
            continue
        error = ContextError if key.startswith("context") else TaskError
        if not path.is_file():
            raise error(f"{key} = {str(path)!r}: there is no such file; correct the path")
        if not path.read_bytes().strip():
            raise error(
                f"{key} = {str(path)!r}: the file is empty, so there is nothing to train on; "
                "put its text in, or name another file"
            )


def _starts_from_store(run: Run) -> bool:
    """Whether all traces are there before the run starts: it has no problems to solve."""
    if run.experience is None:
        return False
    if run.game:
        return not run.game.boards.extraction
    return not (run.experience.problems or (run.tasks and run.tasks.extraction_share))


def differences(ours: Run, theirs: Run) -> list[str]:
    """The keys in which two runs differ, as `key.path: ours -> theirs`."""
    return flat_differences(*(run.model_dump(mode="json") for run in (ours, theirs)))


def flat_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys in which two trees differ, as `key.path: ours -> theirs`."""
    left, right = dict(_leaves(ours)), dict(_leaves(theirs))
    keys = sorted(left.keys() | right.keys())
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in keys
        if left.get(key) != right.get(key)
    ]


def _read_tree(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{str(path)!r}: there is no such file; give the path of a run's TOML")
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.name}: a run is a table of keys, not a {type(tree).__name__}")
    return tree


def _parse(tree: Mapping[str, Any], path: Path) -> Run:
    try:
        return Run.model_validate({"name": path.resolve().parent.name, **tree})
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{path.name}:\n" + "\n".join(lines)) from error


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"  {where}: there is no such key; check its spelling and its table"
    if item["type"] == "union_tag_not_found":
        return f"  {where}: it does not say which kind it is; write {where}.type = ... beside it"
    message = str(item["msg"]).removeprefix("Value error, ")
    if isinstance(item["input"], dict):
        return f"  {where or 'the run'}: {message}"
    return f"  {where} = {item['input']!r}: {message}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r} is not an override; write key.path=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables, leaf = key.strip().split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {table} is a value, not a table of keys")
    tree[leaf] = value


def _absolute_paths(run: Run, folder: Path) -> dict[str, Any]:
    """The tree with its relative paths taken from a folder; `out` stays the user's place."""
    tree = json.loads(json.dumps(run.model_dump(mode="json", exclude_unset=True)))
    for key, path in _paths_of(run):
        node: Any = tree
        *parents, leaf = [int(part) if part.isdigit() else part for part in key.split(".")]
        for part in parents:
            node = node[part]
        node[leaf] = str((folder / path).resolve())
    # A model may also be a hub id or an alias: only what lies there is a path.
    extractor = run.experience.extractor if run.experience else None
    coach = getattr(run.context, "coach", None)
    for keys, named in (
        (("model",), run.model),
        (("teacher",), run.teacher),
        (("experience", "extractor"), extractor),
        (("context", "coach"), coach),
    ):
        name = getattr(named, "path", None)
        if name and (folder / name).exists():
            table = tree
            for key in keys:
                table = table.setdefault(key, {})
            table["path"] = str((folder / name).resolve())
    return tree


def _paths_of(run: Run) -> Iterator[tuple[str, Path]]:
    def walk(node: Any, key: str) -> Iterator[tuple[str, Path]]:
        if isinstance(node, BaseModel):
            for name in type(node).model_fields:
                yield from walk(getattr(node, name), f"{key}.{name}".lstrip("."))
        elif isinstance(node, tuple):
            for index, item in enumerate(node):
                yield from walk(item, f"{key}.{index}")
        elif isinstance(node, Path) and key != "out":
            yield key, node

    yield from walk(run, "")


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}".lstrip("."))
    else:
        yield key, node
