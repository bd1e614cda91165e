"""Shipped recipes can be started, and the support desk's data is what the README says of it."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opcd.checking import check_run
from opcd.config.inputs import Public
from opcd.envs.games import openings_of
from opcd.graders import build_grader
from opcd.tasks import load_splits
from worlds import write_jsonl

RECIPES = Path(__file__).parents[1] / "recipes"
RUNS = sorted(RECIPES.glob("*/run.toml"))
FROM_HUB = ("medical", "safety")
"""Recipes for a GPU, whose rows are read from a hub when the run starts."""
GAMES = ("frozen_lake", "lake_lessons")
"""Recipes that are graded by their boards."""
LOCAL = [path for path in RUNS if path.parent.name not in (*FROM_HUB, "gsm8k", *GAMES)]
SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real rows, where there are any."""
DESK = RECIPES / "support_desk"
SPLITS = ("train", "validation", "test")


def rows(split: str) -> list[dict[str, Any]]:
    text = (DESK / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_recipes_are_found() -> None:
    """Guards the tests below against an empty list."""
    assert DESK / "run.toml" in RUNS


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_every_recipe_can_be_started(path: Path) -> None:
    run, facts = check_run(path)
    assert run.name == path.parent.name
    rows = f"{run.game.type}: " if run.game else "tasks: "
    assert any(fact.startswith(rows) for fact in facts)
    assert [fact for fact in facts if fact.startswith("warning")] == []


@pytest.mark.parametrize("path", LOCAL, ids=lambda path: path.parent.name)
def test_every_answer_of_a_recipe_can_be_graded(path: Path) -> None:
    """A row whose own answer is no valid response would always count against the model."""
    run, _ = check_run(path)
    assert run.grader is not None and run.tasks is not None
    grade = build_grader(run.grader)
    for tasks in load_splits(run.tasks, run.seed).values():
        for task in tasks:
            if task.answer is not None:
                is_text = isinstance(task.answer, str)
                answer = task.answer if is_text else json.dumps(task.answer)
                assert grade(task, answer).metrics["correct"] == 1.0, task.id


@pytest.mark.parametrize("name", FROM_HUB)
def test_the_rows_of_a_hub_recipe_can_be_graded(name: str, tmp_path: Path) -> None:
    """As it will read them, from small files with the hub's columns."""
    options = {f"op{letter}": f"drug {letter}" for letter in "abcd"}
    rows: dict[str, list[dict[str, Any]]] = {
        "medmcqa": [
            {"id": i, "question": f"{i}?", **options, "cop": i % 4, "exp": None} for i in range(40)
        ],
        "hatecheck": [
            {
                "functionality": "f",
                "case_id": i,
                "test_case": f"case {i}",
                "label_gold": "hateful" if i % 2 else "non-hateful",
                "templ_id": i // 2,
            }
            for i in range(40)
        ],
        "tweet_offensive": [{"text": f"tweet {i}", "label": i % 2} for i in range(40)],
    }
    given, _ = check_run(RECIPES / name / "run.toml")
    assert given.tasks is not None
    sources = [source for source in given.tasks.train if isinstance(source, Public)]
    assert len(sources) == len(given.tasks.train) > 0
    files = [write_jsonl(tmp_path / f"{s.name}.jsonl", rows[s.name]) for s in sources]
    local = ", ".join(
        f"{{type='public', name='{source.name}', split='{source.split}', path='{file}'}}"
        for source, file in zip(sources, files, strict=True)
    )
    run, facts = check_run(RECIPES / name / "run.toml", [f"tasks.train=[{local}]"])
    assert facts[-1].startswith("tasks: ")
    assert run.grader is not None and run.tasks is not None
    grade = build_grader(run.grader)
    splits = load_splits(run.tasks, run.seed)
    assert splits.keys() == {"train", "validation", "test"}
    for task in (task for tasks in splits.values() for task in tasks):
        answer = f"Because. <answer>{task.answer}</answer>"
        assert grade(task, answer).metrics["correct"] == 1.0, task.id


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not here")
def test_safety_can_be_started_on_real_rows() -> None:
    """Both classes in every split, no template in two of them, and selection by the harmless."""
    file = SHARED / "hatecheck.jsonl"
    source = f"{{type='public', name='hatecheck', split='test', path='{file}'}}"
    overrides = [f"tasks.train={source}", "evaluation.select_by=correct_no"]
    run, _ = check_run(RECIPES / "safety" / "run.toml", overrides)
    assert run.tasks is not None
    for tasks in load_splits(run.tasks, run.seed).values():
        assert {task.answer for task in tasks} == {"yes", "no"}


def test_gsm8k_takes_local_rows_as_its_comment_says(tmp_path: Path) -> None:
    """The command in the file itself, with the hub's columns; problems stand in no other split."""
    recipe = RECIPES / "gsm8k" / "run.toml"
    file = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"question": f"{i} + 1?", "answer": f"Add.\n#### {i + 1:,}"} for i in range(990, 1090)],
    )
    (shown,) = re.findall(
        r"^# opcd experience \S+ '(.+)'$", recipe.read_text("utf-8"), re.MULTILINE
    )
    run, facts = check_run(recipe, [shown.replace("FILE", str(file))])
    assert facts[-1] == "tasks: 85 train, 5 test, 5 validation, 5 extraction"
    assert run.grader is not None and run.tasks is not None
    grade = build_grader(run.grader)
    for task in (task for tasks in load_splits(run.tasks, run.seed).values() for task in tasks):
        assert grade(task, f"So it is {task.answer}.").metrics["correct"] == 1.0, task.id


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not here")
def test_gsm8k_has_as_many_real_rows_as_it_measures() -> None:
    """Fewer rows than asked for would be measured without a word."""
    source = f"{{type='public', name='gsm8k', rows=800, path='{SHARED / 'gsm8k.jsonl'}'}}"
    run, _ = check_run(RECIPES / "gsm8k" / "run.toml", [f"tasks.train={source}"])
    assert run.tasks is not None and run.experience is not None
    splits = load_splits(run.tasks, run.seed)
    assert len(splits["extraction"]) >= run.experience.steps
    assert len(splits["validation"]) >= (run.experience.select_rows or 0)
    assert len(splits["test"]) >= (run.evaluation.test_rows or 0)


