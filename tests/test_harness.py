"""`opcd.harness`: the real lm-eval on local tasks, against answers computed without it."""

import importlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opcd.adapters import adapter_off, save_weights
from opcd.assembly import Parts, assemble
from opcd.config import Run
from opcd.errors import HarnessError, RunFolderError
from opcd.harness import (
    Benchmarks,
    ask,
    check_installed,
    check_tasks,
    conditions,
    harness_run,
    index_tasks,
    metrics_of,
    read_tasks,
    subtract,
    wrap,
)
from opcd.programs import open_baked
from opcd.runs import create_run, write_json
from opcd.types import Message
from tiny import log_probs_of, logits, make_run, nudge
from worlds import write_jsonl

QUESTIONS = tuple(f"What is {word}?" for word in ("a kettle", "Paris", "JSON", "a shop", "anger"))
CHOICES = ("happy", "angry", "Mill Lane")
TOKENS = 6
SYSTEM = "Answer in verse."

GENERATE = """
task: local_generate
output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
SHARED = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file!r}}}, cache_dir: {cache!r}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
metadata: {{version: 3.0}}
"""


def greedy(model: Any, parts: Parts, turns: Sequence[Message]) -> str:
    """The answer of `generate` alone, up to the end of its first line."""
    ids_1S = torch.tensor([parts.renderer.encode(parts.renderer.text(turns))])
    found_1S = model.generate(
        input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S), max_new_tokens=TOKENS,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    answer = found_1S[0, ids_1S.shape[1] :].tolist()
    return parts.renderer.tokenizer.decode(answer, skip_special_tokens=True).split("\n")[0]


@torch.no_grad()
def likeliest(model: Any, parts: Parts, turns: Sequence[Message]) -> int:
    """Which choice has the most probability after the prompt, one pass a token."""
    prompt = parts.renderer.encode(parts.renderer.text(turns))

    def nats(choice: str) -> float:
        ids = parts.renderer.encode(choice)
        scores_TV = log_probs_of(model, prompt, ids)
        return sum(float(row_V[token]) for row_V, token in zip(scores_TV, ids, strict=True))

    found = [nats(choice) for choice in CHOICES]
    return found.index(max(found))


def asked(question: str, system: str = "") -> list[Message]:
    turns = [Message("user", question)]
    return [Message("system", system), *turns] if system else turns


def baked_run(folder: Path, model_path: Path, *overrides: str) -> Run:
    """A run whose best weights are a nudged adapter."""
    config = make_run(folder, model_path, *overrides)
    run, parts = create_run(config), assemble(config)
    nudge(parts.student, seed=5, size=0.4)
    save_weights(parts.student, run.best)
    write_json(run.best / "best.json", {"step": 3})
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    config = baked_run(tmp_path_factory.mktemp("run"), tiny_model_path)
    return config.out / config.name


@pytest.fixture
def parts(run: Path) -> Parts:
    found = open_baked(run)[1]
    found.student.eval()
    return found


