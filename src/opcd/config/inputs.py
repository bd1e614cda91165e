"""What a run is made from: its context, its tasks, its grader."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from opcd.config.extractors import ExtractorConfig, Student
from opcd.config.section import Count, Section, Share

SPLITS = ("train", "validation", "test")


class SystemPrompt(Section):
    """A text file placed in the system message."""

    type: Literal["system_prompt"] = "system_prompt"
    path: Path


class Examples(Section):
    """Worked examples as chat turns, and optionally a system prompt before them."""

    type: Literal["examples"] = "examples"
    path: Path
    """JSONL with `prompt` and `response` on each line."""
    system: Path | None = None


class Document(Section):
    """A document, wrapped by a template, in the system message or in the user turn."""

    type: Literal["document"] = "document"
    path: Path
    placement: Literal["system", "user"] = "system"
    template: str = "{document}"
    """Must hold `{document}`; with `placement = "user"` also `{prompt}`."""

    @model_validator(mode="after")
    def _template_has_its_slots(self) -> Self:
        check_template(self.template, "{document}", self.placement)
        return self


class Column(Section):
    """Each row brings its own context in its `context` column."""

    type: Literal["column"] = "column"
    placement: Literal["system", "user"] = "system"
    template: str = "{context}"
    """Must hold `{context}`; with `placement = "user"` also `{prompt}`."""


class Lessons(Section):
    """Items that a model wrote down from its own traces: an experience, or a pool of them.

    Of a pool, every train row is asked once with each; a row of another split always with the same.
    """

    type: Literal["experience"] = "experience"
    path: Path | tuple[Path, ...] = ()
    """One file, or several as a pool; none only where the experience is still to be gathered."""
    placement: Literal["system", "user"] = "user"
    template: str | None = None
    """Must hold `{experience}`; with `placement = "user"` also `{prompt}`. Default: our words."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The experiences, one or several."""
        return self.path if isinstance(self.path, tuple) else (self.path,)

    @model_validator(mode="after")
    def _template_has_its_slots(self) -> Self:
        if self.template is not None:
            check_template(self.template, "{experience}", self.placement)
        return self


class Coach(Section):
    """A coach writes the context of a sample from the student's very response to it.

    In training the teacher then scores that response with what the coach wrote. Measured as
    `in_context`, the base answers, the coach writes, and the base answers again with it.
    """

    type: Literal["coach"] = "coach"
    coach: ExtractorConfig = Student()
    """Who writes: by default the run's own model as it was before training."""
    feedback: Literal["none", "outcome", "answer", "rubric"] = "outcome"
    """What the coach is told of the response: nothing, right or wrong by the grader, the right
    answer too, or what the row's `context` column asks of a good one."""
    instructions: Path | None = None
    """A folder with a `coach.md` of your own; default: the shipped one."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.7
    max_new_tokens: Count = 128
    """Of the coach's answer."""
    placement: Literal["system", "user"] = "user"
    template: str | None = None
    """As in `context.type = "experience"`."""

    @property
    def lessons(self) -> Lessons:
        """How what the coach wrote is placed."""
        return Lessons(placement=self.placement, template=self.template)

    @model_validator(mode="after")
    def _template_has_its_slots(self) -> Self:
        if self.template is not None:
            check_template(self.template, "{experience}", self.placement)
        return self


PER_ROW = ("column", "coach")
"""Kinds of context that every row has one of its own of, so that a prompt alone has none."""
ContextConfig = Annotated[
    SystemPrompt | Examples | Document | Column | Lessons | Coach, Field(discriminator="type")
]


class Jsonl(Section):
    """Rows from a JSONL file."""

    type: Literal["jsonl"] = "jsonl"
    path: Path
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name -> the file's name, e.g. `{prompt = "text", answer = "label"}`."""
    rows: Count | None = None
    """Keep this many rows, drawn with the run's seed; all of them by default."""


class HubDataset(Section):
    """Rows from a Hugging Face data set, or a local folder that `datasets` can read."""

    type: Literal["hf"] = "hf"
    path: str
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)
    rows: Count | None = None