def test_the_lake_to_learn_from_tells_no_rules_and_holds_a_game_as_raw_traces() -> None:
    """Else there is nothing to find out, and the raw-traces baseline is empty."""
    run, _ = check_run(RECIPES / "lake_lessons" / "run.toml")
    assert run.game and run.experience and not run.game.rules
    assert run.experience.max_tokens >= run.game.turns * (run.rollout.max_new_tokens + 100)
    assert len(openings_of(run.game)["extraction"]) >= run.experience.steps


@pytest.mark.parametrize("name", FROM_HUB)
def test_the_guides_are_of_300_to_800_words(name: str) -> None:
    """Long enough to be worth baking in, and no reply is given that the grader cannot read."""
    text = (RECIPES / name / "system.md").read_text(encoding="utf-8")
    assert 300 <= len(text.split()) <= 800
    assert "<answer>" in text


def test_the_desk_has_400_different_messages() -> None:
    prompts = [row["prompt"] for split in SPLITS for row in rows(split)]
    assert len(prompts) >= 400
    assert len({" ".join(prompt.lower().split()) for prompt in prompts}) == len(prompts)


def test_the_desks_splits_share_no_template() -> None:
    """Else the test split would measure wordings that were trained on."""
    templates = [{row["template"] for row in rows(split)} for split in SPLITS]
    assert sum(map(len, templates)) == len(set().union(*templates))
    source = json.loads((DESK / "templates.json").read_text(encoding="utf-8"))["templates"]
    texts = [{t for moods in source[split].values() for t in moods} for split in SPLITS]
    assert sum(map(len, texts)) == len(set().union(*texts))


@pytest.mark.parametrize("split", SPLITS)
def test_the_desks_moods_are_balanced(split: str) -> None:
    """No mood is so rare that leaving it out would go unnoticed."""
    counts = Counter(row["answer"]["mood"] for row in rows(split))
    assert counts.keys() == {"happy", "unsure", "angry"}
    assert min(counts.values()) >= 0.2 * sum(counts.values())


def test_the_desks_files_are_what_compose_writes(tmp_path: Path) -> None:
    command = [sys.executable, str(DESK / "compose.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (DESK / name).read_bytes(), name


def test_the_desks_worked_examples_are_no_rows_of_it() -> None:
    """The context must not hold the answer to a test message."""
    text = (DESK / "examples.jsonl").read_text(encoding="utf-8")
    examples = {json.loads(line)["prompt"] for line in text.splitlines()}
    assert not examples & {row["prompt"] for split in SPLITS for row in rows(split)}


def test_the_lake_teaches_rules_that_its_player_is_not_told() -> None:
    """Every symbol is explained in the context and nowhere in the prompts; boards are enough."""
    run, _ = check_run(RECIPES / "frozen_lake" / "run.toml")
    assert run.game and run.game.type == "frozen_lake" and run.context.type == "system_prompt"
    context = run.context.path.read_text(encoding="utf-8")
    boards = openings_of(run.game)
    for symbol in ("goal", "hole", "ice"):
        assert f"{getattr(run.game.symbols, symbol)} is" in context and symbol in context
        for openings in boards.values():
            for id_, opening in openings.items():
                assert symbol not in opening.task(id_).messages[0].content
    assert {split: len(found) for split, found in boards.items()} == {
        "train": 48,
        "extraction": 8,
        "validation": 12,
        "test": 24,
    }


def test_the_sums_are_what_compose_writes_and_no_question_comes_twice(tmp_path: Path) -> None:
    """Problems that experience is gathered from are in no other split."""
    folder = RECIPES / "experience"
    subprocess.run([sys.executable, str(folder / "compose.py"), str(tmp_path)], check=True)
    questions: list[str] = []
    for split in ("problems", *SPLITS):
        written = (tmp_path / f"{split}.jsonl").read_bytes()
        assert written == (folder / f"{split}.jsonl").read_bytes()
        questions += [json.loads(line)["prompt"] for line in written.decode().splitlines()]
    assert len(set(questions)) == len(questions) == 288
