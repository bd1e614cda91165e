"""The command line: what it prints, and with which code it ends."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from measured import measured_run
from opcd import authoring, cli
from opcd.authoring import Writer
from opcd.config.training import Rendering
from opcd.instructions import parse_instructions
from opcd.rendering import Renderer
from opcd.rollouts.engine import Prompt
from opcd.rollouts.scripted import ScriptedEngine
from tiny import write_recipe
from worlds import END_ID, tokenizer, write_jsonl, write_run

Opcd = Callable[..., tuple[int, str, str]]


@pytest.fixture
def opcd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Opcd:
    """The command in this process, in a folder of its own: exit code, output, errors."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1" if "DISABLE" in name else "error")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "console", cli.Console(width=200))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opcd", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
            raise SystemExit(0)
        found = capsys.readouterr()
        code = done.value.code
        return (code if isinstance(code, int) else 0), found.out, found.err

    return run


VERBS = (
    "check",
    "gap",
    "train",
    "evaluate",
    "compare",
    "search",
    "sample",
    "costs",
    "prompts",
    "export",
    "harness",
    "report",
    "play",
)


def test_check_knows_of_a_launch_whose_servers_outlast_it(opcd: Opcd, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    rollout = "rollout={type='vllm', servers=['http://x'], timeout_s=300}"
    assert opcd("check", path, rollout)[0] == 0
    code, _, err = opcd("check", path, rollout, "--processes", "2")
    assert code == 2 and "launch.timeout_s" in err


def test_help_names_the_verbs(opcd: Opcd) -> None:
    code, out, _ = opcd("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(opcd: Opcd, verb: str) -> None:
    code, out, _ = opcd(verb, "--help")
    assert code == 0
    assert "Usage" in out


def test_check_says_what_would_be_run(opcd: Opcd, tmp_path: Path) -> None:
    path = write_run(tmp_path / "recipe")
    code, out, err = opcd("check", path)
    assert (code, err) == (0, "")
    assert "run desk: 4 steps of 12 tasks, 6 anchors and 0 tasks with the context" in out
    assert "tasks: 8 train, 3 validation, 3 test" in out
    assert "is a run that can be started" in out


def test_check_takes_overrides(opcd: Opcd, tmp_path: Path) -> None:
    code, out, _ = opcd("check", write_run(tmp_path / "recipe"), "steps=9", "name=other")
    assert code == 0
    assert "run other: 9 steps" in out


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["loss.support={type='top_k', tail='drop'}"], "tail = 'drop' is no divergence"),
        (["teacher={type='live'}"], "a live teacher moves with the student"),
        (["rollout.teacher_fraction=1.0"], "classic off-policy distillation takes loss.direction"),
    ],
)
def test_check_warns_of_what_is_known_to_go_wrong(
    opcd: Opcd, tmp_path: Path, overrides: list[str], warning: str
) -> None:
    code, out, _ = opcd("check", write_run(tmp_path / "recipe"), *overrides)
    assert code == 0
    assert f"warning: {warning}" in out


def test_check_warns_where_nothing_chooses_the_best_step(opcd: Opcd, tmp_path: Path) -> None:
    path = write_run(tmp_path / "recipe")
    path.write_text(path.read_text().replace('validation = "validation.jsonl"', ""))
    assert "warning: no validation split" in opcd("check", path)[1]
    assert "warning" not in opcd("check", path, "tasks.validation_share=0.5")[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "ConfigError: run.toml:\n  stepz: there is no such key"),
        ("teacher={type='ema', decay=1.5}", "teacher.decay = 1.5: Input should be less than 1"),
        ("context.path=none.md", "none.md': there is no such file"),
        ("tasks.test=none.jsonl", "none.jsonl': there"),
        ("anchor.path=none.json", "none.json': there is no such file"),
        ("grader={type='function', target='a'}", "ConfigError: target = 'a' names no function"),
        ("context={type='column'}", "ContextError: row 'train-00000' has no context"),
    ],
)
def test_wrong_input_ends_with_2_and_a_message(
    opcd: Opcd, tmp_path: Path, override: str, message: str
) -> None:
    code, out, err = opcd("check", write_run(tmp_path / "recipe"), override)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_shared_row_ends_with_2(opcd: Opcd, tmp_path: Path) -> None:
    path = write_run(tmp_path / "recipe")
    with (path.parent / "test.jsonl").open("a") as stream:
        stream.write('{"prompt": "Train  question 0?", "answer": "x", "id": "copy"}\n')
    code, _, err = opcd("check", path)
    assert code == 2
    assert "TaskError: test row 'copy' and train row 'train-00000' share the prompt" in err


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_missing_file_ends_with_2(opcd: Opcd, verb: str) -> None:
    code, _, err = opcd(verb, "none.toml")
    assert code == 2
    assert "ConfigError: 'none.toml': there is no such file" in err


