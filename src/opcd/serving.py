"""What of a run is on servers: its engine, its teacher; met and checked before the first step."""

from collections.abc import Mapping, Sequence
from typing import Any

from opcd import weights
from opcd.config import Run
from opcd.config.rollouts import Responses, Rollout, VllmRollout
from opcd.config.training import AdapterOff, Frozen, Remote, Sampled
from opcd.errors import OverLongError
from opcd.items import Item, examples_of, last_turn, pairs_of
from opcd.remote import RemoteTeacher, meet_teacher
from opcd.rendering import Renderer
from opcd.rollouts.meeting import check_publishing, check_weights, find_servers, probe_of
from opcd.rollouts.publishing import AdapterPublisher, Once, Shelf, WeightPublisher
from opcd.rollouts.vllm import VllmEngine
from opcd.teachers import LocalTeacher
from opcd.types import PromptPair

Items = Mapping[str, Sequence[Item]]


def engine_on_servers(
    config: Run,
    student: Any,
    base: LocalTeacher,
    renderer: Renderer,
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
    room = longest_tokens(config, renderer, items), longest_response(config)
    servers, name = find_servers(rollout, renderer.tokenizer, *room)
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
    nats = check_weights(rollout, engine, name, base, probe_of(longest_prompt(items)))
    check_publishing(publisher, "student")
    urls = ", ".join(server.url for server in servers)
    note = (
        f"responses come from {name!r} on {urls}, whose log-probabilities are {nats:.3f} nats from "
        f"the trainer's (allowed: {rollout.max_logprob_difference_nats})"
    )
    return engine, [note]


def teacher_on_servers(
    config: Run, student: Any, renderer: Renderer, items: Items
) -> tuple[Run, RemoteTeacher, list[str]]:
    """The teacher of `teacher.type = "remote"`, and the run with what it can be asked for.

    Raises:
        InputError: a server cannot be used as it is.
        ServerError: a server is gone, or talks nonsense.
    """
    assert isinstance(config.teacher, Remote), "asked for by the run"
    probe = longest_prompt(items)
    # A teacher scores the response as a part of its prompt.
    tokens = longest_tokens(config, renderer, items) + longest_response(config)
    room = [*probe, *([0] * (tokens - len(probe)))]
    vocabulary = student.get_output_embeddings().weight.shape[0]
    met = meet_teacher(config.teacher, config.loss, renderer.tokenizer, vocabulary, room)
    teacher, notes = met
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
    """The longest of the run's prompts, with or without the context; of games, a first one."""
    return max((longer_side(pair) for pair in pairs_of(items)), key=len)


def longest_tokens(config: Run, renderer: Renderer, items: Items) -> int:
    """How many tokens a prompt of the run may have, as far as that is known; a game's to its end.

    Its warnings, of which few are forgiven, are not counted.
    """
    if config.game is None:
        return len(longest_prompt(items))
    board = max(examples_of(items), key=lambda item: len(longer_side(item.pair)))
    try:
        return len(longer_side(last_turn(config.game.turns, renderer, board)))
    except OverLongError:
        # What goes on for longer is dropped.
        return renderer.max_prompt_tokens


def longer_side(pair: PromptPair) -> tuple[int, ...]:
    """The longer prompt of the two."""
    return max(pair.student_ids, pair.teacher_ids, key=len)


def longest_response(config: Run) -> int:
    """How many tokens a response of the run may have."""
    return max(config.rollout.max_new_tokens, config.anchor.max_new_tokens)
