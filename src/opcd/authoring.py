"""A model writes the user messages that a context is meant for: topics first, then messages.

The same model that is to be trained will do. Every draw is a function of the seed; what is
dropped is counted by reason. Knows how to ask; `opcd.screening` knows what to keep.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opcd.config.inputs import PER_ROW
from opcd.contexts import load_context, read_text
from opcd.errors import AuthoringError, OverLongError, RolloutError
from opcd.instructions import Instructions, load_instructions
from opcd.near_duplicates import near_duplicates
from opcd.rendering import Renderer
from opcd.rollouts.engine import Prompt, RolloutEngine, Sampling
from opcd.runs import write_text
from opcd.screening import Limits, Sieve, message_of, topics_of
from opcd.types import Message, Task

EXAMPLES_SHOWN = 3
TOPIC_TOKENS = 72
BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class Brief:
    """What is to be written for whom."""

    context: str
    examples: tuple[str, ...] = ()
    """Messages of real users, shown to the model (at most three) and never repeated."""
    count: int = 100
    seed: int = 0
    rounds: int = 6
    """At most so many times topics and messages are drawn."""
    limits: Limits = field(default_factory=Limits)
    temperature: float = 0.8
    top_p: float = 0.9


@dataclass(frozen=True, slots=True)
class Writer:
    """A model that writes, and its instructions."""

    name: str
    engine: RolloutEngine
    renderer: Renderer
    topics: Instructions
    messages: Instructions


@dataclass
class Authored:
    """The rows, and the fate of everything that was drawn."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0
    drawn: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Messages by reason."""
    topics: list[str] = field(default_factory=list)
    topic_lines: Counter[str] = field(default_factory=Counter)
    """Lines of topic lists: kept, repeated, malformed."""


def author(brief: Brief, writer: Writer, say: Callable[[str], None] | None = None) -> Authored:
    """Draw topics and messages until there are enough, or the rounds are over.

    Args:
        brief: what is to be written.
        writer: the model that writes it.
        say: told after each round how far it is.

    Raises:
        OverLongError: the context does not fit into the model behind the instructions.
        RolloutError: not one message could be kept.
    """
    writer.engine.use("base", 0)
    demonstrations = [message_of(text) for text in writer.messages.demonstrations]
    sieve = Sieve(brief.context, [*brief.examples, *demonstrations], brief.limits)
    found = Authored()
    while len(found.rows) < brief.count and found.rounds < brief.rounds:
        missing = brief.count - len(found.rows)
        new = _draw_topics(brief, writer, found, lists=max(4, missing // 8))
        found.rounds += 1
        if topics := new or found.topics:
            _draw_messages(brief, writer, found, sieve, topics, draws=max(16, 2 * missing))
        if say:
            say(
                f"round {found.rounds}: {len(found.rows)} of {brief.count} messages, "
                f"{len(found.topics)} topics"
            )
    if not found.rows:
        raise RolloutError(
            f"none of {found.drawn} messages on {len(found.topics)} topics could be kept "
            f"({describe(found.dropped)}); use a larger model, give --examples, or change the "
            "instructions"
        )
    return found


def describe(counts: Counter[str]) -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSONL, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse to replace a file unasked, before any work is done.

    Raises:
        AuthoringError: the file exists, or its folder does not.
    """
    if path.exists() and (not overwrite or not path.is_file()):
        raise AuthoringError(
            f"{path} exists, and rows never overwrite others by themselves; replace the file with "
            "--overwrite, or give --out another name"
        )
    if not path.parent.is_dir():
        raise AuthoringError(f"--out {path}: there is no folder {path.parent}; make it first")


def read_brief(path: Path) -> tuple[str, tuple[str, ...], str | None]:
    """The context of a text file or of a run's TOML, its example messages, and the run's model.

    Raises:
        InputError: the file is missing or malformed, or each row of the run has its own context.
    """
    if path.suffix != ".toml":
        return read_text(path), (), None
    from opcd.config import load_config

    run = load_config(path)
    if run.context.type in PER_ROW:
        raise AuthoringError(
            f"{path.name}: context.type is {run.context.type}, so there is no one context to write "
            "for; give a text file with a context of the kind"
        )
    context = load_context(run.context, Task("context", ()))
    document = "" if context.user_template == "{prompt}" else context.user_template
    examples = tuple(m.content for m in context.examples if m.role == "user")
    answers = "\n".join(m.content for m in context.examples if m.role == "assistant")
    text = "\n\n".join(part for part in (context.system, document) if part)
    return text or f"Answers as these:\n{answers}", examples, run.model.path


def read_messages(path: Path) -> tuple[str, ...]:
    """The `prompt` of each line of a JSONL file.

    Raises:
        AuthoringError: a line has none, or the file is missing.
    """
    if not path.is_file():
        raise AuthoringError(f"--examples {path}: there is no such file; correct the path")
    messages: list[str] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str) or not prompt.strip():
                raise TypeError("prompt must be a text")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise AuthoringError(
                f'{path.name}, line {number}: not a message ({error!r}); write {{"prompt": "..."}}'
            ) from error
        messages.append(prompt)
    return tuple(messages)