@pytest.mark.parametrize(
    "verb",
    [
        ["evaluate"],
        ["sample", "hi"],
        ["costs"],
        ["export", "there"],
        ["harness", "--tasks", "gsm8k"],
        ["report"],
    ],
)
def test_what_is_no_run_ends_with_2(opcd: Opcd, tmp_path: Path, verb: list[str]) -> None:
    code, _, err = opcd(verb[0], tmp_path, *verb[1:])
    assert code == 2
    assert "is not a run: it has no config.json" in err


def test_an_existing_run_is_left_alone(opcd: Opcd, tmp_path: Path) -> None:
    """Said before any model is loaded: the one named here is not even there."""
    path = write_run(tmp_path / "recipe")
    earlier = tmp_path / "runs" / "desk" / "evaluation.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("results")
    code, _, err = opcd("train", path, "model.path=./no_such_model")
    assert code == 2
    assert "RunFolderError: runs/desk exists" in err
    assert "--overwrite" in err
    assert earlier.read_text() == "results"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-price", "0"], "CostsError: --input-price 0: where input costs nothing"),
        (["--training-price", "-2"], "CostsError: --training-price -2: a price is a number above"),
        (["--cached-price", "nan"], "CostsError: --cached-price nan: a price is a number above 0"),
        (["--batch-sizes", "1,0"], "CostsError: --batch-sizes '1,0': '0' is no batch size"),
        (["--soft-prompt-steps", "3"], "no soft prompt is trained without --alternatives"),
    ],
)
def test_costs_refuses_options_before_it_looks_at_the_run(
    opcd: Opcd, options: list[str], message: str
) -> None:
    code, out, err = opcd("costs", "none", *options)
    assert (code, out) == (2, "")
    assert message in err


