"""The trajectory store: what was written is read back, others' rows are taken, torn ones mended."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.errors import TraceError
from opcd.tasks import read_row
from opcd.traces import Trace, Turn, append_traces, read_traces, saved_prefixes, trace_text
from opcd.types import Message

USER = (Message("user", "1+1?"),)
LATER = (Message("user", "board, up, board"),)
WHOLE = Trace(
    id="round-1/seed-0/step-2",
    problem="extraction-00003",
    prompt=LATER,
    response="down",
    turns=(Turn(USER, "up"), Turn(LATER, "down")),
    outcome=0.0,
    feedback="You fell into H: lost.",
    model="tiny",
    round=1,
    seed=0,
    step=2,
    cut=True,
)

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
said = texts.filter(str.strip)
prompts = said.map(lambda text: (Message("user", text),))
traces = st.builds(
    Trace,
    id=said,
    prompt=prompts,
    response=texts,
    problem=texts,
    turns=st.lists(st.builds(Turn, prompts, texts), max_size=2).map(tuple),
    outcome=st.none() | st.floats(0, 1),
    feedback=texts,
    model=texts,
    seed=st.none() | st.integers(0, 9),
    cut=st.booleans(),
)


@given(st.lists(traces, max_size=4, unique_by=lambda trace: trace.id))
def test_what_was_appended_is_read_back(tmp_path_factory: pytest.TempPathFactory, wrote) -> None:  # type: ignore[no-untyped-def]
    """Whatever the texts hold: line separators, quotes, other scripts."""
    path = tmp_path_factory.mktemp("store") / "traces.jsonl"
    append_traces(path, wrote[:2])
    append_traces(path, wrote[2:])
    assert read_traces(path) == wrote


def test_no_store_is_an_empty_one(tmp_path: Path) -> None:
    assert read_traces(tmp_path / "none.jsonl") == []


def test_a_service_needs_to_write_two_keys(tmp_path: Path) -> None:
    """A text for the prompt will do, keys that we do not know are its own affair."""
    path = tmp_path / "traces.jsonl"
    rows = [{"prompt": "1+1?", "response": "2", "user": 7}, {"prompt": "2?", "response": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, second = read_traces(path)
    assert first == Trace("line-1", USER, "2")
    assert (second.id, second.seed, second.outcome) == ("line-2", None, None)


def test_a_line_that_a_crash_cut_off_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    append_traces(path, [WHOLE])
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "2?", "resp')
    assert read_traces(path) == [WHOLE]
    other = Trace("b", USER, "2")
    append_traces(path, [other])
    assert read_traces(path) == [WHOLE, other]


def test_a_last_line_without_its_end_is_no_torn_one(tmp_path: Path) -> None:
    """Editors and json.dump leave files like that; the row must not be lost, nor glued to ours."""
    path = tmp_path / "traces.jsonl"
    path.write_text('{"prompt": "1+1?", "response": "2"}', encoding="utf-8")
    assert len(read_traces(path)) == 1
    append_traces(path, [WHOLE])
    assert read_traces(path) == [Trace("line-1", USER, "2"), WHOLE]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: no trace, since there is no prompt"),
        ('{"response": "2"}', "there is no prompt; write {"),
        ('{"prompt": "1?"}', "response is no text; write {"),
        ('{"prompt": "1?", "response": null}', "response is no text"),
        ('{"prompt": [{"role": "user"}], "response": "2"}', "neither a text nor a list"),
        ('{"prompt": "1?", "response": "2", "outcome": "won"}', "outcome is 'won'; write a int or"),
        ('{"prompt": "1?", "response": "2", "outcome": NaN}', "outcome is nan; write a number"),
        ('{"prompt": "1?", "response": "2", "seed": "a"}', "seed is 'a'; write a int"),
        ('{"prompt": "1?", "response": "2", "cut": 1}', "cut is 1; write a bool"),
        ('{"prompt": "1?", "response": "2", "turns": 3}', "turns is a int; write a list"),
        ('{"prompt": "1?", "response": "2", "turns": [{}]}', "line 1, turn 1: no trace"),
    ],
)
def test_a_malformed_row_names_its_line_and_what_to_write(
    tmp_path: Path, row: str, message: str
) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text(row + '\n{"prompt": "2?", "response": "2"}\n', encoding="utf-8")
    with pytest.raises(TraceError) as caught:
        read_traces(path)
    assert "traces.jsonl, line 1" in str(caught.value) and message in str(caught.value)


def test_two_traces_of_one_id_are_refused(tmp_path: Path) -> None:
    """Items name the trace they come from."""
    path = tmp_path / "traces.jsonl"
    append_traces(path, [WHOLE, WHOLE])
    with pytest.raises(TraceError, match=r"line 2: a second trace"):
        read_traces(path)


def test_a_trace_reads_as_a_conversation() -> None:
    system = Message("system", "Be brief.")
    trace = Trace("a", (system, *USER), " 2 ")
    assert trace_text(trace) == "System:\nBe brief.\n\nUser:\n1+1?\n\nAssistant:\n2"


def test_the_last_turn_of_a_game_tells_it_all() -> None:
    assert trace_text(WHOLE) == "User:\nboard, up, board\n\nAssistant:\ndown"


def test_every_prompt_of_every_turn_is_a_prefix_to_train_on_once() -> None:
    same = Trace("again", USER, "another answer")
    rows = saved_prefixes([WHOLE, same])
    tasks = [read_row(row, "x", "row", None) for row in rows]
    assert [task.messages for task in tasks] == [USER, LATER]
    assert len({task.id for task in tasks}) == 2


def test_a_store_with_nothing_in_it_cannot_be_trained_on() -> None:
    with pytest.raises(TraceError, match=r"train_on = .store. but .* run opcd solve"):
        saved_prefixes([])
