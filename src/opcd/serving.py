"""What of a run is on servers: its engine, its teacher; met and checked before the first step."""

from collections.abc import Mapping, Sequence
from typing import Any

from opcd import weights
from opcd.config import Run
from opcd.config.rollouts import Responses, Rollout, VllmRollout
from opcd.config.training import AdapterOff, Frozen, Remote, Sampled
from opcd.items import Item, pairs_of
from opcd.remote import RemoteTeacher, meet_teacher
from opcd.rollouts.meeting import check_publishing, check_weights, find_servers, probe_of
from opcd.rollouts.publishing import AdapterPublisher, Once, Shelf, WeightPublisher
from opcd.rollouts.vllm import VllmEngine
from opcd.teachers import LocalTeacher

Items = Mapping[str, Sequence[Item]]


def engine_on_servers(
    config: Run,
    student: Any,
    base: LocalTeacher,
    tokenizer: Any,
    items: Items,
    end_ids: frozenset[int],
    once: Once,
) -> tuple[VllmEngine, list[str]]:
    """The engine of `rollout.type = "vllm"`, its servers checked and given the student.

    Raises:
        InputError: a server cannot be used as it is.
        ServerError: a server is gone, or talks nonsense.
    """
    rollout = config.rollout
    assert isinstance(rollout, VllmRollout), "asked for by the run"
    longest, new_tokens = longest_prompt(items), longest_response(config)
    servers, name = find_servers(rollout, tokenizer, longest, new_tokens)
    shelf = Shelf(rollout.weights_folder)
    if config.model.tuning.type == "lora":
        publisher = AdapterPublisher(servers, name, student, shelf, once)
    else:
        base_path = weights.locate(config.model.path)
        publisher = WeightPublisher(servers, name, student, base_path, shelf, once)
    vocabulary = student.get_output_embeddings().weight.shape[0]
    engine = VllmEngine(rollout, servers, publisher, end_ids, vocabulary)
    if config.model.tuning.type == "full":
        # They may still have what an earlier run left.
        check_publishing(publisher, "base")
    nats = check_weights(rollout, engine, name, base, probe_of(longest))
    check_publishing(publisher, "student")
    urls = ", ".join(server.url for server in servers)
    note = (
        f"responses come from {name!r} on {urls}, whose log-probabilities are {nats:.3f} nats from "
        f"the trainer's (allowed: {rollout.max_logprob_difference_nats})"
    )
    return engine, [note]


def teacher_on_servers(
    config: Run, student: Any, tokenizer: Any, items: Items
) -> tuple[Run, RemoteTeacher, list[str]]:
    """The teacher of `teacher.type = "remote"`, and the run with what it can be asked for.

    Raises:
        InputError: a server cannot be used as it is.
        ServerError: a server is gone, or talks nonsense.
    """
    assert isinstance(config.teacher, Remote), "asked for by the run"
    longest = longest_prompt(items)
    # A teacher scores the response as a part of its prompt.
    room = [*longest, *([0] * longest_response(config))]
    vocabulary = student.get_output_embeddings().weight.shape[0]
    teacher, notes = meet_teacher(config.teacher, config.loss, tokenizer, vocabulary, room)
    if teacher.level == "sampled" and config.loss.support.type != "sampled":
        notes.append("so loss.support is sampled: the score-function estimate of the reverse KL")
        loss = config.loss.model_copy(update={"support": Sampled()})
        config = config.model_copy(update={"loss": loss})
    return config, teacher, notes


def answered_here(config: Run, scored: bool) -> Run:
    """A finished run without the servers that trained it: this process answers.

    Args:
        config: the run.
        scored: whether its teacher will be asked; if not, it need not be there.
    """
    shared = {name: getattr(config.rollout, name) for name in Responses.model_fields}
    changes: dict[str, Any] = {"rollout": Rollout(**shared)}
    if isinstance(config.teacher, Remote) and not scored:
        is_lora = config.model.tuning.type == "lora"
        changes["teacher"] = AdapterOff() if is_lora else Frozen()
    return config.model_copy(update=changes)


def longest_prompt(items: Items) -> tuple[int, ...]:
    """The longest of the run's prompts, with or without the context."""
    pairs = pairs_of(items)
    return max((ids for p in pairs for ids in (p.student_ids, p.teacher_ids)), key=len)


def longest_response(config: Run) -> int:
    """How many tokens a response of the run may have."""
    return max(config.rollout.max_new_tokens, config.anchor.max_new_tokens)
