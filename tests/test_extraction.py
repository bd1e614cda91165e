"""Extraction: what counts as an item, how it is asked for, and who writes it."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learning import EXTRACT, learner, load_learner
from opcd.assembly import assemble
from opcd.config.experience import Experience, Local
from opcd.errors import AuthoringError, ModelError
from opcd.extraction import (
    MARK,
    ModelExtractor,
    Request,
    build_extractor,
    instructions_of,
    items_of,
    request_for,
)
from opcd.instructions import parse_instructions
from opcd.rollouts.scripted import ScriptedEngine
from opcd.traces import Trace
from opcd.types import Message
from worlds import END_ID, tokenizer

TRACE = Trace("t", (Message("user", "1+1?"),), "3", feedback="The answer is wrong.")

# --- items


@pytest.mark.parametrize(
    ("answer", "items", "malformed"),
    [
        (f"{MARK} heat the pan", ["heat the pan"], 0),
        (f"{MARK} a\n{MARK} b\n", ["a", "b"], 0),
        (f"{MARK} a {MARK} b", ["a", "b"], 0),
        (f"Sure!\n\n{MARK} a\nHope it helps.", ["a"], 2),
        (f"1. {MARK} a", ["a"], 1),
        (f"{MARK}\n{MARK} ...", [], 2),
        (f"{MARK} a   b\t c \r", ["a b c"], 0),
        ("- a\n* b", [], 2),
        ("", [], 0),
        (f"{MARK} draft\nhm</think>\n{MARK} final", ["final"], 0),
        (f"<think>{MARK} one</think>{MARK} two</think>{MARK} three", ["three"], 0),
        (f"{MARK} a\n<think>{MARK} draft\nand on", ["a"], 1),
        (f"{MARK} a\u2028b", ["a b"], 0),
    ],
)
def test_an_item_is_a_marked_line(answer: str, items: list[str], malformed: int) -> None:
    assert items_of(answer) == (items, malformed)


@pytest.mark.parametrize(
    ("answer", "items", "malformed"),
    [
        (f"{MARK} a\n{MARK} b and so", ["a"], 1),
        (f"{MARK} a\n{MARK} b\n", ["a", "b"], 0),
        (f"{MARK} a", [], 1),
        (f"<think>{MARK} still at it", [], 1),
    ],
)
def test_a_cut_answer_loses_its_last_line(answer: str, items: list[str], malformed: int) -> None:
    assert items_of(answer, finished=False) == (items, malformed)


words = st.text(alphabet="abc XYZ.,:-", min_size=1, max_size=20).filter(
    lambda text: any(c.isalpha() for c in text)
)


@given(st.lists(st.tuples(words, st.booleans()), max_size=6))
def test_every_item_that_was_marked_is_found(pieces: list[tuple[str, bool]]) -> None:
    """Whether it has a line of its own or follows another."""
    answer = ""
    for text, on_its_own in pieces:
        answer += f"\n{MARK}{text}" if on_its_own else f"{MARK} {text}"
    assert items_of(answer) == ([" ".join(text.split()) for text, _ in pieces], 0)


pieces = st.sampled_from([*"- abEXPRINCTM:\n</>", MARK, "</think>", "<think>"])


@given(st.lists(pieces, max_size=20).map("".join))
def test_nothing_a_model_writes_is_a_crash(answer: str) -> None:
    """Items are lines of the answer, nothing is counted twice, nothing disappears silently."""
    for finished in (True, False):
        items, malformed = items_of(answer, finished)
        for item in items:
            assert item == " ".join(item.split()) and "\n" not in item and MARK not in item
        after = answer.rpartition("</think>")[2]
        assert len(items) <= after.count(MARK)
        assert bool(items or malformed) == bool(after.strip())


# --- asking


def test_the_prompt_holds_trace_feedback_and_items_so_far() -> None:
    asked = parse_instructions(EXTRACT, "extract.md", ["trace"])
    request = request_for(asked, TRACE, "id", 1, "- one\n- two\n")
    text = request.messages[-1].content
    assert "User:\n1+1?\n\nAssistant:\n3 It went: The answer is wrong. So far: - one\n- two" in text
    assert request.opening == MARK


def test_what_is_not_known_is_said_in_words() -> None:
    asked = parse_instructions(EXTRACT, "extract.md", ["trace"])
    text = request_for(asked, replace(TRACE, feedback=""), "id", 1).messages[-1].content
    assert "It went: Nothing is known of how it went. So far: None." in text


def test_a_trace_with_slots_in_it_is_text() -> None:
    asked = parse_instructions(EXTRACT, "extract.md", ["trace"])
    trace = replace(TRACE, response="{feedback} {previous}")
    assert "{feedback} {previous}" in request_for(asked, trace, "id", 1).messages[-1].content


def test_the_shipped_instructions_show_items_that_are_well_formed() -> None:
    shipped = instructions_of(Experience(with_previous=True))
    assert shipped.demonstrations
    for text in shipped.demonstrations:
        items, malformed = items_of(text)
        assert 1 <= len(items) <= 2 and malformed == 0


@pytest.mark.parametrize(
    ("missing", "table"),
    [("trace", {"feedback": "none"}), ("feedback", {}), ("previous", {"with_previous": True})],
)
def test_own_instructions_need_the_slots_that_are_used(
    tmp_path: Path, missing: str, table: dict[str, object]
) -> None:
    slots = [f"{{{name}}}" for name in ("trace", "feedback", "previous") if name != missing]
    (tmp_path / "extract.md").write_text("### user\n" + " ".join(slots), encoding="utf-8")
    experience = Experience.model_validate({"instructions": tmp_path, **table})
    with pytest.raises(AuthoringError, match=f"lacks .{missing}."):
        instructions_of(experience)


def test_a_missing_file_says_which_to_copy(tmp_path: Path) -> None:
    with pytest.raises(AuthoringError, match=r"extract.md cannot be read .*experience_prompts"):
        instructions_of(Experience(instructions=tmp_path))


# --- who writes


def test_the_student_writes_as_the_base_and_openings_are_part_of_it(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    round_ = learner(load_learner(tmp_path, tiny_model_path), lambda id_: f" of {id_}")
    engine = round_.parts.engine
    assert isinstance(engine, ScriptedEngine)
    engine.use("student", 3)
    requests = [Request(f"{n}/items", (Message("user", "?"),), MARK) for n in (1, 2)]
    written = build_extractor(round_.parts, round_.experience).write(requests)
    assert [items_of(w.text, w.finished) for w in written] == [(["of 1"], 0), (["of 2"], 0)]
    assert [policy for policy, _ in engine.asked] == ["base", "base"]


def test_a_prompt_that_does_not_fit_is_not_asked_and_says_so(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """Never cut: half a trace would teach something else."""
    round_ = learner(load_learner(tmp_path, tiny_model_path))
    extractor = build_extractor(round_.parts, round_.experience)
    long, short = "word " * 400, "word"
    requests = [
        Request(f"round-1/seed-{i}/step-1/items", (Message("user", text),))
        for i, text in enumerate((long, short))
    ]
    first, second = extractor.write(requests)
    assert "holds 512 with an answer of 120" in first.skipped and not first.text
    assert not second.skipped and second.text
    assert extractor.write(requests[:1]) == [first]


def test_another_local_model_writes(tiny_model_path: Path, tmp_path: Path) -> None:
    """A real one: its answers are its own, and a draw is a function of the request's id."""
    run = load_learner(tmp_path, tiny_model_path, "experience.max_new_tokens=6")
    round_ = learner(run)
    table = round_.experience.model_copy(update={"extractor": Local(path=str(tiny_model_path))})
    extractor = build_extractor(round_.parts, table)
    requests = [Request(f"{n}", (Message("user", "?"),)) for n in range(3)]
    together = extractor.write(requests)
    assert extractor.name == str(tiny_model_path)
    assert [extractor.write([request])[0] for request in requests] == together
    assert len({written.text for written in together}) == 3


def test_a_local_model_that_is_not_there_is_named(tiny_model_path: Path, tmp_path: Path) -> None:
    round_ = learner(load_learner(tmp_path, tiny_model_path))
    table = round_.experience.model_copy(update={"extractor": Local(path=str(tmp_path / "no"))})
    with pytest.raises(ModelError, match="no"):
        build_extractor(round_.parts, table)


def test_an_answer_at_the_limit_is_known_as_cut(tiny_model_path: Path, tmp_path: Path) -> None:
    parts = assemble(load_learner(tmp_path, tiny_model_path))
    ids = (*tokenizer().encode("a b c d e f"), END_ID)
    for most, finished in ((len(ids), True), (len(ids) - 1, False)):
        engine = ScriptedEngine(lambda *_: ids)
        extractor = ModelExtractor("m", engine, parts.renderer, None, most)  # type: ignore[arg-type]
        assert extractor.write([Request("r", (Message("user", "?"),))])[0].finished is finished
