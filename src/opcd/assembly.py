"""A configuration becomes the parts that programs work with: tasks, models, teachers, engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from opcd import adapters, models, weights
from opcd.anchors import AnchorSet, load_anchors
from opcd.attention import why_no_prefix
from opcd.checking import check_select_by, warnings
from opcd.config import Run, check_files, training
from opcd.errors import ConfigError
from opcd.graders import Grader, build_grader
from opcd.items import Item, check_last_turn, pairs_of, render_splits, weights_of
from opcd.launch import build_accelerator, on_main, own, read_fsdp, read_zero
from opcd.openings import MIN_PREFIX_TOKENS, Openings
from opcd.prefix_cache import token_bytes
from opcd.remote import RemoteTeacher
from opcd.rendering import Renderer
from opcd.rollouts.engine import RolloutEngine
from opcd.rollouts.hf import HFEngine
from opcd.rollouts.vllm import VllmEngine
from opcd.servers import Server
from opcd.serving import engine_on_servers, teacher_on_servers
from opcd.teachers import LocalTeacher, build_teacher
from opcd.types import Answered, Context, PromptPair, Task

T = TypeVar("T")

AHEAD_STEPS = 10
"""Steps whose teachers' answers are generated together."""
MAX_KEPT_BYTES = 2**28
"""Memory that the hidden states of those answers may take."""


@dataclass
class Parts:
    """Everything a program needs, built from one configuration."""

    config: Run
    accelerator: Accelerator
    dtype: torch.dtype
    renderer: Renderer
    items: dict[str, Sequence[Item]]
    """Rendered tasks by split: train, validation, test; and extraction, to gather experience."""
    anchors: AnchorSet
    kept: AnchorSet
    """Anchors that are never trained on."""
    grader: Grader | None
    student: Any
    distiller: models.Distiller
    teacher: LocalTeacher | RemoteTeacher
    base: LocalTeacher
    """The student before training: the anchors' teacher."""
    engine: RolloutEngine
    teacher_engine: RolloutEngine
    """Answers as the teacher, under `base`; the same one, if the base model is the teacher."""
    notes: list[str] = field(default_factory=list)
    """What a user should know before the run: dropped rows, a cache that cannot be used."""

    ahead: dict[int, list[Answered]] = field(default_factory=dict)
    """The teacher's answers to tasks of steps to come."""
    coach: Any = None
    """Who writes the contexts of coach mode, once somebody has asked."""
    coached: dict[str, list[Item]] = field(default_factory=dict)
    """Rows to be measured in coach mode, with what was written on the base model's answers."""
    keeps_hidden: bool = True
    """Whether those answers hold the teacher's hidden states, which then score them."""

    def own(self, rows: Sequence[T], after: int = 0) -> list[T]:
        """This process's share of rows; `after` so many of the step that were dealt out before."""
        return own(self.accelerator, rows, after)

    @property
    def in_shards(self) -> bool:
        """Whether some weights are in shards, so that all processes must use them alike."""
        models_used = [self.student, self.base.model]
        if isinstance(self.teacher, LocalTeacher):
            models_used.append(self.teacher.model)
        return any(adapters.in_shards(model) for model in models_used)

    @property
    def keeps_step(self) -> bool:
        """Whether all processes must use the engines alike: also where one sends the weights."""
        several = self.accelerator.num_processes > 1
        return self.in_shards or (several and isinstance(self.engine, VllmEngine))

    @property
    def servers(self) -> list[Server]:
        """Those that the run asks, if any."""
        far = [p for p in (self.teacher, self.engine) if isinstance(p, RemoteTeacher | VllmEngine)]
        return [server for part in far for server in part.servers]

    def render_anchors(self, tasks: Sequence[Task]) -> list[PromptPair]:
        """Anchor prompts, the same for both sides."""
        return [self.renderer.pair(task, Context(), "anchor") for task in tasks]

    @property
    def context_tokens(self) -> int:
        """What the context adds to a request, on average over the rows."""
        pairs = pairs_of(self.coached or self.items)
        extra = [len(pair.teacher_ids) - len(pair.student_ids) for pair in pairs]
        return round(sum(extra) / len(extra))


