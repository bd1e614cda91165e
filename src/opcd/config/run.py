"""A whole run as one typed tree, whose tables fit each other.

Nothing here imports torch, so that a mistake in a run is told in a fraction of a second.
"""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from opcd.config import inputs, training
from opcd.config.experience import Experience, check_beside
from opcd.config.games import GameConfig
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
    rollout: training.Rollout = training.Rollout()
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