@pytest.fixture(scope="module")
def tasks(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local task files; the base model's own answers are right for all questions but the last."""
    folder = tmp_path_factory.mktemp("tasks")
    parts = open_baked(run)[1]
    model = parts.base.model.eval()
    with adapter_off(model):
        answers = [greedy(model, parts, asked(question)) for question in QUESTIONS[:-1]]
        best = [likeliest(model, parts, asked(question)) for question in QUESTIONS]
    assert len(set(answers)) > 1 and all(answers), "the world is too simple"
    for name, task, targets in (
        ("generate", GENERATE, [*answers, "none of these"]),
        ("choice", CHOICE, [*best[:-1], (best[-1] + 1) % len(CHOICES)]),
    ):
        rows = [
            {"question": question, "target": target, "choices": CHOICES}
            for question, target in zip(QUESTIONS, targets, strict=True)
        ]
        file = write_jsonl(folder / f"{name}.jsonl", rows)
        text = (task + SHARED).format(file=str(file), cache=str(folder / "cache"))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def both(tasks: Path, **more: Any) -> Benchmarks:
    return Benchmarks(("local_generate", "local_choice"), tasks, **more)


def targets_of(tasks: Path, name: str) -> list[Any]:
    lines = (tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["target"] for line in lines]


def share(found: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
    """A share of rows and its standard error, as lm-eval defines it."""
    right = [float(a == b) for a, b in zip(found, wanted, strict=True)]
    mean, n = sum(right) / len(right), len(right)
    spread = sum((r - mean) ** 2 for r in right) / (n - 1)
    return {"mean": pytest.approx(mean), "stderr": pytest.approx(math.sqrt(spread / n))}  # type: ignore


def test_the_numbers_are_those_of_an_independent_computation(
    run: Path, tasks: Path, parts: Parts
) -> None:
    said: list[str] = []
    found = harness_run(run, both(tasks, batch_size=2), said.append)
    assert json.loads((run / "harness.json").read_text(encoding="utf-8")) == found
    assert [line.partition(":")[0] for line in said] == ["base", "in_context", "baked"]
    wanted: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "base": ("", adapter_off),
        "in_context": (SYSTEM, adapter_off),
        "baked": ("", nullcontext),
    }
    right, best = targets_of(tasks, "generate"), targets_of(tasks, "choice")
    for condition, (system, weights) in wanted.items():
        model = parts.student
        turns = [asked(question, system) for question in QUESTIONS]
        with weights(model):
            answers = [greedy(model, parts, each) for each in turns]
            chosen = [likeliest(model, parts, each) for each in turns]
        assert found["tasks"]["local_generate"][condition] == {"exact_match": share(answers, right)}
        assert found["tasks"]["local_choice"][condition] == {"acc": share(chosen, best)}
    measured = found["tasks"]["local_generate"]
    assert measured["base"]["exact_match"]["mean"] == 0.8
    assert measured["baked"] != measured["base"], "the adapter has said nothing"
    assert measured["difference"]["exact_match"]["mean"] == pytest.approx(
        measured["baked"]["exact_match"]["mean"] - 0.8
    )


def test_what_harness_json_says_beside_the_numbers(run: Path, tasks: Path) -> None:
    found = harness_run(run, Benchmarks(("local_choice",), tasks, limit=2), lambda _: None)
    assert found.keys() == {
        *("tasks", "n", "versions", "shots", "limit", "chat_template", "lm_eval", "checkpoint")
    }
    assert (found["limit"], found["n"], found["checkpoint"]) == (2, {"local_choice": 2}, "step-3")
    assert (found["versions"], found["shots"]) == ({"local_choice": 3.0}, {"local_choice": 0})
    assert found["lm_eval"] == importlib.metadata.version("lm_eval")
    assert list(found["tasks"]) == ["local_choice"]
    assert list(found["tasks"]["local_choice"]) == ["base", "in_context", "baked", "difference"]


def test_base_answers_as_a_model_that_never_had_an_adapter(
    tasks: Path, parts: Parts, tiny_model_path: Path
) -> None:
    """Row by row, text by text and nat by nat; the adapter is on again afterwards."""
    benchmarks = both(tasks)
    manager = index_tasks(benchmarks)
    before = logits(parts.student)
    found = ask(conditions(parts, benchmarks)["base"], parts, manager, benchmarks)
    torch.testing.assert_close(logits(parts.student), before, rtol=0, atol=0)
    with adapter_off(parts.student):
        assert (logits(parts.student) - before).abs().max() > 0.1
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    wanted = evaluator.simple_evaluate(
        model=wrap(plain, parts, 1),
        tasks=list(benchmarks.tasks),
        task_manager=index_tasks(benchmarks),
        apply_chat_template=True,
    )
    for task in benchmarks.tasks:
        rows = zip(found["samples"][task], wanted["samples"][task], strict=True)
        for own, other in rows:
            assert own["arguments"] == other["arguments"]
            assert own["filtered_resps"] == other["filtered_resps"]
    assert found["results"] == wanted["results"]


def test_without_a_chat_template_the_harness_asks_plainly_and_has_no_place_for_the_context(
    tasks: Path, parts: Parts
) -> None:
    plain = both(tasks, chat_template=False)
    assert list(conditions(parts, plain)) == ["base", "baked"]
    for benchmarks, asked_in_chat in ((plain, False), (both(tasks), True)):
        found = ask(
            conditions(parts, benchmarks)["baked"], parts, index_tasks(benchmarks), benchmarks
        )
        prompts = [row["arguments"][0][0] for row in found["samples"]["local_generate"]]
        assert all(("<|im_start|>" in prompt) == asked_in_chat for prompt in prompts)
        assert not any(SYSTEM in prompt for prompt in prompts)


def test_only_a_system_prompt_is_given_to_the_harness(
    tmp_path: Path, tiny_model_path: Path, parts: Parts, tasks: Path
) -> None:
    """Examples would be lost, and so would a system message that the template refuses."""
    assert conditions(parts, both(tasks))["in_context"].system == SYSTEM
    rows = write_jsonl(tmp_path / "shots.jsonl", [{"prompt": "a", "response": "b"}])
    config = make_run(tmp_path, tiny_model_path, f'context={{type="examples", path="{rows}"}}')
    assert list(conditions(assemble(config), both(tasks))) == ["base", "baked"]
    parts.renderer.tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('none') if m.role == 'system' else m.content }}"
        "{% endfor %}"
    )
    assert list(conditions(parts, both(tasks))) == ["base", "baked"]


def test_a_run_in_all_its_weights_has_a_base_of_its_own(
    tmp_path: Path, tiny_model_path: Path, tasks: Path, run: Path
) -> None:
    full = ('model.tuning={type="full"}', 'teacher={type="frozen"}')
    config = baked_run(tmp_path, tiny_model_path, *full)
    found = harness_run(config.out / config.name, both(tasks), lambda _: None)["tasks"]
    adapted = harness_run(run, both(tasks), lambda _: None)["tasks"]
    for task in found:
        assert found[task]["base"] == adapted[task]["base"]
    assert found["local_generate"]["base"] != found["local_generate"]["baked"]


