"""Rows become tasks; splits are made, drawn from and checked."""

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opcd.config.inputs import Tasks as TasksConfig
from opcd.errors import TaskError
from opcd.tasks import check_leaks, draw, load_splits, mix, read_row, shuffle, split_groups
from opcd.types import Message, Task
from worlds import write_jsonl


def ask(text: str, group: str | None = None) -> Task:
    return Task(text, (Message("user", text),), group=group)


def many(count: int) -> list[Task]:
    return [ask(f"t{index}") for index in range(count)]


def config(folder: Path, **splits: Any) -> TasksConfig:
    """A `[tasks]` table whose splits are given as rows, and written to files."""
    files = {
        key: write_jsonl(folder / f"{key}.jsonl", value)
        for key, value in splits.items()
        if isinstance(value, list)
    }
    return TasksConfig.model_validate(splits | files)


def prompts(tasks: list[Task]) -> list[str]:
    return [task.messages[-1].content for task in tasks]


# --- one row


def test_a_text_becomes_a_user_turn() -> None:
    row = {"prompt": "Hi?", "answer": {"a": 1}, "context": "c", "id": 7, "kind": "k"}
    expected = Task("7", (Message("user", "Hi?"),), {"a": 1}, "c", "kind=k")
    assert read_row(row, "train-00000", "f, row 1", "kind") == expected


def test_what_a_row_lacks_is_none() -> None:
    task = read_row({"prompt": "Hi?"}, "train-00000", "f, row 1", None)
    assert task == Task("train-00000", (Message("user", "Hi?"),), None, None, None)


def test_a_conversation_is_kept_turn_by_turn() -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    row = {"prompt": [{"role": role, "content": text} for role, text in turns]}
    assert read_row(row, "x", "w", None).messages == tuple(Message(r, t) for r, t in turns)  # type: ignore


def test_trl_columns_are_understood() -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "privileged_context": "secret"}
    task = read_row(row, "x", "w", None)
    assert (prompts([task]), task.context) == (["a"], "secret")


@pytest.mark.parametrize("row", [{}, {"prompt": None, "text": "a"}])
def test_a_row_without_a_prompt_says_how_to_map_one(row: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match=r"f, row 3: no prompt.*columns = \{prompt"):
        read_row(row, "x", "f, row 3", None)


@pytest.mark.parametrize("prompt", ["", "  \n", [], [{"role": "user", "content": ""}]])
def test_a_blank_prompt_is_no_prompt(prompt: Any) -> None:
    """The column is there, so that naming it would not help."""
    with pytest.raises(TaskError, match=r"row 3: (its prompt is empty|.*content)"):
        read_row({"prompt": prompt}, "x", "f, row 3", None)


@pytest.mark.parametrize("content", [None, 5, [{"type": "text", "text": "a"}]])
def test_a_turn_that_is_no_text_is_refused(content: Any) -> None:
    with pytest.raises(TaskError, match="row 3"):
        read_row({"prompt": [{"role": "user", "content": content}]}, "x", "f, row 3", None)


@pytest.mark.parametrize("prompt", [5, {"role": "user"}, ["a"], [{"content": "a"}]])
def test_a_prompt_of_another_kind_is_refused(prompt: Any) -> None:
    with pytest.raises(TaskError, match="f, row 3: prompt is neither a text nor a list"):
        read_row({"prompt": prompt}, "x", "f, row 3", None)


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "assistant"], ["user", "system", "user"], ["tool", "user"]]
)
def test_turns_out_of_order_are_refused(roles: list[str]) -> None:
    turns = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(TaskError, match=r"f, row 3: the turns are .* end with the user"):
        read_row({"prompt": turns}, "x", "f, row 3", None)


def test_a_context_of_another_kind_is_refused() -> None:
    with pytest.raises(TaskError, match="context is a list"):
        read_row({"prompt": "a", "context": ["b"]}, "x", "f, row 3", None)


def test_a_missing_group_column_is_refused() -> None:
    with pytest.raises(TaskError, match=r"row 3: no 'template' column, but tasks\.group_by"):
        read_row({"prompt": "a"}, "x", "f, row 3", "template")