def load_writer(path: str, device: str, instructions: Path | None) -> Writer:
    """A model by its path, with the instructions of a folder, or the shipped ones.

    Raises:
        ModelError: the model cannot be loaded.
        AuthoringError: the instructions are malformed.
    """
    topics = load_instructions("topics.md", ["context"], instructions)
    messages = load_instructions("messages.md", ["context", "topic"], instructions)
    engine, renderer = load_answering(path, device)
    return Writer(path, engine, renderer, topics, messages)


def load_answering(path: str, device: str) -> tuple[RolloutEngine, Renderer]:
    """A model as it is, to be asked; its renderer lets a prompt take all that the model holds.

    Raises:
        ModelError: the model cannot be loaded.
    """
    import torch

    from opcd import weights
    from opcd.assembly import end_ids
    from opcd.config.training import Rendering
    from opcd.rollouts.hf import HFEngine

    best = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(best if device == "auto" else device)
    dtype = weights.auto_dtype("auto", place)
    tokenizer = weights.load_tokenizer(path)
    model = weights.load_model(path, dtype).to(place)
    engine = HFEngine(model, model, dtype, end_ids(model, tokenizer), BATCH_ROWS)
    return engine, Renderer(tokenizer, Rendering(), weights.positions(path))


def _draw_topics(brief: Brief, writer: Writer, found: Authored, lists: int) -> list[str]:
    """New topics from some lists; their lines are counted."""
    turns = writer.topics.fill({"context": brief.context})
    asked = [(f"topics-{found.rounds}-{n}", turns, n) for n in range(lists)]
    new: list[str] = []
    for answer, finished in _ask(brief, writer, writer.topics, asked, TOPIC_TOKENS):
        items, malformed = topics_of(answer, finished)
        found.topic_lines["malformed"] += malformed
        new += items
    known = found.topics
    distinct = near_duplicates([*known, *new], brief.limits.near_duplicate).kept[len(known) :]
    fresh = [new[index - len(known)] for index in distinct]
    found.topic_lines["kept"] += len(fresh)
    found.topic_lines["repeated"] += len(new) - len(fresh)
    found.topics += fresh
    return fresh


def _draw_messages(
    brief: Brief, writer: Writer, found: Authored, sieve: Sieve, topics: list[str], draws: int
) -> None:
    """Messages on these topics in turn, until there are enough rows; all draws are counted."""
    chosen = [topics[n % len(topics)] for n in range(draws)]
    start = found.drawn
    asked: list[tuple[str, list[Message], int]] = []
    for number, topic in enumerate(chosen, start=start):
        slots = {"context": brief.context, "topic": topic}
        turns = writer.messages.fill(slots, brief.examples[:EXAMPLES_SHOWN])
        asked.append((f"message-{number}", turns, number))
    answers = _ask(brief, writer, writer.messages, asked, 2 * brief.limits.max_words)
    for number, (answer, finished) in enumerate(answers, start=start):
        found.drawn += 1
        reason = sieve.drop(answer, finished)
        if reason is None and len(found.rows) == brief.count:
            reason = "more than asked for"
        if reason:
            found.dropped[reason] += 1
            continue
        found.rows.append(
            {
                "id": f"prompt-{brief.seed}-{len(found.rows):05d}",
                "prompt": sieve.kept[-1],
                "source": {
                    "model": writer.name,
                    "topic": chosen[number - start],
                    "seed": brief.seed,
                    "draw": number,
                },
            }
        )


def _ask(
    brief: Brief,
    writer: Writer,
    instructions: Instructions,
    asked: Sequence[tuple[str, list[Message], int]],
    max_new_tokens: int,
) -> Iterator[tuple[str, bool]]:
    """The answers, each with its opening, and whether the model ended them itself."""
    sampling = Sampling(brief.temperature, brief.top_p, str(brief.seed))
    openings = instructions.openings
    prompts: list[Prompt] = []
    for task_id, turns, number in asked:
        text = writer.renderer.text(turns) + openings[number % len(openings)]
        ids = writer.renderer.encode(text)
        if len(ids) + max_new_tokens > writer.renderer.max_prompt_tokens:
            raise OverLongError(
                f"the context and the instructions have {len(ids)} tokens, but {writer.name} holds "
                f"{writer.renderer.max_prompt_tokens} with the answer; shorten the context, or "
                "use a model that holds more"
            )
        prompts.append(Prompt(task_id, ids, max_new_tokens))
    for rollout, (_, _, number) in zip(
        writer.engine.generate(prompts, sampling), asked, strict=True
    ):
        answer = writer.renderer.tokenizer.decode(
            list(rollout.response_ids), skip_special_tokens=True
        )
        yield openings[number % len(openings)] + answer, rollout.finished
