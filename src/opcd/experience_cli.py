"""Verbs of learning from experience; heavy imports wait until a verb needs them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from opcd.gathering import Gathering
    from opcd.traces import Trace

app = typer.Typer()
console = Console()

ConfigPath = Annotated[Path, typer.Argument(help="The run's TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value ...", show_default=False)
]
Round = Annotated[
    int,
    typer.Option("--round", min=1, help="Which one; from the second on, after the one before."),
]


@contextmanager
def _resumable() -> Iterator[None]:
    """Say after Ctrl-C what becomes of what is there."""
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; what is written stays, and the same command goes on from there")
        raise


@app.command()
@_resumable()
def solve(config: ConfigPath, overrides: Overrides = None, number: Round = 1) -> None:
    """Let the model solve problems without any experience; appends to traces.jsonl."""
    round_, traces = _open(config, overrides, number)
    from opcd.learning_tables import count_traces

    _show(round_, "traces", count_traces(traces))
    console.print(f"{round_.store}: the traces; read some", markup=False, highlight=False)


@app.command()
@_resumable()
def extract(config: ConfigPath, overrides: Overrides = None, number: Round = 1) -> None:
    """Have a model write down what each trace teaches; solves first what is missing."""
    round_, traces = _open(config, overrides, number)
    from opcd import gathering as stages
    from opcd import learning_tables as tables

    answers = stages.extract(round_, traces)
    round_.notes += stages.skipped_notes(answers)
    rows = zip(tables.count_traces(traces), tables.count_answers(answers), strict=True)
    _show(round_, "what the extractor wrote", [{**one, **two} for one, two in rows])


@app.command()
@_resumable()
def accumulate(config: ConfigPath, overrides: Overrides = None, number: Round = 1) -> None:
    """Append what was written to experiences within their budget; extracts first what is missing.

    Every intermediate experience is kept, and of every item where it comes from.
    """
    round_, traces = _open(config, overrides, number)
    from opcd import gathering as stages
    from opcd import learning_tables as tables

    answers = stages.extract(round_, traces)
    found = stages.accumulate(round_, traces, answers)
    round_.notes += stages.skipped_notes(answers)
    counted = (tables.count_traces(traces), tables.count_answers(answers))
    rows = zip(*counted, tables.count_items(found), strict=True)
    _show(round_, "experience", [{**one, **two, **three} for one, two, three in rows])
    where = f"{round_.folder.path}: an experience after every trace"
    console.print(where, markup=False, highlight=False)


@app.command()
@_resumable()
def select(config: ConfigPath, overrides: Overrides = None, number: Round = 1) -> None:
    """Score every experience on validation rows and choose one; gathers first what is missing."""
    from opcd.config import load_config

    run = load_config(config, overrides or [])
    from opcd.growth import growth_grid
    from opcd.rounds import select_round
    from opcd.runs import round_folder

    found = select_round(run, number, _say)
    rows, metric = len(found.table["rows"]), found.table["metric"]
    console.print(growth_grid(found.scored, found.choice.chosen, metric, rows).for_terminal())
    _say(f"* chosen: {found.table['verdict']}")
    _say(f"{round_folder(run, number).growth}: the same as a figure")


@app.command()
@_resumable()
def consolidate(config: ConfigPath, overrides: Overrides = None, number: Round = 1) -> None:
    """Bake the chosen experience in and measure it; gathers and selects first what is missing."""
    from opcd.config import load_config

    run = load_config(config, overrides or [])
    from opcd.rounds import consolidate_round

    _show_learned({"rounds": [consolidate_round(run, number, _say)], "paired": []})


@app.command()
@_resumable()
def experience(
    config: ConfigPath,
    overrides: Overrides = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Each begins with the model that the last one baked.")
    ] = 1,
) -> None:
    """Learn from experience: solve, extract, accumulate, select, consolidate; and again."""
    from opcd.config import load_config

    run = load_config(config, overrides or [])
    from opcd.rounds import learn
    from opcd.runs import RunFolder

    _show_learned(learn(run, rounds, _say))
    _say(f"{RunFolder(run.out / run.name).experience}: all conditions and rounds")


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _show_learned(found: Mapping[str, Any]) -> None:
    from opcd.learning_tables import learned_lines, rounds_grid

    if any(one["conditions"] for one in found["rounds"]):
        console.print(rounds_grid(found["rounds"]).for_terminal())
    for line in learned_lines(found):
        _say(line)


def _open(
    config: Path, overrides: list[str] | None, number: int
) -> "tuple[Gathering, list[list[Trace]]]":
    """A round of a run, with its model loaded and its traces solved."""
    from opcd.config import load_config

    run = load_config(config, overrides or [])
    from opcd.rounds import begin_round, traces_of

    round_ = begin_round(run, number, _say)
    return round_, traces_of(run, round_)


def _show(round_: "Gathering", title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from opcd.tables import counts_table

    console.print(counts_table(title, rows))
    for note in round_.notes:
        console.print(note, markup=False, highlight=False)