def assemble(config: Run) -> Parts:
    """Load and check everything that a run names.

    Raises:
        InputError: some part of the input is wrong; nothing was written.
    """
    check_files(config)
    accelerator = build_accelerator(config)
    set_seed(config.seed)
    tokenizer = weights.load_tokenizer(config.model.path, config.model.revision)
    dtype = weights.auto_dtype(config.model.dtype, accelerator.device)
    student = _load_student(config, accelerator.device, dtype)
    holds = weights.positions(config.model.path, config.model.revision)
    renderer = Renderer(tokenizer, config.rendering, max_prompt_tokens(config, holds))
    items, notes = render_splits(config, renderer)
    notes += check_last_turn(config, renderer, items["train"][0])
    grader = build_grader(config.grader) if config.grader else None
    check_select_by(config, grader, [item.task for item in items.get("validation", [])])
    notes = [*warnings(config), *notes]
    student = adapters.tune(student, config.model.tuning, config.seed)
    teacher, base = _build_teachers(config, accelerator, dtype, student, tokenizer)
    if isinstance(config.teacher, training.Remote):
        config, teacher, more = teacher_on_servers(config, student, renderer, items)
        notes += more
        teacher = replace(teacher, others_wait=accelerator.num_processes > 1)
    # What a coach will have written in front of a prompt is not known yet.
    elif config.context.type != "coach":
        notes += share_openings(teacher, items)
    reads_again = _why_read_again(config, student, dtype)
    notes += [reads_again] if reads_again else []
    settings = dtype, end_ids(student, tokenizer), config.rollout.batch_rows
    engine: RolloutEngine = HFEngine(student, base.model, *settings, base.prefixes)
    of_teacher = engine
    if isinstance(teacher, LocalTeacher) and teacher.model is not base.model:
        of_teacher = HFEngine(teacher.model, teacher.model, *settings, teacher.prefixes)
    if config.rollout.type == "vllm":
        told = config, student, base, renderer, items, settings[1]
        served, more = engine_on_servers(*told, lambda act: on_main(accelerator, act))
        notes += more
        engine, of_teacher = served, served if of_teacher is engine else of_teacher
    trained, kept = load_anchors(config.anchor.path)
    return Parts(
        config=config,
        accelerator=accelerator,
        dtype=dtype,
        renderer=renderer,
        items=items,
        anchors=trained,
        kept=kept,
        grader=grader,
        student=student,
        distiller=models.Distiller(student),
        teacher=teacher,
        base=base,
        engine=engine,
        teacher_engine=of_teacher,
        notes=notes,
        keeps_hidden=not reads_again,
    )


def _load_student(config: Run, device: torch.device, dtype: torch.dtype) -> Any:
    # Weights that are trained are kept in float32; under LoRA those are the adapter's alone.
    stored = dtype if config.model.tuning.type == "lora" else torch.float32
    model = weights.load_model(config.model.path, stored, config.model.revision)
    models.check_head(model)
    models.check_rows(model)
    # Asked while all weights are here and nothing is trained: it reads a few tokens.
    why_no_prefix(model)
    if config.model.gradient_checkpointing:
        # The name it has in later versions of transformers 5, which warn of the other.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    vocabulary = model.get_output_embeddings().weight.shape[0]
    support = config.loss.support
    if support.type == "top_k" and support.k > vocabulary:
        raise ConfigError(
            f"loss.support.k = {support.k} is larger than the vocabulary of {vocabulary} tokens "
            f'of {config.model.path}; lower it, or write loss.support = {{type = "exact"}}'
        )
    return model.to(device)


def max_prompt_tokens(config: Run, holds: int) -> int:
    """The longest prompt of a run whose model holds so many tokens."""
    room = holds - max(config.rollout.max_new_tokens, config.anchor.max_new_tokens)
    return min(room, config.rendering.max_prompt_tokens or room)


