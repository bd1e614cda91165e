"""The stages of a round: what they write, what they do not do twice, and any interruption."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from learning import GAME, asked_of, learner, load_learner, script_of
from opcd import gathering, solving
from opcd.assembly import assemble
from opcd.config import Run
from opcd.errors import ConfigError, RunFolderError, TraceError
from opcd.experience import items_in
from opcd.gathering import (
    Gathering,
    check_experience,
    gather,
    gather_traces,
    open_round,
)
from opcd.learning_tables import count_answers, count_items, count_traces
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.scripted import ScriptedEngine
from opcd.runs import read_jsonl, round_folder
from opcd.traces import Trace, append_traces
from opcd.types import Message, Rollout
from worlds import tokenizer

MIXED = (
    " heat the pan before the oil\n- EXPERIENCE ITEM: read it twice",
    " heat the pan before the oil\nHope this helps!",
    " count again\n- EXPERIENCE ITEM:\n",
    " write every single step of the work down before you give the answer to anybody at all "
    "and then read it all again from the start to the end to see what may be missing from it",
    "",
    " read it twice - EXPERIENCE ITEM: look at the units",
)


def mixed(place: str) -> str:
    """Good items, repeated ones, malformed ones, and one that is cut."""
    return MIXED[sum(map(int, place[-1:] + place[13])) % len(MIXED)]


def files_of(run: Run) -> dict[str, str]:
    root = run.out / run.name
    return {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


class Killed(BaseException):
    """As a signal: nothing catches it."""


# --- what is there afterwards


def test_a_round_leaves_traces_items_and_every_experience(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    run = load_learner(tmp_path, tiny_model_path)
    found = gather(learner(run))
    experiences = [f"experience-{n:03d}.md" for n in range(4)]
    seeds = [
        f"experience/round-1/seed-{seed}/{name}"
        for seed in (0, 1)
        for name in ("answers.jsonl", *experiences, "items.jsonl", "raw.md")
    ]
    others = [f"experience/round-1/{name}" for name in ("settings.json", "traces.jsonl")]
    assert sorted(files_of(run)) == sorted([*others, *seeds])
    for seed, grown in enumerate(found):
        files = learner(run).folder.experiences(seed)
        assert [path.read_text(encoding="utf-8") for path in files] == grown.texts
        assert [len(items_in(text)) for text in grown.texts] == [0, 1, 2, 3]
    (item, *_) = read_jsonl(learner(run).folder.items(1))
    assert item == {
        "text": "of seed1 step1",
        "trace": "round-1/seed-1/step-1",
        "model": str(tiny_model_path),
        "step": 1,
        "tokens": item["tokens"],
        "outcome": 1.0,
        "kept": True,
        "reason": "",
        "left_at": None,
    }


def test_raw_traces_hold_to_the_same_budget(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path, "experience.max_tokens=120")
    round_ = learner(run)
    gather(round_)
    for seed, traces in enumerate(gather_traces(round_)):
        raw = round_.folder.raw(seed).read_text(encoding="utf-8")
        assert 0 < round_.count_tokens(raw) <= 120
        assert "Assistant:\nright\n\nThe answer is right." in raw and "Assistant:\nwrong" in raw
        assert traces[-1].prompt[0].content in raw and traces[0].prompt[0].content not in raw


def test_nothing_fits_is_said(tiny_model_path: Path, tmp_path: Path) -> None:
    round_ = learner(load_learner(tmp_path, tiny_model_path, "experience.max_tokens=3"))
    found = gather(round_)
    assert [grown.text for grown in found] == ["", ""]
    assert "no trace of seed 0 fits" in round_.notes[0] and "raw.md is empty" in round_.notes[1]


# --- interruptions


def die_while_writing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have everything that writes die when so many writes are done, half a line being out."""
    left = [0]

    def guarded(real: Callable[..., Any], appends: bool) -> Callable[..., None]:
        def write(path: Path, *rest: Any) -> None:
            if left[0]:
                left[0] -= 1
                real(path, *rest)
                return
            if appends:
                with path.open("a", encoding="utf-8") as stream:
                    stream.write('{"step": 1, "trace": "rou')
            raise Killed

        return write

    for module, name in (
        (solving, "append_traces"),
        (gathering, "append_jsonl"),
        (gathering, "write_text"),
        (gathering, "write_json"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, guarded(real, name.startswith("append")))
    return left


@pytest.mark.parametrize("with_previous", ["true", "false"])
def test_killed_at_any_write_the_files_come_out_the_same(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_previous: str
) -> None:
    """Each process gets one write further than the one before it, and leaves it half done."""
    extra = (f"experience.with_previous={with_previous}", "experience.max_tokens=60")
    whole = load_learner(tmp_path, tiny_model_path, *extra, "name=whole")
    gather(learner(whole, mixed))
    run = load_learner(tmp_path, tiny_model_path, *extra, "name=killed", "rollout.batch_rows=2")
    parts = assemble(run)
    parts.engine = ScriptedEngine(script_of(mixed))
    left = die_while_writing(monkeypatch)
    for deaths in range(30):
        left[0] = 1 + deaths % 3 if deaths < 29 else 1000
        with suppress(Killed):
            gather(Gathering(parts, round_folder(run)))
    assert left[0] > 0
    assert files_of(run) == files_of(whole)


def test_what_is_done_is_not_asked_again(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path)
    gather(learner(run, mixed))
    before = files_of(run)
    again = learner(run, mixed)
    gather(again)
    assert asked_of(again.parts) == []
    assert files_of(run) == before


def test_more_steps_go_on_where_the_fewer_ended(tiny_model_path: Path, tmp_path: Path) -> None:
    few = load_learner(tmp_path, tiny_model_path, "experience.steps=2")
    gather(learner(few, mixed))
    more = load_learner(tmp_path, tiny_model_path, "experience.steps=5", "experience.seeds=3")
    round_ = learner(more, mixed)
    gather(round_)
    assert len(asked_of(round_.parts)) == 2 * (2 * 3 + 5)
    at_once = load_learner(
        tmp_path, tiny_model_path, "experience.steps=5", "experience.seeds=3", "name=at_once"
    )
    gather(learner(at_once, mixed))
    ours, theirs = files_of(more), files_of(at_once)
    store = "experience/round-1/traces.jsonl"
    assert sorted(ours.pop(store).split("\n")) == sorted(theirs.pop(store).split("\n"))
    assert ours == theirs


def test_fewer_steps_or_seeds_leave_no_other_experience_behind(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """They would be taken for candidates; what was extracted is kept."""
    gather(learner(load_learner(tmp_path, tiny_model_path)))
    few = ("experience.steps=1", "experience.seeds=1")
    round_ = learner(load_learner(tmp_path, tiny_model_path, *few))
    gather(round_)
    assert [path.name for path in round_.folder.experiences(0)] == [
        "experience-000.md",
        "experience-001.md",
    ]
    assert round_.folder.experiences(1) == [] and round_.folder.answers(1).is_file()


def test_another_budget_needs_no_model(tiny_model_path: Path, tmp_path: Path) -> None:
    """Items are computed from answers that are kept."""
    gather(learner(load_learner(tmp_path, tiny_model_path), mixed))
    round_ = learner(load_learner(tmp_path, tiny_model_path, "experience.max_tokens=20"), mixed)
    found = gather(round_)
    assert asked_of(round_.parts) == []
    assert all(round_.count_tokens(text) <= 20 for grown in found for text in grown.texts)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experience.feedback=answer", "solving .*experience.feedback: 'outcome' -> 'answer'"),
        ("rollout.temperature=0.9", "solving .*rollout.temperature: 0.7 -> 0.9"),
        ("experience.temperature=0.1", "extracting .*temperature: 0.7 -> 0.1"),
        ("experience.with_previous=true", "extracting .*with_previous: False -> True"),
    ],
)
def test_results_of_other_settings_are_not_mixed_in(
    tiny_model_path: Path, tmp_path: Path, override: str, message: str
) -> None:
    gather(learner(load_learner(tmp_path, tiny_model_path)))
    with pytest.raises(RunFolderError, match=message):
        gather(learner(load_learner(tmp_path, tiny_model_path, override)))


