"""Claims about experience: the whole pipeline, run for real in a code book nobody was told.

The model guesses, a checker says what would have been right, the model writes down what it learned,
and that is accumulated, selected on validation questions, and baked in; three rounds of it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opcd.config import Run
from opcd.intervals import Estimate
from opcd.lab.setups import BUDGET, Finding, Line, Setup
from opcd.lab.trials import Marks
from opcd.lab.verdicts import Comparison, paired, pooled
from opcd.lab.worlds import World, run_of
from opcd.rounds import learn
from opcd.runs import RunFolder, read_jsonl, round_folder

ROUNDS = 3
TRACES = 10
"""Of an accumulation: fewer than there are keys, so that each round can add some."""
STEPS = 100
"""Of each training."""
CONDITIONS = ("base", "raw_traces", "items", "off_policy", "baked")

Rounds = list[dict[str, Marks]]
"""Of each round, the marks on the test rows by condition."""


def experience_run(world: World, steps: int = STEPS) -> Run:
    """A world whose facts have to be found out."""
    experience = {
        "problems": world.folder / "extraction.jsonl",
        "seeds": 3,
        "score_every": 2,
        "steps": TRACES,
        "feedback": "answer",
        "temperature": 0.1,
        "max_new_tokens": 12,
        "placement": "system",
        "template": "{experience}",
        "instructions": world.folder / "instructions",
        "max_tokens": 256,
    }
    return run_of(
        world,
        name="learned",
        context={"type": "experience"},
        experience=experience,
        steps=steps,
        # Without them a round forgets how to read, and the next one's lessons are lost on it.
        anchor={"share": 0.34},
        batch={"prompts_per_step": 24},
        loss={"warmup": {"direction": "forward_kl", "steps": max(1, steps // 3)}},
        optimizer=BUDGET["code_book"]["optimizer"],
        evaluation={"suites": [], "every_steps": steps, "validation_rows": None},
    )


def rounds_of(setup: Setup, world: World) -> tuple[Rounds, list[dict[str, Any]]]:
    """What three rounds in a world gave, and the first round's candidates with their scores."""
    run = experience_run(world, setup.steps(STEPS))
    setup.say(f"{world.name} {world.seed}: {ROUNDS} rounds of experience")
    learn(run, ROUNDS, setup.say)
    found: Rounds = []
    for number in range(1, ROUNDS + 1):
        folder = round_folder(run, number)
        if not folder.consolidation.is_file():
            break
        marks = _marks(run, number)
        raw = json.loads(folder.raw_traces.read_text(encoding="utf-8"))["answers"]
        found.append({**marks, "raw_traces": [row["correct"] for row in raw]})
    selection = json.loads(round_folder(run, 1).selection.read_text(encoding="utf-8"))
    return found, selection["candidates"]


def extraction(setup: Setup) -> Finding:
    """Extraction beats raw traces, and baking keeps what it gave."""
    first = [found[0] for found in _learned(setup)]
    marks = {name: [one[name] for one in first] for name in CONDITIONS}
    return Finding(
        "Lessons that were extracted from traces help more than the traces themselves, and can be "
        "baked in",
        "code_book",
        [Line(name, {"right": pooled(several)}) for name, several in marks.items() if several],
        [
            Comparison(a, b, "right", paired(marks[a], marks[b]))
            for a, b in (("items", "raw_traces"), ("items", "base"), ("baked", "raw_traces"))
            if first
        ],
        [
            f"{TRACES} traces, round 1; the experience was chosen on validation rows",
            *_left_out(setup, len(first)),
        ],
    )


def growth(setup: Setup) -> Finding:
    """Experience grows with accumulation."""
    curves: dict[str, list[tuple[float, float]]] = {}
    early: list[float] = []
    late: list[float] = []
    for world, (_, candidates) in zip(setup.worlds("code_book"), _all(setup), strict=True):
        for seed in sorted({row["seed"] for row in candidates}):
            own = sorted((r for r in candidates if r["seed"] == seed), key=lambda r: r["step"])
            points = [(float(r["items"]), r["score"]["mean"]) for r in own]
            curves[f"{world.seed}.{seed}"] = points
            half = next(i for i, r in enumerate(own) if 2 * r["step"] >= own[-1]["step"])
            early.append(points[half][1])
            late.append(points[-1][1])
    gain = pooled([[b - a] for a, b in zip(early, late, strict=True)])
    return Finding(
        "More accumulated experience is worth more",
        "code_book",
        [
            Line("after half of the traces", {"right": pooled([[v] for v in early])}),
            Line("after all", {"right": pooled([[v] for v in late])}),
        ],
        [Comparison("after all", "after half of the traces", "right", gain)],
        ["validation questions; test questions choose nothing"],
        curves,
    )


def rounds(setup: Setup) -> Finding:
    """Rounds keep improving."""
    several = _learned(setup)
    # A round that learned nothing leaves the model as it was.
    baked = [[_after(found, number) for found in several] for number in range(ROUNDS + 1)]
    names = ["before", *(f"round {number}" for number in range(1, ROUNDS + 1))]
    figures: list[Mapping[str, Estimate]] = [{"right": pooled(marks)} for marks in baked if marks]
    return Finding(
        "Every further round of learning from its own traces improves the model",
        "code_book",
        [Line(name, one) for name, one in zip(names, figures, strict=False)],
        [
            Comparison(names[n], names[n - 1], "right", paired(baked[n], baked[n - 1]))
            for n in range(1, ROUNDS + 1)
            if several
        ],
        _left_out(setup, len(several)),
    )


def _all(setup: Setup) -> list[tuple[Rounds, list[dict[str, Any]]]]:
    return [rounds_of(setup, world) for world in setup.worlds("code_book")]


def _learned(setup: Setup) -> list[Rounds]:
    """The worlds in which there was something to bake in: in the others nothing was measured."""
    return [found for found, _ in _all(setup) if found]


def _left_out(setup: Setup, count: int) -> list[str]:
    none = len(setup.seeds) - count
    return [f"{none} worlds are left out: no items were the best choice there"] if none else []


def _after(found: Rounds, number: int) -> Marks:
    done: Sequence[dict[str, Marks]] = found[:number]
    return done[-1]["baked"] if done else found[0]["base"]


def _marks(run: Run, number: int) -> dict[str, Marks]:
    name = f"{run.name}-round-{number}"
    rows = list(read_jsonl(RunFolder(run.out / name).answers))
    off = list(read_jsonl(RunFolder(run.out / f"{name}-off_policy").answers))
    own = {"base": "base", "items": "in_context", "baked": "baked"}
    marks = {ours: [row[theirs]["correct"] for row in rows] for ours, theirs in own.items()}
    return marks | {"off_policy": [row["baked"]["correct"] for row in off]}
