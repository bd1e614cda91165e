"""A run that learns from experience, small enough to be told what its model says."""

from collections.abc import Callable
from pathlib import Path

from opcd.assembly import Parts, assemble
from opcd.config import Run, load_config
from opcd.gathering import Gathering
from opcd.rollouts.engine import Prompt
from opcd.rollouts.scripted import ScriptedEngine
from opcd.runs import round_folder
from worlds import END_ID, tokenizer, write_jsonl

EXTRACT = """### user
Look back: {trace} It went: {feedback} So far: {previous}
### assistant
- EXPERIENCE ITEM:
"""

TOML = """
name = "learner"
steps = 2
model = {{ path = {model!r}, dtype = "float32", device = "cpu" }}
tasks = {{ train = "train.jsonl", validation = "validation.jsonl", test = "test.jsonl" }}
grader = {{ type = "contains" }}
rollout = {{ max_new_tokens = 8, temperature = 0.7 }}
experience.problems = "problems.jsonl"
experience.seeds = 2
experience.steps = 3
experience.max_new_tokens = 120
experience.instructions = "asked"
"""

GAME = """
name = "lake"
steps = 2
model = {{ path = {model!r}, dtype = "float32", device = "cpu" }}
rollout = {{ max_new_tokens = 4, temperature = 0.7 }}
experience.seeds = 2
experience.steps = 3
experience.max_new_tokens = 40
experience.instructions = "asked"

[game]
type = "frozen_lake"
size = 3
holes = 1
rules = false
turns = 5
boards = {{ train = 1, extraction = 1, validation = 1, test = 1 }}
"""


def write_learner(folder: Path, model: Path, toml: str = TOML) -> Path:
    """The TOML of a run with four problems, and the files it names."""
    for split, count in (("train", 4), ("validation", 2), ("test", 2), ("problems", 4)):
        rows = [{"prompt": f"{split} {i}?", "answer": "right"} for i in range(count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    (folder / "asked").mkdir(exist_ok=True)
    (folder / "asked" / "extract.md").write_text(EXTRACT, encoding="utf-8")
    path = folder / "run.toml"
    path.write_text(toml.format(model=str(model)), encoding="utf-8")
    return path


def load_learner(folder: Path, model: Path, *overrides: str, toml: str = TOML) -> Run:
    """The run, whose folder lies under `folder`."""
    path = write_learner(folder, model, toml)
    return load_config(path, [f"out={folder / 'runs'}", *overrides])


def lesson(place: str) -> str:
    """An item of its own for each place, `round-1/seed-0/step-2`."""
    _, seed, step = place.split("/")
    return f" of {seed.replace('-', '')} {step.replace('-', '')}\n"


def learner(run: Run, writes: Callable[[str], str] = lesson, number: int = 1) -> Gathering:
    """A round whose model answers problems by their place and writes what it is told to.

    Odd steps are answered rightly.
    """
    parts = assemble(run)
    parts.engine = ScriptedEngine(script_of(writes))
    return Gathering(parts, round_folder(run, number), number)


def script_of(writes: Callable[[str], str]) -> Callable[[str, Prompt], tuple[int, ...]]:
    """A script of both: answers to problems, and items from traces."""
    words = tokenizer()

    def script(policy: str, prompt: Prompt) -> tuple[int, ...]:
        del policy
        place = prompt.task_id.removesuffix("/items")
        if place != prompt.task_id:
            return (*words.encode(writes(place)), END_ID)
        return (*words.encode("right" if int(place[-1]) % 2 else "wrong"), END_ID)

    return script


def asked_of(parts: Parts) -> list[str]:
    """The ids of all prompts that the scripted engine was given."""
    assert isinstance(parts.engine, ScriptedEngine)
    return [task_id for _, task_id in parts.engine.asked]
