"""`opcd.authoring`: rows with their origin, every draw counted, the rounds that end it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from opcd.authoring import (
    Brief,
    Writer,
    author,
    check_output,
    load_writer,
    read_brief,
    read_messages,
    write_rows,
)
from opcd.config.training import Rendering
from opcd.errors import AuthoringError, ContextError, OverLongError, RolloutError
from opcd.instructions import parse_instructions
from opcd.rendering import Renderer
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.scripted import ScriptedEngine
from opcd.tasks import read_row
from opcd.types import Message, Rollout
from worlds import CHATML, END_ID, tokenizer, write_jsonl, write_run

TOKENIZER = tokenizer(CHATML)
TOPICS = parse_instructions("### user\n{context}\n### assistant\n1.", "t", ["context"])
MESSAGES = parse_instructions(
    "### each example, user\nwrite\n### each example, assistant\n{example}\n"
    "### user\n{context} {topic}\n### assistant\nMy\nYour",
    "m",
    ["context", "topic"],
)
SENTENCES = (" kettle has gone cold", " parcel came late today", " lamp is too bright for me")


def writer_of(answers: Any, positions: int = 512) -> Writer:
    """A writer whose answer to a task id comes from a function."""

    def script(policy: str, prompt: Prompt) -> list[int]:
        del policy
        return [*TOKENIZER.encode(answers(prompt), add_special_tokens=False), END_ID]

    renderer = Renderer(TOKENIZER, Rendering(), positions)
    return Writer("tiny", ScriptedEngine(script), renderer, TOPICS, MESSAGES)


def sentences(prompt: Prompt) -> str:
    """Two topics a list; messages of three kinds, so that most repeat each other."""
    if prompt.task_id.startswith("topics"):
        return " a late parcel\n2. a thank-you\nand so on"
    return SENTENCES[int(prompt.task_id.split("-")[1]) % 3]


def numbered(prompt: Prompt) -> str:
    """No two messages alike."""
    if prompt.task_id.startswith("topics"):
        return sentences(prompt)
    number = int(prompt.task_id.split("-")[1])
    return "".join(f" {word}{number}" for word in "abcd")


def test_rows_say_where_they_come_from() -> None:
    found = author(Brief("Desk.", count=5, seed=7), writer_of(numbered))
    assert [row["id"] for row in found.rows] == [f"prompt-7-{n:05d}" for n in range(5)]
    assert found.rows[1] == {
        "id": "prompt-7-00001",
        "prompt": "Your a1 b1 c1 d1",
        "source": {"model": "tiny", "topic": "a thank-you", "seed": 7, "draw": 1},
    }
    assert found.dropped == {"more than asked for": 11}


def test_every_draw_is_counted_once() -> None:
    """Three sentences under two openings, which are near duplicates of each other."""
    found = author(Brief("Desk.", count=40, rounds=3), writer_of(sentences))
    assert (len(found.rows), found.rounds) == (3, 3)
    assert found.drawn == len(found.rows) + found.dropped.total()
    assert set(found.dropped) == {"exact duplicate", "near duplicate"}
    assert found.topics == ["a late parcel", "a thank-you"]
    # 5 lists, then 4 and 4: in all 13 with two topics and one line that is none.
    assert found.topic_lines == {"kept": 2, "repeated": 24, "malformed": 13}


def test_no_draw_is_made_twice() -> None:
    """A later round must not ask with the ids of an earlier one: it would get the same answers."""
    writer = writer_of(sentences)
    author(Brief("Desk.", count=40, rounds=3), writer)
    assert isinstance(writer.engine, ScriptedEngine)
    ids = [task_id for _, task_id in writer.engine.asked]
    assert len(ids) == len(set(ids))


def test_it_stops_as_soon_as_there_are_enough() -> None:
    found = author(Brief("Desk.", count=2), writer_of(numbered))
    assert (len(found.rows), found.rounds) == (2, 1)


def test_nothing_kept_is_an_error_that_says_why() -> None:
    def refuse(prompt: Prompt) -> str:
        return sentences(prompt) if prompt.task_id.startswith("topics") else " " + "x " * 200

    with pytest.raises(RolloutError, match=r"none of 32 messages on 2 topics .*32 cut by the tok"):
        author(Brief("Desk.", count=8, rounds=2), writer_of(refuse))


def test_without_topics_nothing_is_asked_for() -> None:
    with pytest.raises(RolloutError, match="none of 0 messages on 0 topics could be kept"):
        author(Brief("Desk.", rounds=2), writer_of(lambda prompt: ""))


def test_messages_may_not_repeat_an_example() -> None:
    brief = Brief("Desk.", examples=("My kettle has gone cold",), count=6, rounds=1)
    found = author(brief, writer_of(sentences))
    assert "My kettle has gone cold" not in [row["prompt"] for row in found.rows]
    assert found.dropped["repeats an example"]


def test_three_examples_are_shown() -> None:
    texts: list[str] = []

    def watched(prompt: Prompt) -> str:
        texts.append(TOKENIZER.decode(list(prompt.ids)))
        return sentences(prompt)

    examples = tuple(f"example number {n}" for n in range(5))
    author(Brief("Desk.", examples, count=1, rounds=1), writer_of(watched))
    assert all(f"example number {n}" in texts[-1] for n in range(3))
    assert "example number 3" not in texts[-1]


def test_a_context_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverLongError, match="tokens, but tiny holds 512 with the answer"):
        author(Brief("Desk. " * 600), writer_of(sentences))


def test_the_seed_decides_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, seeds = writer_of(numbered), list[str]()
    generate = writer.engine.generate

    def watched(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        seeds.append(sampling.seed)
        return generate(prompts, sampling)

    monkeypatch.setattr(writer.engine, "generate", watched)
    author(Brief("Desk.", count=1, seed=5), writer)
    assert seeds == ["5", "5"]


def test_a_real_model_can_be_the_writer(tiny_model_path: Path) -> None:
    """With its own engine and template: what it writes is seeded, and ends where it should."""
    writer = load_writer(str(tiny_model_path), "cpu", None)
    writer.engine.use("base", 0)
    ids = writer.renderer.encode(writer.renderer.text([Message("user", "Tea?")]))
    asked = [Prompt(f"message-{n}", ids, 30) for n in range(8)]
    first, again, other = (
        writer.engine.generate(asked, Sampling(1.0, 0.9, seed)) for seed in ("1", "1", "2")
    )
    assert first == again and first != other
    ends = [rollout.response_ids[-1] == END_ID for rollout in (*first, *other)]
    assert ends == [rollout.finished for rollout in (*first, *other)]


def test_a_brief_is_a_text_or_the_context_of_a_run(tmp_path: Path) -> None:
    toml = write_run(tmp_path / "recipe")
    text = "Answer with one lower-case word."
    assert read_brief(toml.parent / "system.md") == (text, (), None)
    assert read_brief(toml) == (text, (), "smollm2-135m")


def test_a_runs_examples_are_example_messages(tmp_path: Path) -> None:
    toml = write_run(tmp_path / "recipe")
    write_jsonl(toml.parent / "shown.jsonl", [{"prompt": "Tea?", "response": "yes"}])
    text = toml.read_text().replace('"system_prompt"', '"examples"')
    toml.write_text(text.replace('"system.md"', '"shown.jsonl"'), encoding="utf-8")
    context, examples, _ = read_brief(toml)
    assert (context, examples) == ("Answers as these:\nyes", ("Tea?",))


def test_a_run_whose_rows_bring_their_own_context_has_none_to_write_for(tmp_path: Path) -> None:
    toml = write_run(tmp_path / "recipe")
    text = toml.read_text().replace('"system_prompt"\npath = "system.md"', '"column"')
    toml.write_text(text, encoding="utf-8")
    with pytest.raises(AuthoringError, match="there is no one context to write for"):
        read_brief(toml)


def test_a_missing_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="is missing"):
        read_brief(tmp_path / "none.md")


@pytest.mark.parametrize("line", ["hello", '{"text": "x"}', '{"prompt": " "}', "[1]"])
def test_a_malformed_example_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(AuthoringError, match=r"examples\.jsonl, line 3: not a message"):
        read_messages(path)


def test_a_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "mine"}])
    with pytest.raises(AuthoringError, match="rows never overwrite others"):
        check_output(path, overwrite=False)
    check_output(path, overwrite=True)
    with pytest.raises(AuthoringError, match="there is no folder"):
        check_output(tmp_path / "none" / "rows.jsonl", overwrite=False)


def test_written_rows_are_task_rows(tmp_path: Path) -> None:
    """`source` is a key that tasks do not know; it must not stand in their way."""
    found = author(Brief("Desk.", count=3), writer_of(numbered))
    write_rows(tmp_path / "rows.jsonl", found.rows)
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = [read_row(json.loads(line), "unused", "rows.jsonl", None) for line in lines]
    assert [task.id for task in tasks] == ["prompt-0-00000", "prompt-0-00001", "prompt-0-00002"]
    assert tasks[0].messages[0].content == "My a0 b0 c0 d0"
