"""A model reads a trace and writes down what it teaches: prompts out, items in.

How it is asked stands in `experience_prompts/extract.md`, or in the user's own file. Whatever
comes back that is no item is counted, never a crash.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

from opcd import weights
from opcd.assembly import Parts
from opcd.authoring import load_answering
from opcd.config import Run
from opcd.config.experience import Experience
from opcd.config.extractors import Endpoint, Local, Student
from opcd.instructions import Instructions, load_instructions
from opcd.near_duplicates import words_of
from opcd.rendering import Renderer
from opcd.rollouts.engine import Prompt, RolloutEngine, Sampling
from opcd.traces import Trace, trace_text
from opcd.types import Message

MARK = "- EXPERIENCE ITEM:"
UNKNOWN = "Nothing is known of how it went."
NO_ITEMS = "None."
SHIPPED = "experience_prompts"


@dataclass(frozen=True, slots=True)
class Request:
    """What an extractor is asked."""

    id: str
    """Decides the draw."""
    messages: tuple[Message, ...]
    opening: str = ""
    """How the answer is to begin, where the extractor can be held to that."""


@dataclass(frozen=True, slots=True)
class Written:
    """What an extractor wrote."""

    text: str
    finished: bool = True
    """Whether it ended by itself, rather than at the token limit."""
    skipped: str = ""
    """Why it was not asked at all; empty where it was."""


class Extractor(Protocol):
    """Whoever writes items."""

    @property
    def name(self) -> str:
        """The model, as it stands in every item's provenance."""
        ...

    def write(self, requests: Sequence[Request]) -> list[Written]:
        """An answer to each, in their order."""
        ...


@dataclass(frozen=True, slots=True)
class ModelExtractor:
    """A model on this machine, as it was before any training."""

    name: str
    engine: RolloutEngine
    renderer: Renderer
    sampling: Sampling
    max_new_tokens: int
    thinking: bool | None = None

    def write(self, requests: Sequence[Request]) -> list[Written]:
        """An answer to each; a prompt that does not fit is not asked, and never cut."""
        found: dict[str, Written] = {}
        prompts: list[Prompt] = []
        for request in requests:
            text = self.renderer.text(request.messages, self.thinking) + request.opening
            ids = self.renderer.encode(text)
            if len(ids) + self.max_new_tokens > self.renderer.max_prompt_tokens:
                found[request.id] = Written("", skipped=self._too_long(len(ids)))
            else:
                prompts.append(Prompt(request.id, ids, self.max_new_tokens))
        self.engine.use("base", 0)
        openings = {request.id: request.opening for request in requests}
        for rollout in self.engine.generate(prompts, self.sampling) if prompts else []:
            ids = list(rollout.response_ids)
            answer = self.renderer.tokenizer.decode(ids, skip_special_tokens=True)
            found[rollout.task_id] = Written(openings[rollout.task_id] + answer, rollout.finished)
        return [found[request.id] for request in requests]

    def _too_long(self, tokens: int) -> str:
        return (
            f"the prompt has {tokens} tokens, but {self.name} holds "
            f"{self.renderer.max_prompt_tokens} with an answer of {self.max_new_tokens}"
        )


def build_extractor(parts: Parts, experience: Experience) -> Extractor:
    """Whoever the run lets write.

    Raises:
        ModelError: another model cannot be loaded.
        ConfigError: the variable with an endpoint's key is not set.
    """
    config, most = parts.config, experience.max_new_tokens
    sampling = Sampling(experience.temperature, seed=f"{config.seed}/extract")
    match experience.extractor:
        case Student():
            holds = weights.positions(config.model.path, config.model.revision)
            renderer = replace(parts.renderer, max_prompt_tokens=holds)
            thinking = config.rendering.student_thinking
            name = config.model.path
            return ModelExtractor(name, parts.engine, renderer, sampling, most, thinking)
        case Local(path=path):
            engine, renderer = load_answering(path, config.model.device)
            return ModelExtractor(path, engine, renderer, sampling, most)
        case Endpoint() as endpoint:
            from opcd.endpoint import EndpointExtractor, read_key

            key = read_key(endpoint)
            return EndpointExtractor(endpoint, experience.temperature, most, config.seed, key)
        case unknown:
            assert_never(unknown)


def instructions_of(experience: Experience) -> Instructions:
    """How the extractor is asked.

    Raises:
        AuthoringError: the user's file is missing or malformed, or lacks a slot that is needed.
    """
    slots = ["trace"]
    slots += ["feedback"] if experience.feedback != "none" else []
    slots += ["previous"] if experience.with_previous else []
    return load_instructions("extract.md", slots, experience.instructions, SHIPPED)


def request_for(
    instructions: Instructions, trace: Trace, id_: str, step: int, previous: str = ""
) -> Request:
    """The prompt that asks for items from a trace."""
    slots = {
        "trace": trace_text(trace),
        "feedback": trace.feedback or UNKNOWN,
        "previous": previous.strip() or NO_ITEMS,
    }
    opening = instructions.openings[step % len(instructions.openings)]
    return Request(id_, tuple(instructions.fill(slots)), opening)


def items_of(answer: str, finished: bool = True) -> tuple[list[str], int]:
    """The items of an answer, and how many of its pieces are none.

    Thoughts do not count. The last line of an answer that was cut by the token limit is no item:
    nobody knows how it would have gone on.
    """
    text, unfinished_thought, _ = answer.rpartition("</think>")[2].partition("<think>")
    lines = text.split("\n")
    malformed = int(bool(unfinished_thought))
    if not finished and not unfinished_thought:
        malformed += bool(lines.pop().strip())
    items: list[str] = []
    for line in lines:
        before, *marked = line.split(MARK)
        malformed += bool(before.strip())
        for piece in marked:
            item = " ".join(piece.split())
            if words_of(item):
                items.append(item)
            else:
                malformed += 1
    return items, malformed


def settings_of(run: Run, experience: Experience) -> dict[str, object]:
    """All that an extractor's answers depend on, beside the traces."""
    found = experience.model_dump(mode="json")
    names = ["temperature", "max_new_tokens", "with_previous"]
    if experience.with_previous:
        names += ["max_tokens", "keep", "near_duplicate"]
    asked = instructions_of(experience)
    writer = {k: v for k, v in found["extractor"].items() if k in ("type", "path", "url", "model")}
    return {
        "seed": run.seed,
        "extractor": writer,
        "instructions": [*map(list, asked.turns), list(asked.openings)],
        **{name: found[name] for name in names},
    }
