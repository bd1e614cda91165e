"""The `[experience]` table: defaults, paths, and keys that contradict each other."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from opcd.checking import check_context, check_run
from opcd.config import Run, check_files, dump_config, load_config
from opcd.config.experience import Experience
from opcd.config.extractors import Endpoint, Local
from opcd.config.inputs import Jsonl, Lessons, Tasks
from opcd.contexts import load_context, pool_of
from opcd.errors import ConfigError, TaskError
from opcd.tasks import load_splits
from opcd.types import Context, Message, Task
from worlds import write_jsonl, write_run

TOML = """
name = "learner"
{top}

[tasks]
train = "train.jsonl"
validation = "validation.jsonl"
test = "test.jsonl"
"""
PROBLEMS = '[experience]\nproblems = "problems.jsonl"\n'
GRADER = '[grader]\ntype = "exact"\n'


def load(folder: Path, *overrides: str, tables: str = GRADER + PROBLEMS, top: str = "") -> Run:
    path = write_run(folder, top, tables, TOML)
    rows = [{"prompt": f"problem {i}?", "answer": f"word{i}"} for i in range(4)]
    write_jsonl(folder / "problems.jsonl", rows)
    return load_config(path, overrides)


def table(run: Run) -> Experience:
    assert run.experience is not None
    return run.experience


def tasks_of(run: Run) -> Tasks:
    assert run.tasks
    return run.tasks


def test_a_run_with_experience_needs_no_context(tmp_path: Path) -> None:
    run = load(tmp_path)
    (source,) = table(run).problems
    assert isinstance(source, Jsonl) and source.path == tmp_path / "problems.jsonl"
    assert (run.context, table(run).extractor.type) == (Lessons(), "student")
    check_files(run)


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    """Also where paths became absolute, on the way through overrides."""
    run = load(tmp_path, "experience.seeds=5", "experience.placement=system")
    (tmp_path / "config.json").write_text(dump_config(run), encoding="utf-8")
    assert load_config(tmp_path / "config.json") == run
    assert (table(run).seeds, table(run).placement) == (5, "system")


def test_a_pool_of_paths_is_taken_from_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("- a\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("- b\n", encoding="utf-8")
    context = '[context]\ntype = "experience"\npath = ["a.md", "b.md"]\n'
    run = load(tmp_path, tables=context)
    assert isinstance(run.context, Lessons)
    assert run.context.files == (tmp_path / "a.md", tmp_path / "b.md")
    check_files(run)


def test_a_local_extractor_beside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "writer").mkdir()
    extractor = 'extractor = { type = "local", path = "writer" }\n'
    run = load(tmp_path, tables=GRADER + PROBLEMS + extractor)
    assert table(run).extractor == Local(path=str(tmp_path / "writer"))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ("", "no context to bake in; write .context. .* or .experience."),
        (GRADER + "[experience]\nseeds = 2\n", r"nothing to learn from; write experience.problems"),
        (
            PROBLEMS,
            r'feedback = "outcome" but there is no .grader.*write experience.feedback = "no',
        ),
        (PROBLEMS + 'feedback = "none"\nkeep = "best"\n', 'write keep = "recent" or feedback'),
        (GRADER + PROBLEMS + 'use = "pool"\nseeds = 1\n', "a pool of one experience"),
        (GRADER + PROBLEMS + 'template = "{experience}"\n', r"template lacks \{prompt\}"),
        (GRADER + PROBLEMS + "rounds = 2\n", "experience.rounds: there is no such key"),
        (GRADER + PROBLEMS + "near_duplicate = 0.0\n", "experience.near_duplicate = 0.0"),
        (
            GRADER + PROBLEMS + '[context]\ntype = "system_prompt"\npath = "system.md"\n',
            "beside .experience., whose items are the context; remove one",
        ),
        (
            GRADER + PROBLEMS + 'extractor = { type = "endpoint", url = "host:80", model = "m" }\n',
            "url must begin with http",
        ),
        (
            GRADER
            + PROBLEMS
            + 'extractor = { type = "endpoint", url = "http://h:x", model = "m" }',
            "url must begin with http",
        ),
    ],
)
def test_keys_that_do_not_fit_say_the_way_out(tmp_path: Path, tables: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, tables=tables)


def test_no_grader_is_needed_without_feedback(tmp_path: Path) -> None:
    assert load(tmp_path, tables=PROBLEMS + 'feedback = "none"\n').grader is None


@pytest.mark.parametrize(
    "wrong",
    ['url = "http://me:sk-secret@host/v1"', 'url = "http://host/v1"\nkey_env = "sk-secret"'],
)
def test_a_key_written_into_the_file_is_not_repeated(tmp_path: Path, wrong: str) -> None:
    """An error ends up in logs."""
    extractor = f'[experience.extractor]\ntype = "endpoint"\nmodel = "m"\n{wrong}\n'
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, tables=GRADER + PROBLEMS + extractor)
    assert "secret" not in str(caught.value) and "write" in str(caught.value)


def test_an_endpoint_has_the_protocols_defaults() -> None:
    found = Endpoint(url="http://localhost:8000/v1", model="m")
    assert (found.key_env, found.timeout_s, found.retries) == (None, 120.0, 4)


def test_problems_are_a_split_of_their_own(tmp_path: Path) -> None:
    run = load(tmp_path)
    splits = load_splits(tasks_of(run), run.seed, problems=table(run).problems)
    assert [len(splits[s]) for s in ("train", "validation", "test", "extraction")] == [8, 3, 3, 4]
    assert check_run(tmp_path / "run.toml")[1][-1].endswith("4 extraction")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_problems_of_another_split_are_refused(tmp_path: Path, split: str) -> None:
    """What items are extracted from may be neither trained on nor measured on."""
    load(tmp_path)
    write_jsonl(tmp_path / "problems.jsonl", [{"prompt": f"{split.upper()}  question 1?"}])
    with pytest.raises(TaskError, match=f"extraction row .* and {split} row .* share"):
        check_run(tmp_path / "run.toml")


def test_no_problems_are_named_by_their_key(tmp_path: Path) -> None:
    run = load(tmp_path)
    write_jsonl(tmp_path / "problems.jsonl", [])
    with pytest.raises(TaskError, match=r"experience\.problems has no rows"):
        load_splits(tasks_of(run), run.seed, problems=table(run).problems)


def test_problems_may_be_a_share_of_the_train_rows(tmp_path: Path) -> None:
    """For a data set of one split; its trajectory store need not be there yet."""
    share = "tasks.extraction_share=0.25"
    run = load(tmp_path, "experience.problems=[]", "experience.store=later.jsonl", share)
    assert table(run).problems == ()
    check_files(run)
    splits = load_splits(tasks_of(run), run.seed)
    assert {name: len(tasks) for name, tasks in splits.items()} == {
        "train": 6,
        "validation": 3,
        "test": 3,
        "extraction": 2,
    }
    with pytest.raises(ConfigError, match="the problems have two origins"):
        load(tmp_path, share)


def test_a_store_is_needed_at_the_start_only_without_problems(tmp_path: Path) -> None:
    check_files(load(tmp_path, "experience.store=none.jsonl"))
    alone = '[experience]\nstore = "none.jsonl"\n'
    with pytest.raises(TaskError, match=r"experience\.store = .*no such file"):
        check_files(load(tmp_path, tables=alone))


def test_a_run_without_its_experience_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to bake in before that is gathered"):
        check_context(load(tmp_path))


ROWS = [Task(f"t{i}", (Message("user", f"{i}?"),)) for i in range(40)]


def pool(folder: Path, count: int) -> Lessons:
    paths = tuple(folder / f"{n}.md" for n in range(count))
    for path in paths:
        path.write_text(f"- item of {path.name}\n", encoding="utf-8")
    return Lessons(path=paths)


def contexts_of(config: Lessons, tasks: Sequence[Task] = ROWS) -> list[Context]:
    return [load_context(config, task) for task in tasks]


def test_outside_of_training_a_row_meets_one_of_a_pool_always_the_same(tmp_path: Path) -> None:
    lessons = pool(tmp_path, 3)
    contexts = contexts_of(lessons)
    assert len({c.user_template for c in contexts}) == 3
    assert contexts_of(lessons, ROWS[5:9]) == contexts[5:9]


def test_one_experience_is_a_context_like_any_other(tmp_path: Path) -> None:
    contexts = contexts_of(pool(tmp_path, 1), ROWS[:2])
    assert contexts[0] == contexts[1] and pool_of(pool(tmp_path, 1)) == []
    assert "- item of 0.md" in contexts[0].user_template


def test_no_experience_yet_is_no_context() -> None:
    assert all(c.is_empty for c in contexts_of(Lessons()))


GAME = """
name = "lake"

[game]
type = "frozen_lake"
"""


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ('problems = "problems.jsonl"', "whose extraction boards are the problems; remove it"),
        ('feedback = "answer"', r"a game has no right answer .* write experience.feedback = .outc"),
        ("[game.boards]\nextraction = 0", r"game.boards.extraction = 0 .* write at least 1"),
    ],
)
def test_a_game_brings_its_own_problems(tmp_path: Path, tables: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_run(tmp_path, tables=f"[experience]\n{tables}\n", toml=GAME))


def test_a_game_without_boards_of_its_own_starts_from_a_store(tmp_path: Path) -> None:
    tables = '[experience]\nstore = "none.jsonl"\n[game.boards]\nextraction = {}\n'
    check_files(load_config(write_run(tmp_path, tables=tables.format(1), toml=GAME)))
    with pytest.raises(TaskError, match=r"experience\.store = .*no such file"):
        check_files(load_config(write_run(tmp_path, tables=tables.format(0), toml=GAME)))


def test_a_game_needs_no_key_at_all(tmp_path: Path) -> None:
    run = load_config(write_run(tmp_path, tables="[experience]\n", toml=GAME))
    check_files(run)
    assert run.game and run.game.boards.extraction and run.context == Lessons()