def test_changed_instructions_are_other_settings(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path)
    gather(learner(run))
    (tmp_path / "asked" / "extract.md").write_text("### user\n{trace} {feedback}", "utf-8")
    with pytest.raises(RunFolderError, match="instructions"):
        gather(learner(run))


def test_traces_of_other_problems_or_models_are_not_taken_for_own(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """As in a store that two runs name, or where the problems are other rows by now."""
    run = load_learner(tmp_path, tiny_model_path)
    gather(learner(run))
    fewer = (tmp_path / "problems.jsonl").read_text("utf-8").splitlines()[:3]
    (tmp_path / "problems.jsonl").write_text("\n".join(fewer), encoding="utf-8")
    with pytest.raises(TraceError, match=r"trace 'round-1/seed-\d/step-\d' is .*problems, model"):
        gather(learner(run))
    shared = f"experience.store={round_folder(run).traces}"
    other = tmp_path / "other"
    shutil.copytree(tiny_model_path, other)
    with pytest.raises(TraceError, match="the store is another run's"):
        gather(learner(load_learner(tmp_path, other, shared, "name=other")))


def test_answers_stay_with_the_traces_they_are_of(tiny_model_path: Path, tmp_path: Path) -> None:
    """A trace that has gone would shift all answers after it to others."""
    store = tmp_path / "store.jsonl"
    append_traces(store, served(6))
    run = load_learner(tmp_path, tiny_model_path, toml=SERVICE)
    gather(learner(run))
    first = gather_traces(learner(run))[0][0].id
    lines = store.read_text("utf-8").splitlines(keepends=True)
    store.write_text("".join(line for line in lines if f'"{first}"' not in line), encoding="utf-8")
    with pytest.raises(RunFolderError, match=rf"step 1 was extracted from '{first}', but now"):
        gather(learner(run))


# --- how the extractor is asked


class Listening(ScriptedEngine):
    """Keeps what it was asked, call by call."""

    calls: list[list[tuple[str, str]]]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        words = tokenizer()
        calls = self.__dict__.setdefault("calls", [])
        calls.append([(p.task_id, words.decode(list(p.ids))) for p in prompts])
        return super().generate(prompts, sampling)


def listened(run: Run) -> tuple[Gathering, list[list[tuple[str, str]]]]:
    round_ = learner(run)
    assert isinstance(round_.parts.engine, ScriptedEngine)
    engine = Listening(round_.parts.engine.script)
    round_.parts.engine = engine
    gather(round_)
    return round_, [call for call in engine.calls if call[0][0].endswith("/items")]


def test_without_previous_items_all_traces_are_one_batch(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    _, calls = listened(load_learner(tmp_path, tiny_model_path))
    assert [len(call) for call in calls] == [6]
    assert all("So far: None." in text for _, text in calls[0])


def test_with_previous_items_a_batch_holds_one_step_of_all(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """And each accumulation sees its own items, as they stand after the trace before."""
    run = load_learner(tmp_path, tiny_model_path, "experience.with_previous=true")
    round_, calls = listened(run)
    assert [[id_ for id_, _ in call] for call in calls] == [
        [f"round-1/seed-{seed}/step-{step}/items" for seed in (0, 1)] for step in (1, 2, 3)
    ]
    for step, call in enumerate(calls):
        for seed, (_, text) in enumerate(call):
            shown = round_.folder.experience(seed, step).read_text(encoding="utf-8").strip()
            assert f"So far: {shown or 'None.'}" in text


def test_feedback_reaches_the_extractor(tiny_model_path: Path, tmp_path: Path) -> None:
    _, (call,) = listened(load_learner(tmp_path, tiny_model_path, "experience.feedback=answer"))
    texts = dict(call)
    assert (
        "wrong It went: The answer is wrong. The right answer is: right"
        in (texts["round-1/seed-0/step-2/items"])
    )


def test_a_trace_too_long_to_be_read_is_counted_and_the_rest_goes_on(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    run = load_learner(tmp_path, tiny_model_path, "experience.steps=4")
    rows = [{"prompt": f"problem {i}? {'long ' * 75 * (i == 2)}"} for i in range(4)]
    text = "".join(json.dumps({**row, "answer": "right"}) + "\n" for row in rows)
    (tmp_path / "problems.jsonl").write_text(text, encoding="utf-8")
    round_ = learner(run)
    traces = gather_traces(round_)
    answers = gathering.extract(round_, traces)
    assert [row["too long to ask"] for row in count_answers(answers)] == [1, 1]
    assert [len(grown.kept) for grown in gathering.accumulate(round_, traces, answers)] == [3, 3]
    (note,) = gathering.skipped_notes(answers)
    assert "2 traces were not read: the prompt has" in note


def test_counts_add_up(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path, "experience.max_new_tokens=30")
    round_ = learner(run, mixed)
    traces = gather_traces(round_)
    answers = gathering.extract(round_, traces)
    found = gathering.accumulate(round_, traces, answers)
    for told, wrote, became in zip(
        count_traces(traces), count_answers(answers), count_items(found), strict=True
    ):
        assert (told["traces"], told["mean outcome"], wrote["answers"]) == (3, "0.67", 3)
        reasons = [value for name, value in became.items() if name != "tokens"]
        assert wrote["items"] == sum(reasons) >= became["kept"] > 0
        assert wrote["malformed"] + wrote["cut answers"] > 0


# --- a store that others fill

SERVICE = """
name = "service"
steps = 2
model = {{ path = {model!r}, dtype = "float32", device = "cpu" }}
tasks = {{ train = "train.jsonl", validation = "validation.jsonl", test = "test.jsonl" }}
experience.store = "store.jsonl"
experience.seeds = 2
experience.steps = 3
experience.max_new_tokens = 60
experience.instructions = "asked"
"""


def served(count: int, start: int = 0) -> list[Trace]:
    return [Trace(f"r{n}", (Message("user", f"u{n}?"),), f"a{n}") for n in range(start, count)]


def test_a_service_brings_the_traces(tiny_model_path: Path, tmp_path: Path) -> None:
    """No problem is solved; each accumulation takes them in an order of its own."""
    run = load_learner(tmp_path, tiny_model_path, toml=SERVICE)
    append_traces(tmp_path / "store.jsonl", served(6))
    round_ = learner(run)
    gather(round_)
    assert all(id_.endswith("/items") for id_ in asked_of(round_.parts))
    orders = [[t.id for t in own] for own in gather_traces(round_)]
    assert [len(set(own)) for own in orders] == [3, 3] and orders[0] != orders[1]


def test_a_store_may_grow_in_between(tiny_model_path: Path, tmp_path: Path) -> None:
    """What an accumulation has read stays where it was."""
    store = tmp_path / "store.jsonl"
    append_traces(store, served(3))
    short = load_learner(tmp_path, tiny_model_path, "experience.steps=2", toml=SERVICE)
    gather(learner(short))
    before = [[t.id for t in own] for own in gather_traces(learner(short))]
    append_traces(store, served(40, start=3))
    long = learner(load_learner(tmp_path, tiny_model_path, "experience.steps=6", toml=SERVICE))
    gather(long)
    after = [[t.id for t in own] for own in gather_traces(long)]
    assert [own[:2] for own in after] == before
    assert [len(set(own)) for own in after] == [6, 6]
    assert len(asked_of(long.parts)) == 8


def test_a_store_with_too_little_in_it_says_so(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path, toml=SERVICE)
    append_traces(tmp_path / "store.jsonl", served(2))
    round_ = learner(run)
    assert [len(grown.texts) for grown in gather(round_)] == [3, 3]
    assert "the store holds 2 traces, so accumulations stop there" in round_.notes[0]


def test_traces_of_another_round_are_not_of_this_one(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path, toml=SERVICE)
    late = Trace("late", (Message("user", "u?"),), "a", round=2)
    append_traces(tmp_path / "store.jsonl", [late])
    with pytest.raises(TraceError, match="holds no trace of round 1; let the service append"):
        gather(learner(run))
    assert [own[0].id for own in gather_traces(learner(run, number=2))] == ["late", "late"]


def test_traces_of_others_beside_problems_are_named(tiny_model_path: Path, tmp_path: Path) -> None:
    """They are kept, to be trained on, but not silently left out."""
    run = load_learner(tmp_path, tiny_model_path)
    round_ = learner(run)
    append_traces(round_.store, served(2))
    assert [len(own) for own in gather_traces(round_)] == [3, 3]
    assert "2 traces of others in traces.jsonl are not read" in round_.notes[0]


# --- before anything is loaded


def test_a_run_without_the_table_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    run = load_learner(tmp_path, tiny_model_path)
    with pytest.raises(ConfigError, match=r"no \[experience\] table"):
        check_experience(run.model_copy(update={"experience": None}))


def test_a_missing_key_is_told_before_a_model_is_loaded(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPCD_TEST_KEY", raising=False)
    extractor = (
        "experience.extractor="
        '{type="endpoint", url="http://localhost:9", model="m", key_env="OPCD_TEST_KEY"}'
    )
    run = load_learner(tmp_path, tmp_path / "no model", extractor)
    with pytest.raises(ConfigError, match=r"OPCD_TEST_KEY.*set it to the key"):
        open_round(run)
    assert not (run.out / run.name).exists()


def test_a_game_goes_through_all_stages(tiny_model_path: Path, tmp_path: Path) -> None:
    """With a real model: whatever it writes is counted."""
    run = load_learner(tmp_path, tiny_model_path, toml=GAME)
    lines: list[str] = []
    round_ = open_round(run, say=lines.append)
    found = gather(round_)
    assert [len(grown.texts) for grown in found] == [4, 4]
    assert "solved 6 of 6 problems" in lines and "extracted from 6 of 6 traces" in lines
