"""Tokens, references and runs for tests of the floors that have tensors; built on `worlds`."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from measured import HARNESS
from opcd import training
from opcd.adapters import trainable, tune
from opcd.alternatives import Alternatives
from opcd.assembly import Parts, assemble
from opcd.comparing import compare, search
from opcd.config import Run, load_config
from opcd.config.training import Full, Lora
from opcd.costing import cost_run
from opcd.costs import Prices
from opcd.distill import StepReport, Trainer
from opcd.programs import gap_of
from opcd.rollouts.engine import Prompt
from opcd.rollouts.scripted import ScriptedEngine
from opcd.runs import write_json
from opcd.teachers import LocalTeacher
from opcd.types import PromptPair, Rollout
from worlds import END_ID, SPECIALS, tiny_llama, write_jsonl

VOCABULARY = 300

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
}
"""What every architecture's tiny configuration has in common."""


def build(config: Any, seed: int = 0) -> Any:
    """A model of any architecture with random weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_ids(count: int, seed: int) -> tuple[int, ...]:
    """Token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(len(SPECIALS), VOCABULARY, (count,), generator=generator).tolist())


def pair_of(
    task_id: str, student: int, teacher: int, seed: int = 0, shared: int = 0, **more: Any
) -> PromptPair:
    """A pair of random prompts of these lengths; teachers share their first tokens."""
    own = random_ids(teacher - shared, 1000 + seed)
    return PromptPair(task_id, random_ids(student, seed), random_ids(shared, 77) + own, **more)


def rollout_of(task_id: str, tokens: int, seed: int = 0) -> Rollout:
    """A finished random response that ends with the end-of-sequence token."""
    return Rollout(task_id, (*random_ids(tokens - 1, 500 + seed), END_ID), finished=True)