def test_costs_prints_tables_or_json(opcd: Opcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options arrive at the price that they name."""
    from opcd import costing

    seen: list[object] = []

    def cost_run(*arguments: object) -> dict[str, object]:
        seen.extend(arguments[:3])
        return {"prompt_tokens": {"rows": 3}, "notes": [{"about": "run", "note": "[a] note"}]}

    monkeypatch.setattr(costing, "cost_run", cost_run)
    prices = ("--input-price", "1", "--output-price", "2", "--cached-price", "3")
    code, out, _ = opcd("costs", "there", *prices, "--training-price", "4", "--batch-sizes", "2,8")
    assert code == 0
    assert "run: [a] note" in out and "rows" in out
    assert seen == [Path("there"), costing.Prices(1.0, 2.0, 3.0, 4.0), (2, 8)]
    code, out, _ = opcd("costs", "there", "--json")
    assert (code, json.loads(out)["prompt_tokens"]) == (0, {"rows": 3})


def test_harness_passes_its_options_on_and_prints_a_table(
    opcd: Opcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opcd import harness

    seen: list[object] = []

    def harness_run(*arguments: object) -> dict[str, object]:
        seen.extend(arguments[:2])
        row = {"acc": {"mean": 0.5, "stderr": 0.25}}
        task = {"base": row, "baked": row, "difference": {"acc": {"mean": 0.0, "stderr": None}}}
        head = {"lm_eval": "1.2", "checkpoint": "step-4", "limit": 7}
        return head | {"n": {"a": 4}, "tasks": {"a": task}}

    monkeypatch.setattr(harness, "harness_run", harness_run)
    options = ("--include-path", "mine", "--limit", "7", "--batch-size", "2", "--no-chat-template")
    code, out, err = opcd("harness", "there", "--tasks", "a, b,a", *options)
    assert (code, err) == (0, "")
    assert seen == [Path("there"), harness.Benchmarks(("a", "b"), Path("mine"), 7, 2, False)]
    assert "lm_eval 1.2, step-4, at most 7 rows of a task" in out
    assert "0.500 +- 0.250" in out and "+0.000" in out
    code, out, err = opcd("harness", "there", "--tasks", " ,")
    assert (code, out) == (2, "")
    assert "HarnessError: --tasks ' ,' names no task" in err


def test_train_can_measure_at_once(opcd: Opcd, tmp_path: Path, tiny_model_path: Path) -> None:
    """With the results that `opcd evaluate` has."""
    path = write_recipe(tmp_path / "recipe", tiny_model_path)
    keys = ("steps=3", f"out={tmp_path}", "evaluation.every_steps=1", "optimizer.lr=0.02")
    code, out, _ = opcd("train", path, *keys, "--evaluate")
    assert code == 0 and "test split, step-" in out
    file = tmp_path / "tiny" / "evaluation.json"
    found = json.loads(file.read_text())
    assert opcd("evaluate", tmp_path / "tiny", "--again")[0] == 0
    assert json.loads(file.read_text()) == found


def test_messages_are_not_read_as_markup(opcd: Opcd, tmp_path: Path) -> None:
    """Rich would swallow `[grader]`, the very table a message tells to remove."""
    path = write_run(tmp_path / "recipe")
    with (path.parent / "test.jsonl").open("a") as stream:
        stream.write('{"prompt": "new?"}\n')
    code, _, err = opcd("check", path)
    assert code == 2
    assert "remove [grader]" in err


def test_check_finds_a_row_without_an_answer_for_a_choice_grader(
    opcd: Opcd, tmp_path: Path
) -> None:
    path = write_run(tmp_path / "recipe")
    with (path.parent / "test.jsonl").open("a") as stream:
        stream.write('{"prompt": "new?"}\n')
    code, _, err = opcd(
        "check", path, "grader={type='choice', choices=['word0', 'word1', 'word2']}"
    )
    assert (code, "has no answer" in err) == (2, True)


def test_a_class_may_be_selected_by_if_the_rows_that_validate_have_it(
    opcd: Opcd, tmp_path: Path
) -> None:
    """Found before a run starts, not after its first steps; the first row alone does not tell."""
    path = write_run(tmp_path / "recipe")
    for split in ("validation", "test"):
        rows = [{"prompt": f"{split} {answer}?", "answer": answer} for answer in ("yes", "no")]
        write_jsonl(path.parent / f"{split}.jsonl", rows)
    wanted = ("grader={type='choice', choices=['yes', 'no']}", "evaluation.select_by=correct_no")
    assert opcd("check", path, *wanted)[0] == 0
    code, _, err = opcd("check", path, *wanted, "evaluation.validation_rows=1")
    assert (code, "'correct_no' is no metric of the grader" in err) == (2, True)


def test_report_says_what_it_wrote(opcd: Opcd, tmp_path: Path) -> None:
    runs = [measured_run(tmp_path / name) for name in ("a", "b")]
    code, out, err = opcd("report", *runs, "--out", "both.html", "--figures", "curves")
    assert (code, err) == (0, "")
    assert "both.html: 0." in out
    assert "curves: 14 files of figures" in out
    assert (tmp_path / "both.html").is_file()
    assert len(list((tmp_path / "curves").iterdir())) == 14


def test_a_run_that_was_not_measured_is_not_reported(opcd: Opcd, tmp_path: Path) -> None:
    run = measured_run(tmp_path / "a")
    (run / "evaluation.json").unlink()
    code, out, err = opcd("report", run)
    assert (code, out) == (2, "")
    assert f"run opcd evaluate {run}" in err


def test_an_unknown_verb_ends_with_2(opcd: Opcd) -> None:
    assert opcd("bake")[0] == 2


def scripted_writer(kettles: int) -> Callable[..., Writer]:
    """Stands in for the model: so many of its messages are new, the others repeat the first."""
    ids = tokenizer()

    def script(policy: str, prompt: Prompt) -> list[int]:
        del policy
        kind, number = prompt.task_id.split("-")[:2]
        words = "".join(f" {w}{int(number) % kettles}" for w in "abcd")
        return [*ids.encode(" a late parcel" if kind == "topics" else words), END_ID]

    def load(path: str, device: str, instructions: Path | None) -> Writer:
        del device, instructions
        parts = (
            parse_instructions(f"### user\n{slots}\n### assistant\n{opening}", "", [])
            for slots, opening in (("{context}", "1."), ("{context} {topic}", "My"))
        )
        return Writer(path, ScriptedEngine(script), Renderer(ids, Rendering(), 512), *parts)

    return load


def test_prompts_writes_rows_and_counts_what_it_dropped(
    opcd: Opcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than asked for is no failure, but it is said."""
    monkeypatch.setattr(authoring, "load_writer", scripted_writer(kettles=3))
    toml = write_run(tmp_path / "recipe")
    code, out, err = opcd("prompts", toml, "--out", "rows.jsonl", "--count", "5", "--rounds", "2")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"My a{n} b{n} c{n} d{n}" for n in range(3)]
    assert {row["source"]["model"] for row in rows} == {"smollm2-135m"}
    assert "exact duplicate" in out and "Jaccard" not in out
    assert "only 3 of 5 messages after 2 rounds, mostly lost as: 29 exact duplicate" in out
    assert "rows.jsonl: 3 messages" in out


def test_prompts_takes_another_model_and_examples(
    opcd: Opcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authoring, "load_writer", scripted_writer(kettles=3))
    toml = write_run(tmp_path / "recipe")
    examples = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "my a1 b1 c1 d1!"}])
    more = ("--examples", examples, "--model", "other", "--count", "2", "--rounds", "1")
    code, out, _ = opcd("prompts", toml, "--out", "rows.jsonl", *more)
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert (code, [row["source"]["model"] for row in rows]) == (0, ["other", "other"])
    assert [row["prompt"][3:5] for row in rows] == ["a0", "a2"]
    assert "repeats an example" in out and "Jaccard" in out


def test_prompts_leaves_a_file_alone(opcd: Opcd, tmp_path: Path) -> None:
    """Said before any model is loaded."""
    toml = write_run(tmp_path / "recipe")
    arguments = ("prompts", toml, "--out", toml.parent / "train.jsonl", "--model", "./none")
    before = (toml.parent / "train.jsonl").read_text()
    code, _, err = opcd(*arguments)
    assert (code, "AuthoringError" in err, "--overwrite" in err) == (2, True, True)
    code, _, err = opcd(*arguments, "--overwrite")
    assert (code, "ModelError" in err) == (2, True)
    assert (toml.parent / "train.jsonl").read_text() == before
