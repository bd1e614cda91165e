"""How a run is trained and measured: student, rollouts, loss, teacher, steps, anchors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from opcd.config.section import Count, NonNegative, Positive, Section, Share
from opcd.config.servers import Remote

Direction = Literal["reverse_kl", "forward_kl", "jsd"]


class Lora(Section):
    """Train a low-rank adapter; the base weights stay as they are and serve as teacher."""

    type: Literal["lora"] = "lora"
    rank: Count = 32
    alpha: Count = 64
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, or the names of the modules to adapt."""
    last_layers: Count | None = None
    """Adapt only this many of the last layers: the backward pass, and what it has to remember,
    ends where they begin."""


class Full(Section):
    """Train all weights, kept in float32."""

    type: Literal["full"] = "full"


class Model(Section):
    """The student."""

    path: str = "smollm2-135m"
    """A local folder, a `.gguf` file, a Hugging Face id, or the alias `smollm2-135m`."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products and of weights that are not trained; those that are stay in float32.
    `auto` is bfloat16 where the device multiplies it natively."""
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    """`auto` is CUDA, MPS or the processor; a launched process keeps the device it was given."""
    tuning: Annotated[Lora | Full, Field(discriminator="type")] = Lora()
    gradient_checkpointing: bool = False

    @field_validator("tuning", mode="before")
    @classmethod
    def _tuning_is_lora_unless_said(cls, value: Any) -> Any:
        return {"type": "lora", **value} if isinstance(value, Mapping) else value


class Rendering(Section):
    """How conversations become token ids."""

    over_long: Literal["error", "drop_row"] = "error"
    """What to do with a row whose prompt does not fit; nothing is ever cut."""
    max_prompt_tokens: Count | None = None
    """Default: what the model can hold, less the response."""
    student_thinking: bool | None = None
    """`enable_thinking` of the chat template; unset leaves it to the template."""
    teacher_thinking: bool | None = None


class ExactSupport(Section):
    """Sum over the whole vocabulary."""

    type: Literal["exact"] = "exact"


class TopK(Section):
    """Sum over k tokens, and do something with the rest of the mass."""

    type: Literal["top_k"] = "top_k"
    k: Count = 256
    of: Literal["student", "teacher", "union"] = "student"
    tail: Literal["bucket", "renormalise", "drop"] = "bucket"
    """`bucket`: one class more; `drop` is not a divergence and can drain the mass."""


class Sampled(Section):
    """Only the sampled token, as a score-function estimate."""

    type: Literal["sampled"] = "sampled"


class Warmup(Section):
    """The first steps: another direction, and answers of the teacher's to start from."""

    direction: Direction = "forward_kl"
    steps: Count = 16
    teacher_fraction: Share | None = None
    """`rollout.teacher_fraction` of these steps; unset, that of all steps. Where the student gives
    the teacher's opening almost no mass, its own answers show one token more of it every few
    steps; the teacher's show all of it."""


class Loss(Section):
    """What moves the student towards the teacher."""

    direction: Direction = "reverse_kl"
    jsd_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Weight of the teacher in the mixture of `jsd`."""
    support: Annotated[ExactSupport | TopK | Sampled, Field(discriminator="type")] = ExactSupport()
    reduction: Literal["sequence", "token"] = "sequence"
    temperature: Positive = 1.0
    """Divides the logits of both sides; independent of `rollout.temperature`."""
    warmup: Warmup | None = None
    chunk_tokens: Count = 128
    """Response tokens whose logits exist at one time."""

    @model_validator(mode="after")
    def _sampled_token_is_reverse_kl(self) -> Self:
        directions = {self.direction, self.warmup.direction if self.warmup else self.direction}
        if self.support.type == "sampled" and directions != {"reverse_kl"}:
            raise ValueError(
                "support sampled estimates the reverse KL only, since the tokens are the "
                'student\'s; set direction = "reverse_kl" and remove warmup, or take '
                'support = {type = "exact"}'
            )
        return self


class AdapterOff(Section):
    """The student with its adapter switched off: the base model, at no extra memory."""

    type: Literal["adapter_off"] = "adapter_off"


class Frozen(Section):
    """Another model with the same vocabulary, or the student's own first weights."""

    type: Literal["frozen"] = "frozen"
    path: str | None = None
    """Default: `model.path`."""