def log_probs_of(model: Any, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """`_TV`: before each response token, in a pass of its own without padding or cache."""
    rows = []
    for index in range(len(response)):
        ids_1S = torch.tensor([[*prompt, *response[:index]]])
        rows.append(model(input_ids=ids_1S, use_cache=False).logits[0, -1].double())
    return torch.stack(rows).log_softmax(-1)


def reverse_kl(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) of each token."""
    return (student_TV.exp() * (student_TV - teacher_TV)).sum(-1)


def write_recipe(folder: Path, model_path: Path, system: str = "Answer in verse. ") -> Path:
    """A run's TOML with its context and task files; the path of the TOML."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "system.md").write_text(system, encoding="utf-8")
    for split, count in (("train", 6), ("validation", 3), ("test", 4)):
        rows = [{"prompt": f"{split} {i}?", "answer": "a"} for i in range(count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    anchors = {
        split: {"systems": [f"{split} a", f"{split} b"], "prompts": [f"{split} {i}" for i in "xyz"]}
        for split in ("train", "test")
    }
    (folder / "anchors.json").write_text(json.dumps(anchors), encoding="utf-8")
    toml = folder / "run.toml"
    toml.write_text(
        f"""
        name = "tiny"
        steps = 4
        model = {{ path = {str(model_path)!r}, dtype = "float32", device = "cpu" }}
        context = {{ type = "system_prompt", path = "system.md" }}
        tasks = {{ train = "train.jsonl", validation = "validation.jsonl", test = "test.jsonl" }}
        grader = {{ type = "contains" }}
        rollout = {{ max_new_tokens = 5 }}
        batch = {{ prompts_per_step = 4, rows_per_forward = 2 }}
        anchor = {{ share = 0.25, path = "anchors.json", max_new_tokens = 4 }}
        evaluation = {{ every_steps = 2, kept_rows = 3, suites = ["kept"] }}
        checkpoint = {{ every_steps = 2 }}
        """,
        encoding="utf-8",
    )
    return toml


def make_run(tmp_path: Path, model_path: Path, *overrides: str, **recipe: Any) -> Run:
    """A tiny run whose folder lies under `tmp_path`."""
    toml = write_recipe(tmp_path / "recipe", model_path, **recipe)
    return load_config(toml, [f"out={tmp_path / 'runs'}", *overrides])


def make_game_run(
    tmp_path: Path, model_path: Path, *overrides: str, system: str = "Go down, then right."
) -> Run:
    """A tiny run that plays a lake of 3 x 3 with two holes, without being told the rules."""
    folder = tmp_path / "recipe"
    toml = write_recipe(folder, model_path, system=system)
    tables = {"tasks =": "game = { type = 'frozen_lake', rules = false }", "grader =": ""}
    lines = [
        next((new for old, new in tables.items() if line.strip().startswith(old)), line)
        for line in toml.read_text(encoding="utf-8").splitlines()
    ]
    toml.write_text("\n".join(lines), encoding="utf-8")
    few = ("rollout.max_truncated_fraction=1.0", f"out={tmp_path / 'runs'}")
    return load_config(toml, [*few, *overrides])


def acting(renderer: Any, reply: Callable[[str, int], str]) -> ScriptedEngine:
    """An engine whose replies to games are a function of the episode's id and the turn's number."""

    def script(policy: str, prompt: Prompt) -> tuple[int, ...]:
        episode, _, number = prompt.task_id.rpartition("/turn-")
        if not episode:
            return scripted(policy, prompt)
        return (*renderer.encode(reply(episode, int(number))), END_ID)

    return ScriptedEngine(script)


def whole_run(folder: Path, model_path: Path) -> Path:
    """A tiny run beside which lies everything that a page shows, each file from its own command."""
    few = ("steps=2", "evaluation.every_steps=2", "optimizer.lr=0.02", "optimizer.warmup_steps=0")
    run = make_run(folder, model_path, *few, system="Answer in one lower-case word, please. " * 9)
    path = run.out / run.name
    gap_of(run)
    search(run, (0.01, 0.03), str)
    compare(run, 2, (), str)
    cost_run(path, Prices(1.0, 2.0, 0.25, 3.0), [1], Alternatives(True, 1))
    write_json(path / "harness.json", HARNESS)
    return path


@contextmanager
def full_disk(most_bytes: int = 4000) -> Iterator[None]:
    """Within it no file of this process gets longer, as on a disk that is full."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, ignored)


def nudge(model: Any, seed: int = 0, size: float = 0.05) -> None:
    """Move what is trainable, so that a fresh adapter is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(size * torch.randn(weight.shape, generator=generator))


def parts_of(run: Run) -> Parts:
    """A run's parts, with an engine that answers every prompt from a script."""
    parts = assemble(run)
    parts.engine = parts.teacher_engine = ScriptedEngine(scripted)
    return parts


def scripted(policy: str, prompt: Prompt) -> tuple[int, ...]:
    """A response of 2 to 5 tokens that depends on the task alone, the end included."""
    del policy
    seed = sum(prompt.task_id.encode())
    return (*random_ids(1 + seed % 4, seed), END_ID)


LORA = Lora(rank=4, alpha=8)
IDS_BS = torch.tensor([[7, 8, 9, 10, 11, 12]])


def tuned(tuning: Lora | Full = LORA, seed: int = 0, **config: Any) -> Any:
    """A student that has left its base."""
    model = tune(tiny_llama(**config), tuning, seed)
    nudge(model, 3)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """The model's own, for a few tokens: `_SV`."""
    return model(input_ids=IDS_BS).logits[0]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Have something happen when this step is nearly done, in the first run that comes to it."""
    real, happened = training.distill, []

    def watched(parts: Parts, trainer: Trainer) -> Iterator[StepReport]:
        for report in real(parts, trainer):
            if report.metrics["step"] == step and not happened:
                happened.append(step)
                action()
            yield report

    monkeypatch.setattr(training, "distill", watched)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def teacher_of(parts: Parts) -> LocalTeacher:
    """The tasks' teacher of a run that has no server for one."""
    assert isinstance(parts.teacher, LocalTeacher), "it is on a server"
    return parts.teacher