# --- sources


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "q", "label": "yes"}])
    source = {"path": path, "columns": {"prompt": "text", "answer": "label"}}
    (task,) = load_splits(config(tmp_path, train=source), seed=0)["train"]
    assert (prompts([task]), task.answer) == (["q"], "yes")


def test_rows_are_drawn_with_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"q{i}"} for i in range(50)])
    tables = [config(tmp_path, train={"path": path, "rows": 10}) for _ in range(2)]
    first, again = (prompts(load_splits(t, seed=3)["train"]) for t in tables)
    other = prompts(load_splits(tables[0], seed=4)["train"])
    assert first == again != other
    assert len(set(first)) == 10
    assert first != [f"q{i}" for i in range(10)]


def test_more_rows_than_there_are_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}])
    with pytest.raises(TaskError, match=r"a\.jsonl has 1 rows, but rows = 2"):
        load_splits(config(tmp_path, train={"path": path, "rows": 2}), seed=0)


def test_sources_are_mixed_with_ids_of_their_own(tmp_path: Path) -> None:
    paths = [
        write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": f"{n}{i}"} for i in "12"]) for n in "ab"
    ]
    tasks = load_splits(TasksConfig.model_validate({"train": paths}), seed=0)["train"]
    assert prompts(tasks) == ["a1", "a2", "b1", "b2"]
    assert len({task.id for task in tasks}) == 4


def test_a_generator_gets_seed_and_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def rows(seed, count):\n    for i in range(count): yield {'prompt': f'{seed}/{i}'}\n"
    (tmp_path / "my_rows_7.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = {"type": "generator", "target": "my_rows_7:rows", "arguments": {"count": 2}}
    table = TasksConfig.model_validate({"train": source})
    assert prompts(load_splits(table, seed=9)["train"]) == ["9/0", "9/1"]


def test_a_local_folder_is_read_as_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`type = "hf"` is the way to a hub, and works on a folder of files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "q1"}, {"text": "q2"}])
    source = {"type": "hf", "path": str(tmp_path / "data"), "columns": {"prompt": "text"}}
    tasks = load_splits(TasksConfig.model_validate({"train": source}), seed=0)["train"]
    assert prompts(tasks) == ["q1", "q2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a"}\n{"prompt": \n',
            r"train\.jsonl, line 2: not JSON \(.* at character 13\)",
        ),
        ('{"prompt": "a"}\n\n["b"]\n', r"train\.jsonl, line 3: not a JSON object"),
        ('{"prompt": "a"}\n{"answer": "b"}\n', r"train\.jsonl, row 2: no prompt"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', "two rows have the id '1'"),
        ("\n\n", r"tasks\.train has no rows"),
    ],
)
def test_a_malformed_file_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=message):
        load_splits(config(tmp_path, train=path), seed=0)


def test_unicode_line_separators_do_not_end_a_row(tmp_path: Path) -> None:
    table = config(tmp_path, train=[{"prompt": "a\u2028b\x85c"}])
    assert prompts(load_splits(table, seed=0)["train"]) == ["a\u2028b\x85c"]


# --- splits


