"""Public data sets: their own columns become this project's rows, and what is left out is said."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from opcd.checking import check_run
from opcd.config.inputs import Public
from opcd.config.inputs import Tasks as TasksConfig
from opcd.errors import TaskError
from opcd.public_sets import SETS, convert, find_set
from opcd.tasks import load_splits
from worlds import write_jsonl, write_run

SHARED = Path(__file__).parents[2] / "shared" / "data"
"""Real rows, where there are any."""

OPTIONS = {"opa": "Aspirin", "opb": "Heparin", "opc": "Warfarin", "opd": "Alteplase"}
MEDICAL = {"id": "m1", "question": "Which drug?", **OPTIONS, "cop": 2, "choice_type": "single"}
CASE = {
    "functionality": "counter_quote_nh",
    "case_id": 31,
    "test_case": "Saying so is hateful.",
    "label_gold": "non-hateful",
    "templ_id": 9,
}
PROBLEM = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "What is 30 + 4?"}],
    "reward_model": {"ground_truth": "34", "style": "rule"},
    "extra_info": {"index": "9a9b"},
}
SUM = {"question": "3 + 4?", "answer": "Add them.\n3 + 4 = <<3+4=7>>7\n#### 7"}
ROWS: dict[str, dict[str, Any]] = {
    "medmcqa": MEDICAL,
    "tweet_offensive": {"text": "@user you fool", "label": 1},
    "hatecheck": CASE,
    "ethos": {"text": "You people!", "label": 1},
    "dapo_math": PROBLEM,
    "gsm8k": SUM,
}
"""One row of each set, with the columns it has on the hub."""
ANSWERS = {
    "medmcqa": "C",
    "tweet_offensive": "yes",
    "hatecheck": "no",
    "ethos": "yes",
    "dapo_math": "34",
    "gsm8k": "7",
}


def one(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    (found,), note = convert(name, SETS[name].splits[0], [row])
    assert note is None
    return found


def table(source: Mapping[str, Any], **more: Any) -> TasksConfig:
    return TasksConfig.model_validate({"train": {"type": "public", **source}, **more})


def test_the_names_of_the_configuration_are_those_of_the_sets() -> None:
    assert set(get_args(Public.model_fields["name"].annotation)) == set(SETS) == set(ROWS)


@pytest.mark.parametrize("name", SETS)
def test_a_row_of_the_hub_becomes_a_task_row(name: str) -> None:
    found = one(name, ROWS[name])
    assert found["answer"] == ANSWERS[name]
    assert found["prompt"].strip()
    assert found["id"].startswith(f"{name}-")
    assert found["template"]


@pytest.mark.parametrize(("cop", "answer"), [(0, "A"), (3, "D"), ("b", "B"), ("D", "D")])
def test_medmcqa_shows_its_options_and_counts_from_0(cop: Any, answer: str) -> None:
    found = one("medmcqa", {**MEDICAL, "cop": cop})
    assert found["answer"] == answer
    assert "\nA. Aspirin\nB. Heparin\nC. Warfarin\nD. Alteplase\n" in found["prompt"]
    assert "<answer>" in found["prompt"]


def test_a_medmcqa_file_that_counts_from_1_is_refused() -> None:
    """Reading it would move every answer by one; dropping its fours alone would hide that."""
    with pytest.raises(TaskError, match="counts its options from 1"):
        convert("medmcqa", "train", [MEDICAL, {**MEDICAL, "cop": 4}])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("medmcqa", {"cop": -1}, "no gold answer"),
        ("medmcqa", {"cop": None}, "no gold answer"),
        ("medmcqa", {"opc": None}, "no opc"),
        ("medmcqa", {"opd": " "}, "no opd"),
        ("medmcqa", {"question": ""}, "no question"),
        ("tweet_offensive", {"label": None}, "no gold answer"),
        ("tweet_offensive", {"text": None}, "no text"),
        ("ethos", {"label": 2}, "no gold answer"),
        ("hatecheck", {"label_gold": ""}, "no gold answer"),
        ("hatecheck", {"templ_id": None}, "no templ_id or template"),
        ("dapo_math", {"reward_model": None}, "no ground_truth"),
        ("dapo_math", {"prompt": []}, "prompt is not a single turn"),
        ("gsm8k", {"answer": "nothing"}, "answer holds no number"),
        ("gsm8k", {"answer": "7 eggs\n####"}, "answer holds no number"),
    ],
)
def test_a_malformed_row_is_left_out_and_counted(
    name: str, change: dict[str, Any], reason: str
) -> None:
    found, note = convert(name, "train", [{**ROWS[name], **change}, ROWS[name]])
    assert len(found) == 1
    assert note == f"{name} train: 1 of 2 rows left out (1 {reason})"


def test_repeats_are_left_out_and_counted() -> None:
    """DAPO-Math-17k lists each of its problems many times."""
    other = {**PROBLEM, "prompt": [{"role": "user", "content": "What is 3?"}]}
    shouted = {**PROBLEM, "prompt": [{"role": "user", "content": " WHAT is  30 + 4?"}]}
    found, note = convert("dapo_math", "train", [PROBLEM, other, PROBLEM, shouted, PROBLEM])
    assert [row["prompt"] for row in found] == ["What is 30 + 4?", "What is 3?"]
    assert note == "dapo_math train: 3 of 5 rows left out (3 repeats an earlier prompt)"


def test_contradicting_rows_are_both_left_out() -> None:
    rows = [CASE, {**CASE, "label_gold": "hateful"}, {**CASE, "test_case": "Hello."}]
    found, note = convert("hatecheck", "test", rows)
    assert [row["id"] for row in found] == ["hatecheck-31"]
    assert note is not None
    assert "2 of 3 rows left out (2 contradicts another row's answer)" in note


def test_the_cases_of_one_template_stay_together() -> None:
    """HateCheck's templates name one group after the other; medmcqa asks questions again."""
    cases = [{**CASE, "case_id": i, "test_case": f"{who} are fine."} for i, who in enumerate("ab")]
    assert len({row["template"] for row in convert("hatecheck", "test", cases)[0]}) == 1
    asked = [MEDICAL, {**MEDICAL, "id": "m2", "opa": "Insulin", "question": "which  drug?"}]
    assert len({row["template"] for row in convert("medmcqa", "train", asked)[0]}) == 1