class Ema(Section):
    """A running mean of the student's weights."""

    type: Literal["ema"] = "ema"
    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99


class Live(Section):
    """The student of this very step; known to collapse (paper, table 5)."""

    type: Literal["live"] = "live"


class Refresh(Section):
    """A snapshot of the student, taken again every so many steps."""

    type: Literal["refresh"] = "refresh"
    every_steps: Count = 30


TeacherConfig = Annotated[
    AdapterOff | Frozen | Ema | Live | Refresh | Remote, Field(discriminator="type")
]


class Optimizer(Section):
    """AdamW and its schedule."""

    lr: Positive = 5e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    clip_norm: Positive = 1.0
    schedule: str = "constant_with_warmup"
    """Any name that `transformers.get_scheduler` knows."""
    warmup_steps: NonNegative = 5
    max_nonfinite_steps: NonNegative = 3
    """Steps with a non-finite loss or gradient that are skipped before the run stops."""


class Batch(Section):
    """How much one step takes, and in what portions."""

    prompts_per_step: Count = 18
    """Tasks and anchors together."""
    rows_per_forward: Count = 8
    """Sequences in one forward and backward pass; gradients accumulate over the rest."""
    prefix_gib: Positive = 4.0
    """Keys and values of contexts that a model keeps, each read once for all prompts behind it;
    the least recently used leaves when another needs its room, and is read again."""


class Anchor(Section):
    """Other prompts that hold the rest of the behaviour still."""

    share: Annotated[float, Field(ge=0.0, lt=1.0)] = 1 / 3
    """Of every step's prompts; 0 trains without anchors."""
    context_return: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of every step's prompts: tasks whose student is given the context again, and is held to what
    the base model says with it, along the base model's answers (arXiv 2606.11627)."""
    return_every_steps: Count = 1
    """Those prompts come in every so many steps, as many more of them: a step reads their context
    once, however many they are."""
    scope: Literal["all_prompts", "tasks"] = "all_prompts"
    """Where the behaviour is wanted when there is no system message. `all_prompts`: everywhere, as
    with the context in the prompt. `tasks`: half of the anchors, too, come without a system
    message, so that prompts of another kind than the tasks keep the base model's answers."""
    path: Path | None = None
    """JSON as shipped in `opcd/anchors.json`; default: that set."""
    max_new_tokens: Count = 16
    """Of anchor responses, in training and in the `kept` suite."""


SuiteName = Literal["kept", "spill", "context_return", "other_context", "leak"]


class Evaluation(Section):
    """What is measured, on which rows."""

    every_steps: Count = 10
    """Validation during training; the best checkpoint is chosen by it."""
    validation_rows: Count | None = 60
    test_rows: Count | None = None
    suites: tuple[SuiteName, ...] = ("kept", "spill", "context_return", "other_context", "leak")
    """What is measured besides the task, see `opcd.suites`."""
    kept_rows: Count = 64
    """Prompts in the `kept` and in the `spill` suite."""
    suite_rows: Count = 48
    """Task rows of `context_return`, and of the KL to the teacher along a model's own answers."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Of what `top_k` leaves; a greedy answer asks for neither."""
    top_k: Count | None = None
    """Draw from this many tokens, the likeliest."""
    select_by: str = "correct"
    """Grader's metric that chooses the best step; where two steps are within one standard error of
    each other, the lower validation KL does."""


class Checkpoint(Section):
    """What is kept on disk."""

    every_steps: Count = 10
    keep: Count = 2


class Launch(Section):
    """Several processes, as `accelerate launch` starts them."""

    timeout_s: Positive = 1800.0
    """How long a process waits for the others before it takes them for gone. Above the time that
    the main one takes to load and to write what the others need not."""


class Tracking(Section):
    """Where metrics go besides `metrics.jsonl`."""

    trackers: tuple[str, ...] = ()
    """Names that accelerate knows: tensorboard, wandb, ..."""
    rollouts_per_step: NonNegative = 2
    """Responses of each step written to `rollouts.jsonl`."""
