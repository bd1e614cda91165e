"""Runs that learn from experience, for tests: files of a round, and a model scripted to learn."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd.assembly import Parts, assemble
from opcd.config import Run, load_config
from opcd.rollouts.engine import Policy, Prompt, Sampling
from opcd.rollouts.hf import HFEngine
from opcd.rollouts.scripted import ScriptedEngine
from opcd.runs import RoundFolder
from opcd.types import Rollout
from tiny import make_game_run, write_recipe
from worlds import END_ID, tokenizer, write_jsonl

FEW = (
    "steps=2",
    "evaluation.every_steps=2",
    "checkpoint.every_steps=1",
    "optimizer.lr=0.02",
    "evaluation.suites=[]",
)
"""What makes a run small."""


def experience_run(tmp_path: Path, model_path: Path, *overrides: str) -> Run:
    """A tiny run that learns its context, whose folder lies under `tmp_path`."""
    folder = tmp_path / "recipe"
    toml = write_recipe(folder, model_path)
    for split, count in (("problems", 5), ("validation", 6)):
        rows = [{"prompt": f"{split} {i}?", "answer": "a"} for i in range(count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    given = """context = { type = "system_prompt", path = "system.md" }"""
    table = """experience = { problems = "problems.jsonl", seeds = 2, steps = 3 }"""
    toml.write_text(toml.read_text("utf-8").replace(given, table), encoding="utf-8")
    return load_config(toml, [f"out={tmp_path / 'runs'}", *FEW, *overrides])


def lesson_parts(tmp_path: Path, model_path: Path) -> Parts:
    """A run whose engine answers right on as many validation rows as it is shown lessons.

    `a` is the right answer; the rows' prompts end with their numbers.
    """
    run = experience_run(tmp_path, model_path)
    parts = assemble(run)
    right, wrong = (parts.renderer.encode(text) for text in ("a", "b"))

    def script(policy: str, prompt: Prompt) -> tuple[int, ...]:
        assert policy == "base", "candidates are scored with the model as it was"
        text = parts.renderer.tokenizer.decode(list(prompt.ids))
        assert "validation" in text, "no other rows may choose"
        number = int(text.split("validation ")[1].split("?")[0])
        return (*(right if number < text.count("- lesson") else wrong), END_ID)

    parts.engine = ScriptedEngine(script)
    return parts


class Learner:
    """The real engine, but for the base model: it is scripted to learn.

    Asked for lessons it writes one, with some words of the trace; asked a row, it is right on as
    many rows as it is shown lessons. A lake it crosses with any lesson, and never without.
    """

    def __init__(self, *arguments: Any) -> None:
        """As `HFEngine`."""
        self.real = HFEngine(*arguments)
        self.policy: Policy = "student"
        self.tokenizer = tokenizer()

    def use(self, policy: Policy, version: int) -> None:
        self.policy = policy
        self.real.use(policy, version)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        if self.policy == "student":
            return self.real.generate(prompts, sampling)
        return ScriptedEngine(self.script, "base").generate(prompts, sampling)

    def script(self, policy: Policy, prompt: Prompt) -> tuple[int, ...]:
        """What the base model says."""
        del policy
        text = self.tokenizer.decode(list(prompt.ids))
        if "- EXPERIENCE ITEM:" in text:
            words = hashlib.sha256(prompt.task_id.encode()).hexdigest()[:9]
            answer = f" lesson from {words[:3]} {words[3:6]} {words[6:]}"
        elif "/turn-" in prompt.task_id:
            answer = f"[{way(text)}]" if "- lesson from" in text else "[up]"
        else:
            number = int(["0", *re.findall(r"(\d+)\?", text)][-1])
            answer = "a" if number < text.count("- lesson from") else "b"
        return (*self.tokenizer.encode(answer, add_special_tokens=False), END_ID)


def way(text: str) -> str:
    """The first move of a shortest way to the goal, on the last board of a lake's prompt."""
    lines = text.replace("<|im_end|>", "\n").split("\n")
    rows = [line.split() for line in lines if re.fullmatch(r"[PGH_]( [PGH_])+", line)]
    board = rows[-len(rows[-1]) :]
    cells = {(y, x): cell for y, row in enumerate(board) for x, cell in enumerate(row)}
    start = next(place for place, cell in cells.items() if cell == "P")
    steps = {"down": (1, 0), "right": (0, 1), "up": (-1, 0), "left": (0, -1)}
    seen, queue = {start}, [(start, "")]
    for (y, x), first in queue:
        if cells[y, x] == "G":
            return first
        for name, (dy, dx) in steps.items():
            place = (y + dy, x + dx)
            if cells.get(place, "H") != "H" and place not in seen:
                seen.add(place)
                queue.append((place, first or name))
    raise AssertionError(f"no way across {board}")


def game_learner(tmp_path: Path, model_path: Path, *overrides: str) -> Run:
    """A tiny run that learns to cross a lake."""
    make_game_run(tmp_path, model_path)
    toml = tmp_path / "recipe" / "run.toml"
    given = """context = { type = "system_prompt", path = "system.md" }"""
    table = "experience = { seeds = 2, steps = 2 }"
    toml.write_text(toml.read_text("utf-8").replace(given, table), encoding="utf-8")
    few = (*FEW, "rollout.max_new_tokens=12")
    return load_config(toml, [f"out={tmp_path / 'runs'}", *few, *overrides])


def grown(folder: RoundFolder, seeds: int = 2, steps: int = 4) -> None:
    """Experiences that gain a lesson a trace in one seed, and one every second trace in another."""
    for seed in range(seeds):
        folder.seed(seed).mkdir(parents=True)
        for step in range(steps + 1):
            lines = [f"- lesson {seed} {i}\n" for i in range(step // (seed + 1))]
            folder.experience(seed, step).write_text("".join(lines), encoding="utf-8")