def test_a_file_of_another_set_says_which_columns_are_wanted() -> None:
    with pytest.raises(TaskError, match=r"2 no question.*columns of openlifescienceai/medmcqa"):
        convert("medmcqa", "train", [CASE, CASE])


def test_a_split_without_answers_is_refused() -> None:
    with pytest.raises(TaskError, match=r"medmcqa has no split 'test'.*train and validation"):
        find_set("medmcqa", "test")


# --- from TOML to tasks


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SETS)
def test_local_files_of_the_same_columns_are_read(name: str, kind: str, tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[name]])
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        parquet.write_table(Table.from_pylist([ROWS[name]]), path)
    source = {"name": name, "split": SETS[name].splits[0], "path": path}
    (task,) = load_splits(table(source, group_by="template"), seed=0)["train"]
    assert task.answer == ANSWERS[name]
    assert task.group is not None


def test_sets_are_mixed_and_split_by_template(tmp_path: Path) -> None:
    paths = {
        "ethos": [{"text": f"comment {i}", "label": i % 2} for i in range(8)],
        "hatecheck": [
            {**CASE, "case_id": i, "test_case": f"case {i}", "templ_id": i // 4} for i in range(8)
        ],
    }
    sources = [
        {"type": "public", "name": name, "path": write_jsonl(tmp_path / f"{name}.jsonl", rows)}
        for name, rows in paths.items()
    ]
    tasks = {"train": sources, "test_share": 0.5, "group_by": "template"}
    splits = load_splits(TasksConfig.model_validate(tasks), seed=1)
    assert sum(map(len, splits.values())) == 16


def test_the_hub_is_asked_for_the_sets_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: Any, **more: Any) -> list[dict[str, Any]]:
        asked.append((names, more))
        return [ROWS["ethos"]]

    monkeypatch.setattr("datasets.load_dataset", load)
    load_splits(table({"name": "ethos", "revision": "r1"}), seed=0)
    assert asked == [(("iamollas/ethos", "binary"), {"split": "train", "revision": "r1"})]


@pytest.mark.parametrize("error", [ConnectionError("no hub"), ValueError("no hub")])
def test_a_hub_that_gives_nothing_is_a_message(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*names: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(TaskError, match=r"iamollas/ethos, split 'train'.*no hub.*give their path"):
        load_splits(table({"name": "ethos"}), seed=0)


def test_a_file_that_is_no_parquet_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("text")
    with pytest.raises(TaskError, match=r"rows\.parquet: not a parquet file"):
        load_splits(table({"name": "ethos", "path": tmp_path / "rows.parquet"}), seed=0)


def test_check_takes_a_parquet_file_for_what_it_is(tmp_path: Path) -> None:
    """No text, so its emptiness is not to be judged by decoding it."""
    from pyarrow import Table, parquet

    path = write_run(tmp_path / "run")
    parquet.write_table(Table.from_pylist([ROWS["ethos"]]), tmp_path / "e.parquet")
    source = f"{{type='public', name='ethos', path='{tmp_path / 'e.parquet'}'}}"
    assert "tasks: 1 train, 3 validation, 3 test" in check_run(path, [f"tasks.train={source}"])[1]


def test_check_says_what_was_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_jsonl(tmp_path / "run" / "e.jsonl", [ROWS["ethos"], ROWS["ethos"]])
    toml = path.read_text().replace(
        'train = "train.jsonl"', 'train = {type = "public", name = "ethos", path = "e.jsonl"}'
    )
    path.write_text(toml)
    _, facts = check_run(path)
    assert "ethos train: 1 of 2 rows left out (1 repeats an earlier prompt)" in facts
    assert "tasks: 1 train, 3 validation, 3 test" in facts


def test_check_refuses_a_split_without_asking_the_hub(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    source = "{type='public', name='hatecheck', split='train'}"
    with pytest.raises(TaskError, match='write split = "test"'):
        check_run(path, [f"tasks.train={source}"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not here")
@pytest.mark.parametrize("name", ["hatecheck", "gsm8k"])
def test_real_rows_are_read(name: str) -> None:
    path = SHARED / f"{name}.jsonl"
    notes: list[str] = []
    source = {"name": name, "path": path, "split": "test"}
    tasks = load_splits(table(source, group_by="template"), 0, notes)["train"]
    rows = path.read_text(encoding="utf-8").splitlines()
    assert len(tasks) == len(rows) and notes == []
    if name == "hatecheck":
        assert Counter(task.answer for task in tasks).keys() == {"yes", "no"}
    else:
        assert all(float(task.answer.replace(",", "")) is not None for task in tasks)
