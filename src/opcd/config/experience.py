"""How a run learns from experience: what it solves, who writes the lessons, what is kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from opcd.config.extractors import Endpoint, ExtractorConfig, Local, Student
from opcd.config.games import GameConfig
from opcd.config.inputs import ContextConfig, Lessons, Source, as_sources, check_template
from opcd.config.section import Count, Section

__all__ = ["Endpoint", "Experience", "ExtractorConfig", "Local", "Student", "check_beside"]


class Experience(Section):
    """The `[experience]` table: solve, extract, accumulate, select, consolidate."""

    problems: tuple[Source, ...] = ()
    """Rows that traces are made on, in no other split. A game has extraction boards instead."""
    seeds: Count = 3
    """Accumulations, each from problems in an order of its own."""
    steps: Count = 10
    """Traces that each accumulation is made of, one after another."""
    feedback: Literal["none", "outcome", "answer"] = "outcome"
    """What the extractor is told of an answer: nothing, right or wrong, or the right answer too."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.7
    """Of the extractor."""
    max_new_tokens: Count = 256
    """Of the extractor's answer to one trace."""
    extractor: ExtractorConfig = Student()
    instructions: Path | None = None
    """A folder with an `extract.md` of your own."""
    with_previous: bool = False
    """Whether the extractor sees the items so far."""
    max_tokens: Count = 4096
    """The longest experience, in the run's tokens."""
    keep: Literal["recent", "best"] = "recent"
    """What stays of a longer one: the newest items, or those of the traces that went best."""
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """Jaccard index of the runs of three words from which on an item repeats another."""
    placement: Literal["system", "user"] = "user"
    template: str | None = None
    """As in `context.type = "experience"`."""
    score_every: Count = 1
    """Candidates are scored after every so many traces; the empty and the last one always."""
    select_rows: Count | None = None
    """Validation rows that candidates are scored on; all of them by default."""
    use: Literal["selected", "pool"] = "selected"
    """Consolidate with the best candidate, or with the last one of every seed as a pool."""
    train_on: Literal["tasks", "store"] = "tasks"
    """Training prompts: the run's, or those saved in the trajectory store."""
    store: Path | None = None
    """The trajectory store; default: `traces.jsonl` in the run's own folder."""

    def lessons(self, path: Path | tuple[Path, ...]) -> Lessons:
        """These files as the context of a run."""
        return Lessons(path=path, placement=self.placement, template=self.template)

    @model_validator(mode="before")
    @classmethod
    def _paths_become_sources(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "problems" not in data:
            return data
        return {**data, "problems": as_sources(data["problems"])}

    @model_validator(mode="after")
    def _keys_fit_each_other(self) -> Self:
        if self.template is not None:
            check_template(self.template, "{experience}", self.placement)
        if self.use == "pool" and self.seeds == 1:
            raise ValueError(
                'use = "pool" but seeds = 1: a pool of one experience is that experience; raise '
                'seeds, or write use = "selected"'
            )
        if self.keep == "best" and self.feedback == "none":
            raise ValueError(
                'keep = "best" but feedback = "none": without outcomes no trace is better than '
                'another; write keep = "recent" or feedback = "outcome"'
            )
        return self


def check_beside(
    found: Experience,
    context: ContextConfig,
    game: GameConfig | None,
    has_grader: bool,
    extraction_share: float,
) -> None:
    """Refuse an `[experience]` table that does not fit the rest of its run.

    Args:
        found: the table.
        context: of the run.
        game: of the run.
        has_grader: whether the run has a grader.
        extraction_share: of the run's tasks.

    Raises:
        ValueError: naming the keys and the way out.
    """
    if not isinstance(context, Lessons):
        raise ValueError(
            f'[context] has type = "{context.type}" beside [experience], whose items are the '
            "context; remove one of the two tables"
        )
    if game:
        _check_game(found, game)
    elif found.problems and extraction_share:
        raise ValueError(
            "experience.problems and tasks.extraction_share are both set, so the problems have two "
            "origins; remove one of them"
        )
    elif not found.problems and not extraction_share and found.store is None:
        raise ValueError(
            "experience.problems is missing, and experience.store too: there is nothing to learn "
            'from; write experience.problems = "problems.jsonl", rows that are in no other split, '
            "or tasks.extraction_share = 0.1 to take them from the train rows"
        )
    elif (found.problems or extraction_share) and found.feedback != "none" and not has_grader:
        raise ValueError(
            f'experience.feedback = "{found.feedback}" but there is no [grader] to say what is '
            'right; add one, or write experience.feedback = "none"'
        )


def _check_game(found: Experience, game: GameConfig) -> None:
    if found.problems:
        raise ValueError(
            "experience.problems stands beside [game], whose extraction boards are the problems; "
            "remove it (game.boards.extraction says how many boards there are)"
        )
    if found.feedback == "answer":
        raise ValueError(
            'experience.feedback = "answer" but a game has no right answer to be told; write '
            'experience.feedback = "outcome": then it is told what the game said at the end'
        )
    if not game.boards.extraction and found.store is None:
        raise ValueError(
            "game.boards.extraction = 0 leaves [experience] nothing to learn from; write at least "
            "1, or name an experience.store"
        )