def test_metrics_lose_the_name_of_no_filter_only() -> None:
    row = {
        "name": "gsm8k",
        "sample_len": 4,
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.1,
        "f1,none": 0.5,
        "f1_stderr,none": "N/A",
        "perplexity,none": math.inf,
    }
    assert metrics_of(row) == {
        "exact_match,strict-match": {"mean": 0.25, "stderr": 0.1},
        "f1": {"mean": 0.5, "stderr": None},
        "perplexity": {"mean": None, "stderr": None},
    }


def test_a_difference_has_the_error_of_its_pairs_if_it_is_their_mean() -> None:
    """Right and wrong on the same rows but one: the pairs differ less than the shares are sure."""
    rows = {
        "base": {"acc": {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}},
        "baked": {"acc": {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}},
    }
    measured = {
        "base": {"acc": {"mean": 0.5, "stderr": 0.29}, "f1": {"mean": 0.4, "stderr": 0.2}},
        "baked": {"acc": {"mean": 0.25, "stderr": 0.25}, "f1": {"mean": 0.3, "stderr": 0.2}},
    }
    found = subtract(measured, rows)
    assert found["acc"] == {"mean": -0.25, "stderr": pytest.approx(0.25)}
    assert found["f1"] == {"mean": pytest.approx(-0.1), "stderr": None}
    rows["baked"]["acc"][0] = 0.0
    assert subtract(measured, rows)["acc"]["stderr"] is None, "no mean of these rows"


def test_names_are_read_once_each() -> None:
    assert read_tasks("gsm8k, ifeval,,gsm8k") == ("gsm8k", "ifeval")
    with pytest.raises(HarnessError, match=r"--tasks ',' names no task.*--tasks ifeval,gsm8k"):
        read_tasks(",")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HarnessError, match=r"not installed; run pip install 'opcd-lm\[eval\]'"):
        check_installed()


def test_a_run_without_best_weights_is_refused_before_tasks_are_read(
    tmp_path: Path, tiny_model_path: Path, tasks: Path
) -> None:
    folder = create_run(make_run(tmp_path, tiny_model_path))
    with pytest.raises(RunFolderError, match=r"has no best/ yet; train it"):
        harness_run(folder.path, Benchmarks(("none such",), tasks), lambda _: None)


def test_unknown_tasks_are_refused_with_names_like_them(tasks: Path) -> None:
    manager = index_tasks(both(tasks))
    with pytest.raises(HarnessError, match=r"'local_choise' among 2; did you mean local_choice"):
        check_tasks(manager, ["local_generate", "local_choise"])
    with pytest.raises(HarnessError, match=r"no task, group or tag 'xyz' among 2; lm-eval ls tas"):
        check_tasks(manager, ["xyz"])


def test_public_tasks_are_found_beside_local_ones(tasks: Path) -> None:
    """Takes as long as lm-eval takes to list its own."""
    manager = index_tasks(Benchmarks(("local_choice", "gsm8k"), tasks))
    assert {"gsm8k", "ifeval", "local_choice"} <= set(manager.all_tasks)


BROKEN = {
    "no_file": "data_files: {test: /no/such/file.jsonl}",
    "no_rows": "data_files: {test: EMPTY}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_task_without_rows_is_refused_before_a_model_is_loaded(
    tmp_path: Path, run: Path, name: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    data = BROKEN[name].replace("EMPTY", str(tmp_path / "empty.jsonl"))
    (tmp_path / "task.yaml").write_text(
        f"task: {name}\ndataset_path: json\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_kwargs: {{{data[:-1]}}}, cache_dir: {str(tmp_path / 'cache')!r}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{target}}'\n",
        encoding="utf-8",
    )
    with pytest.raises(HarnessError, match=rf"--tasks {name}: lm_eval cannot load this \(\w+: "):
        harness_run(run, Benchmarks((name,), tmp_path), lambda _: None)


def test_a_group_of_nothing_evaluates_nothing(tmp_path: Path) -> None:
    (tmp_path / "group.yaml").write_text("group: hollow\ntask: []\n", encoding="utf-8")
    tasks: Any = importlib.import_module("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=tmp_path, include_defaults=False)
    with pytest.raises(HarnessError, match="no task behind this name, so nothing would be eval"):
        check_tasks(manager, ["hollow"])


def test_code_of_a_model_is_never_run(tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "generate.yaml").read_text(encoding="utf-8")
    (tmp_path / "unsafe.yaml").write_text(text + "unsafe_code: true\n", encoding="utf-8")
    manager = index_tasks(Benchmarks(("local_generate",), tmp_path))
    with pytest.raises(HarnessError, match="local_generate would run code that the model writes"):
        check_tasks(manager, ["local_generate"])


def test_an_include_path_is_a_folder(tasks: Path) -> None:
    with pytest.raises(HarnessError, match=r"choice\.yaml' is no folder"):
        index_tasks(Benchmarks(("local_choice",), tasks / "choice.yaml"))