def end_ids(student: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a response."""
    configured = adapters.causal_model(student).generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*listed, tokenizer.eos_token_id) if i is not None)


def _build_teachers(
    config: Run, accelerator: Accelerator, dtype: torch.dtype, student: Any, tokenizer: Any
) -> tuple[LocalTeacher, LocalTeacher]:
    """The tasks' teacher and the base model, one object where they are the same.

    In the place of a teacher on a server stands the base model.
    """
    autocast: Any = accelerator.autocast

    def frozen(path: str | None) -> Any:
        if path:
            models.check_same_vocabulary(tokenizer, weights.load_tokenizer(path))
        own = config.model
        model = weights.load_model(path or own.path, dtype, None if path else own.revision)
        models.check_head(model)
        models.check_rows(model)
        return model.to(accelerator.device).requires_grad_(False)

    def build(teacher: Any) -> LocalTeacher:
        other = frozen(teacher.path) if isinstance(teacher, training.Frozen) else None
        most_bytes = round(config.batch.prefix_gib * 2**30)
        return build_teacher(teacher, student, other, autocast, most_bytes)

    lora = config.model.tuning.type == "lora"
    base = training.AdapterOff() if lora else training.Frozen()
    if isinstance(config.teacher, training.Remote) or config.teacher == base:
        both = build(base)
        return both, both
    return build(config.teacher), build(base)


def share_openings(teacher: LocalTeacher, items: Mapping[str, Sequence[Item]]) -> list[str]:
    """Let the teacher read each shared context once; notes say so, or why it does not."""
    pairs = pairs_of(items)
    prompts = [pair.teacher_ids for pair in pairs]
    openings = Openings(prompts, weights_of(items))
    if not openings.known:
        added = sum(len(pair.teacher_ids) - len(pair.student_ids) for pair in pairs) / len(pairs)
        if added < MIN_PREFIX_TOKENS:
            return []
        return [f"no two of {len(prompts)} prompts share their context, so each is read in full"]
    lengths = sorted({len(ids) for ids in openings.known})
    tokens = " to ".join(f"{count:,}" for count in dict.fromkeys((lengths[0], lengths[-1])))
    count = len(openings.known)
    what = (
        f"the shared context of {tokens} tokens is"
        if count == 1
        else f"{count} shared contexts of {tokens} tokens are"
    )
    probe = next(ids for ids in prompts if openings.of(ids) == lengths[-1])
    in_shards = bool(read_fsdp() or read_zero())
    if teacher.moves and in_shards:
        return [f"{what} read with every prompt: the teacher's weights move, in shards"]
    if reason := teacher.share(openings, probe):
        return [f"{what} read with every prompt: {reason}"]
    again = ", and again when the teacher has moved" if teacher.moves else ""
    notes = [f"{what} read once" + (" each" if count > 1 else "") + again]
    if openings.without:
        notes.append(
            f"{openings.without} of {len(prompts)} prompts looked at share no context of "
            "theirs with others and are read in full"
        )
    held_bytes = openings.tokens * token_bytes(teacher.model)
    if held_bytes > teacher.prefix_bytes:
        # Weights in shards are whole for one pass at a time, and an opening is a pass of its own.
        left = (
            "what does not fit is read with every prompt, since weights are in shards"
            if in_shards
            else "those used least recently are read again"
        )
        notes.append(
            f"their keys and values take {held_bytes / 2**30:.3g} GiB, more than batch.prefix_gib "
            f"= {teacher.prefix_bytes / 2**30:.3g}: {left}"
        )
    return notes


def _why_read_again(config: Run, student: Any, dtype: torch.dtype) -> str | None:
    """A note if the teachers' answers have too many hidden states to be kept until scored."""
    most = max(config.rollout.max_new_tokens, config.anchor.max_new_tokens)
    width = adapters.causal_model(student).config.get_text_config().hidden_size
    kept_bytes = AHEAD_STEPS * config.batch.prompts_per_step * most * width * dtype.itemsize
    answers = config.most_teacher_answers or config.returns_per_step
    if kept_bytes <= MAX_KEPT_BYTES or not answers:
        return None
    return (
        f"teachers read their own answers again to score them: the hidden states of {AHEAD_STEPS} "
        f"steps would take up to {kept_bytes / 2**30:.1f} GiB"
    )
