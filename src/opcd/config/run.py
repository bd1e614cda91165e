"""A whole run as one typed tree, whose tables fit each other.

Nothing here imports torch, so that a mistake in a run is told in a fraction of a second.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import field_validator, model_validator

from opcd.config import inputs, training
from opcd.config.experience import Experience, check_beside
from opcd.config.games import GameConfig
from opcd.config.rollouts import Rollout, RolloutConfig
from opcd.config.section import Count, Section


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
    rollout: RolloutConfig = Rollout()
    loss: training.Loss = training.Loss()
    teacher: training.TeacherConfig = training.AdapterOff()
    optimizer: training.Optimizer = training.Optimizer()
    batch: training.Batch = training.Batch()
    anchor: training.Anchor = training.Anchor()
    evaluation: training.Evaluation = training.Evaluation()
    checkpoint: training.Checkpoint = training.Checkpoint()
    tracking: training.Tracking = training.Tracking()
    launch: training.Launch = training.Launch()

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
    def has_test(self) -> bool:
        """Whether there are rows or boards to measure on in the end."""
        if self.game:
            return self.game.boards.test > 0
        return bool(self.tasks and (self.tasks.test or self.tasks.test_share))

    @property
    def most_teacher_answers(self) -> float:
        """The largest share of a step's tasks and anchors that their teachers answer."""
        of_warmup = self.loss.warmup.teacher_fraction if self.loss.warmup else None
        return max(self.rollout.teacher_fraction, of_warmup or 0.0)

    @field_validator("rollout", mode="before")
    @classmethod
    def _rollouts_are_local_unless_said(cls, value: Any) -> Any:
        return {"type": "hf", **value} if isinstance(value, Mapping) else value

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
    def _remote_teacher_can_say_it(self) -> Self:
        if not isinstance(self.teacher, training.Remote):
            return self
        support, asked = self.loss.support, self.teacher.ask
        if support.type == "exact":
            raise ValueError(
                "loss.support is exact but teacher.type is remote: a server returns a few "
                "log-probabilities a token, never the whole vocabulary; write "
                'loss.support = {type = "top_k", of = "teacher"}'
            )
        if support.type == "top_k" and support.of == "union":
            raise ValueError(
                'loss.support.of = "union" but teacher.type is remote: a server lists its own '
                'likeliest tokens or scores yours, not both; write of = "teacher" or "student"'
            )
        if self.loss.temperature != 1.0:
            raise ValueError(
                f"loss.temperature = {self.loss.temperature} but teacher.type is remote: a server "
                "returns log-probabilities of temperature 1 alone; write loss.temperature = 1.0"
            )
        if asked == "student_top_k" and (support.type != "top_k" or support.of != "student"):
            raise ValueError(
                'teacher.ask = "student_top_k" but loss.support is not the student\'s top-k; write '
                'loss.support = {type = "top_k", of = "student"}'
            )
        if asked == "sampled" and support.type != "sampled":
            raise ValueError(
                'teacher.ask = "sampled" tells one token\'s log-probability, but loss.support sums '
                'over more; write loss.support = {type = "sampled"}'
            )
        return self

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> Self:
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