class Generator(Section):
    """Rows from a Python function: `target(seed=..., **arguments)` yields dictionaries."""

    type: Literal["generator"] = "generator"
    target: str
    """`package.module:function`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    rows: Count | None = None


class Public(Section):
    """Rows of a public data set that `opcd.public_sets` knows how to read."""

    type: Literal["public"] = "public"
    name: Literal["medmcqa", "tweet_offensive", "hatecheck", "ethos", "dapo_math", "gsm8k"]
    split: str = "train"
    """One of the set's own splits."""
    path: Path | None = None
    """A local JSONL or parquet file with the set's own columns; the hub is left alone then."""
    revision: str | None = None
    """Of the hub's repository: a branch, a tag or a commit."""
    rows: Count | None = None


Source = Annotated[Jsonl | HubDataset | Generator | Public, Field(discriminator="type")]


class Tasks(Section):
    """Where the prompts come from. Each split is one source or a list of them (a mix)."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...] = ()
    test: tuple[Source, ...] = ()
    validation_share: Share = 0.0
    """Where no source is given: take whole groups of the train rows until they are this share of
    the rows still there; test first, then validation, then extraction."""
    test_share: Share = 0.0
    extraction_share: Share = 0.0
    """Take this share as problems that experience is gathered from; see `experience.problems`."""
    group_by: str | None = None
    """The column (a template, a source) whose values must not span two splits."""

    @model_validator(mode="before")
    @classmethod
    def _paths_become_sources(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        splits = {k: as_sources(v) for k, v in data.items() if k in SPLITS}
        return {**data, **splits}

    @model_validator(mode="after")
    def _split_has_one_origin(self) -> Self:
        for split in ("validation", "test"):
            if getattr(self, split) and getattr(self, f"{split}_share"):
                raise ValueError(
                    f"{split} and {split}_share are both set, so the split has two origins; "
                    f"remove one of them"
                )
        if self.validation_share + self.test_share + self.extraction_share >= 1.0:
            raise ValueError(
                "validation_share, test_share and extraction_share leave no rows to train on; "
                "lower them"
            )
        return self


class Exact(Section):
    """Right where the response equals the answer, white space at the ends aside."""

    type: Literal["exact"] = "exact"
    ignore_case: bool = False


class Contains(Section):
    """Right where the answer occurs in the response, whatever the case."""

    type: Literal["contains"] = "contains"


class Numeric(Section):
    """Right where the last number of the response is the answer."""

    type: Literal["numeric"] = "numeric"
    tolerance: Annotated[float, Field(ge=0.0)] = 1e-6


class Math(Section):
    """Right where the last box of the response, else its last expression, equals the answer.

    Needs the extra `math`.
    """

    type: Literal["math"] = "math"


class Choice(Section):
    """Right where the one choice named in the response (or in its tag) is the answer."""

    type: Literal["choice"] = "choice"
    choices: Annotated[tuple[str, ...], Field(min_length=2)]
    tag: str | None = None
    """Look only inside `<tag>...</tag>`; letters in running text are easily mistaken."""


class JsonObject(Section):
    """Right where the whole response is a JSON object that equals the answer."""

    type: Literal["json"] = "json"
    keys: Annotated[dict[str, tuple[str | bool | int | float | None, ...]], Field(min_length=1)]
    """Every key that must be there, with its allowed values (an empty list allows any)."""


class Regex(Section):
    """Right where the pattern occurs; with an answer, where its first group equals it."""

    type: Literal["regex"] = "regex"
    pattern: str


class Function(Section):
    """A user's own `(task, response) -> Score`."""

    type: Literal["function"] = "function"
    target: str
    """`package.module:function`."""


GraderConfig = Annotated[
    Exact | Contains | Numeric | Math | Choice | JsonObject | Regex | Function,
    Field(discriminator="type"),
]


def as_sources(value: Any) -> Any:
    """A path, a table or a list of both as a tuple of sources' tables."""
    if isinstance(value, str | Path):
        return ({"type": "jsonl", "path": value},)
    if isinstance(value, Mapping):
        return ({"type": "jsonl", **value},)
    if isinstance(value, Sequence):
        return tuple(source for item in value for source in as_sources(item))
    return value


def check_template(template: str, slot: str, placement: str) -> None:
    """Refuse a template without the slots that its placement needs.

    Raises:
        ValueError: naming those it lacks.
    """
    slots = [slot, "{prompt}"] if placement == "user" else [slot]
    missing = [slot for slot in slots if slot not in template]
    if missing:
        raise ValueError(
            f"template lacks {' and '.join(missing)}, so that text would never be shown; "
            f'write for example template = "{" ".join(slots)}"'
        )