def test_shares_are_taken_from_train_and_nothing_is_lost(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "kind": i // 4} for i in range(40)]
    shares = {"test_share": 0.2, "validation_share": 0.25, "extraction_share": 0.3}
    splits = load_splits(config(tmp_path, train=rows, group_by="kind", **shares), seed=0)
    assert {name: len(tasks) for name, tasks in splits.items()} == {
        "train": 16,
        "test": 8,
        "validation": 8,
        "extraction": 8,
    }
    fewer = load_splits(config(tmp_path, train=rows, group_by="kind", test_share=0.2), seed=0)
    assert fewer["test"] == splits["test"], "what is tested does not hang on the other shares"
    assert sorted(p for tasks in splits.values() for p in prompts(tasks)) == sorted(
        row["prompt"] for row in rows
    )


@given(
    groups=st.lists(st.integers(0, 8), min_size=2, max_size=40),
    share=st.floats(0.01, 0.95),
    seed=st.integers(0, 99),
)
def test_split_groups_never_splits_a_group(groups: list[int], share: float, seed: int) -> None:
    assume(len(set(groups)) >= 2)
    tasks = [ask(f"t{i}", group=f"g{g}") for i, g in enumerate(groups)]
    try:
        kept, taken = split_groups(tasks, share, seed)
    except TaskError:
        assume(False)
        raise
    assert not {t.group for t in kept} & {t.group for t in taken}
    assert sorted(t.id for t in [*kept, *taken]) == sorted(t.id for t in tasks)
    last = Counter(t.group for t in taken)[taken[-1].group]
    assert len(taken) >= share * len(tasks) > len(taken) - last


def test_equal_prompts_are_a_group_where_there_is_no_column() -> None:
    """Else a share would put a row on one side and its copy on the other."""
    tasks = [Task(f"{text}{n}", (Message("user", text),)) for text in "abcdef" for n in (0, 1)]
    for seed in range(10):
        kept, taken = split_groups(tasks, 0.3, seed)
        assert not set(prompts(kept)) & set(prompts(taken))


def test_a_share_that_leaves_a_split_empty_is_refused() -> None:
    with pytest.raises(TaskError, match="leaves a split empty"):
        split_groups([ask("a", "g"), ask("b", "g")], 0.5, seed=0)


def test_splits_that_share_a_row_are_refused(tmp_path: Path) -> None:
    """Case and white space aside, and naming both rows."""
    table = config(
        tmp_path,
        train=[{"prompt": "Where is my order?", "id": "a1"}],
        test=[{"prompt": "where  is my\nORDER?", "id": "b2"}],
    )
    with pytest.raises(TaskError, match=r"test row 'b2' and train row 'a1' share the prompt"):
        load_splits(table, seed=0)


def test_splits_that_share_a_group_are_refused(tmp_path: Path) -> None:
    table = config(
        tmp_path,
        train=[{"prompt": "a", "template": "t1"}],
        validation=[{"prompt": "b", "template": "t1"}],
        group_by="template",
    )
    with pytest.raises(TaskError, match=r"share the group 'template=t1'"):
        load_splits(table, seed=0)


def test_a_split_may_repeat_its_own_rows() -> None:
    check_leaks({"train": [ask("a"), ask("a")], "test": [ask("b")]})


# --- order


@given(tasks=st.integers(1, 17), count=st.integers(1, 25), seed=st.integers(0, 9))
def test_every_epoch_covers_each_task_once(tasks: int, count: int, seed: int) -> None:
    """Whatever the step takes, the stream of tasks is one shuffled epoch after the other."""
    rows = many(tasks)
    steps = -(-3 * tasks // count)
    stream = [t.id for step in range(steps) for t in draw(rows, count, step, seed)]
    assert len(stream) == steps * count
    for start in range(0, len(stream) - tasks + 1, tasks):
        assert sorted(stream[start : start + tasks]) == sorted(t.id for t in rows)


@given(steps=st.permutations(range(6)), seed=st.integers(0, 9))
def test_a_draw_depends_on_its_arguments_alone(steps: list[int], seed: int) -> None:
    """A resumed run sees at step n what it would have seen; the global generator has no say."""
    rows, drawn = many(7), {}
    for step in steps:
        random.seed(step)
        drawn[step] = draw(rows, 3, step, seed)
    assert [drawn[step] for step in range(6)] == [draw(rows, 3, step, seed) for step in range(6)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = many(30)
    orders = [prompts(shuffle(rows, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_every_epoch_is_shuffled_anew() -> None:
    """A fixed order would put the same tasks into the same step again and again."""
    rows = many(30)
    first, second = (prompts(draw(rows, 30, step, seed=0)) for step in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_shuffling_leaves_its_input_alone() -> None:
    rows = many(10)
    shuffle(rows, 0)
    assert rows == many(10)


def test_mix_refuses_an_empty_split(tmp_path: Path) -> None:
    empty = config(tmp_path, train=[])
    with pytest.raises(TaskError, match=r"tasks\.train has no rows"):
        mix(empty.train, "train", None, seed=0)
