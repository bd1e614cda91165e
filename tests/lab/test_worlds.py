"""Worlds: a hidden truth, rows that ask about it, and other truths beside it."""

import json
from pathlib import Path
from random import Random

import pytest

from opcd.envs.games import boards_of
from opcd.instructions import parse_instructions
from opcd.lab import language as words
from opcd.lab.minds import LAKE
from opcd.lab.worlds import (
    BESIDES,
    OTHERS,
    World,
    WorldName,
    anchors,
    answer_of,
    make_world,
    other_truths,
    run_of,
    splits,
    tell,
    truth,
)

NAMES: tuple[WorldName, ...] = ("code_book", "rulebook", "lake")
SPLITS = ("train", "extraction", "validation", "test")


@pytest.fixture(params=NAMES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return make_world(request.param, 3, tmp_path)


def files(world: World) -> dict[str, str]:
    paths = sorted(path for path in world.folder.rglob("*") if path.is_file())
    return {str(p.relative_to(world.folder)): p.read_text(encoding="utf-8") for p in paths}


def test_a_world_is_a_function_of_its_name_and_seed(world: World, tmp_path: Path) -> None:
    """Trials are kept by it; a second process must write the same files."""
    again = make_world(world.name, 3, tmp_path / "again")
    other = make_world(world.name, 4, tmp_path)
    assert (again.facts, files(again)) == (world.facts, files(world))
    assert other.facts != world.facts and other.folder != world.folder


def test_a_lake_is_told_of_on_a_longer_page(world: World) -> None:
    """Its three facts are there as they are, among others that say nothing about its symbols."""
    text = world.context.read_text(encoding="utf-8")
    if world.name != "lake":
        assert text == tell(world.facts)
        return
    lines = text.splitlines(keepends=True)
    assert len(lines) == len(world.facts) + BESIDES
    others = [line for line in lines if line not in tell(world.facts).splitlines(keepends=True)]
    assert len(others) == BESIDES
    assert not {line.split()[1] for line in others} & {*words.SYMBOLS}
    places = [place for place, line in enumerate(lines) if line not in others]
    assert places != list(range(len(world.facts))), "not always in front"


def test_a_truth_says_something_of_every_name() -> None:
    assert set(truth("code_book", Random(0))) == set(words.KEYS)
    assert set(truth("rulebook", Random(0))) == {*words.PRODUCTS, *words.TONES}
    lake = truth("lake", Random(0))
    assert set(lake.values()) == set(words.ROLES) and set(lake) <= set(words.SYMBOLS)


def test_no_prompt_is_in_two_splits(world: World) -> None:
    """Nor twice in one; otherwise the test rows would have been trained on."""
    rows = splits(world)
    prompts = [row["prompt"] for split in rows.values() for row in split]
    assert len(prompts) == len(set(prompts))
    assert set(rows) == (set() if world.name == "lake" else set(SPLITS))


def test_every_answer_is_what_the_facts_say(world: World) -> None:
    for rows in splits(world).values():
        for row in rows:
            named = [word for word in row["prompt"].split() if word in world.facts]
            if world.name == "rulebook":
                # A message may name the tone first; the answer has the desk first.
                named.sort(key=lambda word: word in words.TONES)
                assert len(named) == 2
            assert row["answer"] == " ".join(world.facts[word] for word in named)


def test_every_split_asks_about_every_name(world: World) -> None:
    """What is not asked in training cannot be baked, and what is not in test is not measured."""
    for split, rows in splits(world).items():
        asked = {word for row in rows for word in row["prompt"].split() if word in world.facts}
        assert asked == set(world.facts), split


def test_answers_under_other_facts() -> None:
    assert answer_of({"mip": "tor", "dax": "sul"}, "hey dax ?") == "sul"
    facts = {"lamp": "north", "gladly": "never"}
    assert answer_of(facts, "gladly wow lamp") == "north never" == answer_of(facts, "lamp gladly")


def test_anchors_are_other_truths(world: World) -> None:
    """Anchors of this truth would teach the context's answers; train and test share none."""
    found = anchors(world)
    systems = {split: found[split]["systems"] for split in ("train", "test")}
    assert tell(world.facts) not in [*systems["train"], *systems["test"]]
    assert not set(systems["train"]) & set(systems["test"])
    assert not set(found["train"]["prompts"]) & set(found["test"]["prompts"])
    for split in ("train", "test"):
        assert systems[split] == [
            tell(facts) for facts in other_truths(world.name, world.seed, split)
        ]
        assert len(systems[split]) == OTHERS and found[split]["prompts"]
    assert json.loads((world.folder / "anchors.json").read_text(encoding="utf-8")) == found


def test_the_instructions_can_be_read(world: World) -> None:
    """In the order of the documents' lessons: the trace, what was said, then the question."""
    path = world.folder / "instructions" / "extract.md"
    text = path.read_text(encoding="utf-8")
    places = [text.index(part) for part in ("{trace}", "{feedback}", words.LESSONS)]
    assert places == sorted(places)
    assert parse_instructions(text, path.name, ("trace", "feedback", "previous"))


def test_a_world_is_a_run(world: World, reading: Path) -> None:
    run = run_of(world)
    assert run.model.path == str(reading) and run.seed == 3 and run.out == world.folder / "runs"
    assert run.context is not None and run.context.model_dump()["path"] == world.context
    if world.name == "lake":
        assert run.game is not None and run.tasks is None
        symbols = run.game.symbols.model_dump()
        assert {symbols[role]: role for role in words.ROLES} == dict(world.facts)
        assert symbols["player"] == words.PLAYER
        assert boards_of(run.game) == boards_of(LAKE), "symbols do not change the boards"
    else:
        assert run.game is None and run.tasks is not None


def test_changes_are_laid_over_the_run(world: World, reading: Path) -> None:
    run = run_of(world, steps=7, optimizer={"schedule": "linear"}, teacher={"type": "live"})
    assert (run.steps, run.optimizer.schedule, run.optimizer.lr) == (7, "linear", 5e-4)
    assert run.teacher.type == "live"
    assert run_of(world, optimizer={"lr": 1e-3}).optimizer.lr == 1e-3


def test_a_context_of_another_type_keeps_no_path_to_the_facts(world: World, reading: Path) -> None:
    """What has to be found out must not be told."""
    run = run_of(world, context={"type": "experience", "path": "items.md"})
    assert str(world.context) not in run.model_dump_json()
    with pytest.raises(ValueError, match="no context to bake in"):
        run_of(world, context={"type": "experience"})
