"""The paper's recipes: its settings, and every command of their README on tiny models.

The models are random and small, of the architectures that the recipes name, with chat templates of
those families' kinds. What runs is the recipe's own file; overrides make it small and local.
"""

import importlib.util
import json
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from opcd.checking import check_run
from opcd.config import Run, load_config
from opcd.config.inputs import Public
from opcd.rounds import learn
from opcd.runs import RunFolder, read_best, read_jsonl
from opcd.training import train
from tiny import SHAPE, build
from worlds import CHATML, DEFAULT_SYSTEM, SPECIALS, tokenizer, write_jsonl

PAPER = Path(__file__).parents[1] / "recipes" / "paper"
README = (PAPER / "README.md").read_text(encoding="utf-8")
RUNS = sorted(PAPER.glob("*.toml"))

LLAMA_SPECIALS = (
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
LLAMA = (
    "{% set given = messages[0]['role'] == 'system' %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday is a day.\\n\\n' }}"
    "{{ (messages[0]['content'] if given else '') + '<|eot_id|>' }}"
    "{% for message in (messages[1:] if given else messages) %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""As Llama 3's: always opens with a system turn, whatever the conversation has."""
QWEN3 = CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
"""As Qwen 3's: leaves it to the model to think, and closes an empty thought where it should not."""
FAMILIES: dict[str, tuple[type, str, Sequence[str]]] = {
    "meta-llama/Llama-3.1-8B-Instruct": (LlamaConfig, LLAMA, LLAMA_SPECIALS),
    "meta-llama/Llama-3.2-3B-Instruct": (LlamaConfig, LLAMA, LLAMA_SPECIALS),
    "Qwen/Qwen2.5-7B-Instruct": (Qwen2Config, DEFAULT_SYSTEM, SPECIALS),
    "Qwen/Qwen2.5-3B-Instruct": (Qwen2Config, DEFAULT_SYSTEM, SPECIALS),
    "Qwen/Qwen3-8B": (Qwen3Config, QWEN3, SPECIALS),
    "Qwen/Qwen3-1.7B": (Qwen3Config, QWEN3, SPECIALS),
    "Qwen/Qwen3-4B-Instruct-2507": (Qwen3Config, CHATML, SPECIALS),
}
"""Hub id -> configuration, chat template, special tokens."""
SMALL = (
    "model.device=cpu",
    "steps=2",
    "batch.prompts_per_step=4",
    "batch.rows_per_forward=2",
    "rollout.max_new_tokens=6",
    "rollout.batch_rows=16",
    "evaluation.validation_rows=2",
    "evaluation.test_rows=2",
    "evaluation.suites=[]",
)
FEW_BOARDS = (
    "game.boards={train = 4, extraction = 2, validation = 2, test = 2}",
    "game.episodes=1",
    "game.turns=7",
)
FEW_LESSONS = (
    "experience.seeds=2",
    "experience.steps=2",
    "experience.score_every=2",
    "experience.max_tokens=200",
)
COLUMNS: dict[str, Any] = {
    "medmcqa": lambda i: {
        "id": i,
        "question": f"Drug {i}?",
        **{f"op{letter}": f"drug {letter}" for letter in "abcd"},
        "cop": i % 4,
    },
    "hatecheck": lambda i: {
        "functionality": "f",
        "case_id": i,
        "test_case": f"case {i}",
        "label_gold": "hateful" if i % 2 else "non-hateful",
        "templ_id": i // 2,
    },
    "tweet_offensive": lambda i: {"text": f"tweet {i}", "label": i % 2},
    "ethos": lambda i: {"text": f"comment {i}", "label": i % 2},
    "dapo_math": lambda i: {
        "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
        "reward_model": {"ground_truth": str(i + 1)},
    },
}
"""Public set -> one of its rows, in its own columns."""


def read_commands() -> list[list[str]]:
    """Those of the README's table, split into words."""
    lines = re.findall(r"^\| `(opcd [^`]+)` \|", README, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


COMMANDS = read_commands()


def named(words: list[str]) -> str:
    """The name of the run that a command trains: the test's name."""
    given = [word.partition("=")[2] for word in words if word.startswith("name=")]
    return given[0] if given else Path(words[2]).stem


def overrides_of(words: list[str]) -> list[str]:
    return [word for word in words[3:] if "=" in word]


def estimate() -> Any:
    spec = importlib.util.spec_from_file_location("estimate", PAPER / "estimate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hub id -> a folder with a tiny random model of that architecture."""
    found: dict[str, Path] = {}
    for number, (hub_id, (config, template, specials)) in enumerate(FAMILIES.items()):
        folder = tmp_path_factory.mktemp("models") / hub_id.rpartition("/")[2]
        shape = {
            **SHAPE,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": "8B" not in hub_id,
        }
        build(config(**shape), seed=number).save_pretrained(folder)
        tokenizer(template, specials).save_pretrained(folder)
        found[hub_id] = folder
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Public set -> a file with some rows in its own columns."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        name: write_jsonl(folder / f"{name}.jsonl", [row(i) for i in range(80)])
        for name, row in COLUMNS.items()
    }


@pytest.fixture(scope="module")
def writer() -> Iterator[str]:
    """A server that writes a new item of every trace it is shown; its address.

    Random models write none, and there would be nothing to bake in.
    """
    numbers = count()

    class Writer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            item = f"- EXPERIENCE ITEM: lesson {next(numbers)} is no other."
            choice = {"message": {"content": item}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Writer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def made_small(
    words: list[str], models: dict[str, Path], rows: dict[str, Path], out: Path, *more: str
) -> Run:
    """A command's run, with nothing in it but what makes it small and local."""
    path, overrides = Path(words[2]), overrides_of(words)
    run = load_config(PAPER / path.name, overrides)
    local = [f"out={out}", f"model.path={models[run.model.path]}", *SMALL, *more]
    if teacher := getattr(run.teacher, "path", None):
        local.append(f"teacher.path={models[teacher]}")
    if run.tasks:
        sources = [source for source in run.tasks.train if isinstance(source, Public)]
        tables = (
            f"{{type='public', name='{s.name}', split='{s.split}', path='{rows[s.name]}'}}"
            for s in sources
        )
        local.append(f"tasks.train=[{', '.join(tables)}]")
    if run.game:
        local += FEW_BOARDS
    if run.experience:
        local += FEW_LESSONS
    return load_config(PAPER / path.name, [*overrides, *local])


def check_trained(folder: RunFolder, run: Run) -> None:
    """Two steps that had something to learn from, at the recipe's learning rate."""
    steps = list(read_jsonl(folder.metrics))
    assert [step["step"] for step in steps] == [0, 1]
    assert all(step["kl_nats_per_token"] > 0.0 and step["grad_norm"] > 0.0 for step in steps)
    assert all(step["lr"] == run.optimizer.lr for step in steps), "no warm-up, no decay"
    assert steps[0]["skipped_steps"] == 0
    assert read_best(folder)["step"] == 2


# --- the files and the README


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_recipe_can_be_started(path: Path) -> None:
    run, facts = check_run(path)
    assert run.name == f"paper_{path.stem}"
    assert [fact for fact in facts if fact.startswith("warning")] == []


def test_every_recipe_has_a_command_and_every_command_its_own_run() -> None:
    assert {Path(words[2]).name for words in COMMANDS} == {path.name for path in RUNS}
    names = [load_config(PAPER / Path(w[2]).name, overrides_of(w)).name for w in COMMANDS]
    assert len(set(names)) == len(names) == 15


def test_every_other_command_of_the_readme_has_keys_that_exist() -> None:
    """Those in running text and in blocks."""
    text = README.replace("\\\n", " ").replace("RUN.toml", "recipes/paper/medical.toml")
    found = re.findall(r"opcd \w+ recipes/paper/\w+\.toml[^`|\n]*", text)
    others = [words for line in found if (words := shlex.split(line)) not in COMMANDS]
    assert {words[1] for words in others} >= {"train", "compare", "gap", "search"}
    for words in others:
        load_config(PAPER / Path(words[2]).name, overrides_of(words))


@pytest.mark.parametrize("words", COMMANDS, ids=named)
def test_the_readme_says_what_the_estimate_says(words: list[str]) -> None:
    """So that neither a recipe nor the arithmetic changes without it."""
    (line,) = [line for line in README.splitlines() if f"`{shlex.join(words)}`" in line]
    run, found = load_config(PAPER / Path(words[2]).name, overrides_of(words)), estimate()
    rounds = int(words[words.index("--rounds") + 1]) if "--rounds" in words else 1
    hours = rounds * sum(found.hours(run, found.Speed(400e12, 2.4e12)).values())
    gb = found.memory_gb(run)["peak"]
    assert line.endswith(f"| {gb:.0f} | {hours:.0f} |")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_settings_are_the_papers(path: Path) -> None:
    """Written down here once more: a table of the paper, not of the recipes."""
    run = load_config(path)
    tokens, temperature, top_p = {
        "math": (16384, 0.6, 0.95),
        "medical": (512, 1.0, 0.95),
        "safety": (512, 1.0, 0.95),
        "cross_size": (512, 1.0, 0.95),
    }.get(path.stem, (1024, 0.7, 0.8))
    rounds = path.stem == "rounds"
    assert (run.rollout.max_new_tokens, run.rollout.temperature) == (tokens, temperature)
    assert (run.rollout.top_p, run.loss.temperature) == (1.0, temperature)
    drawn = run.evaluation
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (temperature, top_p, 20)
    assert (run.steps, run.optimizer.lr) == ((100, 1e-6) if rounds else (50, 5e-6))
    per_step = 256 if rounds else 64 if run.game else 128
    assert (run.tasks_per_step, run.anchors_per_step) == (per_step, 0)
    support = run.loss.support
    assert support.type == "top_k" and (support.k, support.of) == (256, "student")
    assert (run.loss.direction, run.loss.warmup) == ("reverse_kl", None)
    assert (run.model.tuning.type, run.teacher.type) == ("full", "frozen")
    how = run.optimizer
    assert (how.betas, how.weight_decay, how.clip_norm) == ((0.9, 0.999), 0.01, 1.0)
    assert (how.schedule, how.warmup_steps, drawn.every_steps) == ("constant", 0, 2)
    if run.experience:
        budget = 16384 if path.stem == "math" else 8192
        assert (run.experience.seeds, run.experience.max_tokens) == (10, budget)
        assert run.experience.steps == (50 if rounds else 30)
        assert run.experience.with_previous is rounds
    if run.game:
        assert not run.game.rules
        games = run.game.boards.validation * run.game.episodes
        assert drawn.validation_rows == games, "every validation game is played"
        assert run.game.boards.test * run.game.episodes == 128
    thinks = "Qwen3" in run.model.path and "Instruct" not in run.model.path
    assert run.rendering.student_thinking is (True if thinks else None)


# --- two real steps


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[1] == "compare"], ids=named)
def test_a_given_context_is_trained_for_two_steps(
    words: list[str], models: dict[str, Path], rows: dict[str, Path], tmp_path: Path
) -> None:
    run = made_small(words, models, rows, tmp_path)
    outcome = train(run)
    check_trained(outcome.folder, run)
    assert outcome.best["chosen_by"] == "correct"


LEARNING = [w for w in COMMANDS if w[1] == "experience" and "experience.use=pool" not in w]
"""Random models' lessons never help, so that every run here takes the pool: once is enough."""


@pytest.mark.parametrize("words", LEARNING, ids=named)
def test_experience_is_gathered_and_trained_for_two_steps(
    words: list[str],
    models: dict[str, Path],
    rows: dict[str, Path],
    writer: str,
    tmp_path: Path,
) -> None:
    """From the first trace to the table."""
    extractor = f"experience.extractor={{type='endpoint', url='{writer}', model='m'}}"
    run = made_small(words, models, rows, tmp_path, extractor, "experience.use=pool")
    found = learn(run, 1, lambda _: None)["rounds"][0]
    assert {"base", "items", "baked"} <= set(found["conditions"])
    for name in found["runs"].values():
        check_trained(RunFolder(tmp_path / name), run)
