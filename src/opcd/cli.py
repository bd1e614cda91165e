"""The command line: verbs become calls of programs; heavy imports wait until a verb needs them."""

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from opcd import experience_cli, lab_cli
from opcd.errors import ConfigError, LaunchError, OpcdError

if TYPE_CHECKING:
    from opcd.evaluation import Evaluation

app = typer.Typer(
    help="On-policy context distillation: train a prompt into a model's weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(experience_cli.app)
app.add_typer(lab_cli.app, name="lab")
console = Console()
ANSWERS_SHOWN = 6

ConfigPath = Annotated[Path, typer.Argument(help="The run's TOML file.", show_default=False)]
RunPath = Annotated[Path, typer.Argument(help="A folder under runs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value ...", show_default=False)
]
AnswersShown = Annotated[int, typer.Option(min=1, help="Show so many answers side by side.")]


@app.callback()
def only_training_is_launched(context: typer.Context) -> None:
    """On-policy context distillation: train a prompt into a model's weights."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count > 1 and context.invoked_subcommand != "train":
        raise ConfigError(
            f"opcd {context.invoked_subcommand} was launched in {count} processes, but only opcd "
            "train is shared by several; start it without accelerate launch or torchrun"
        )


def main() -> None:
    """Run the command; deliberate errors become a message and an exit code."""
    # transformers' own bars and notices would drown the run's.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT asks transformers by an old name; neither is the user's to mend.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing.", FutureWarning)
    try:
        app()
    except OpcdError as error:
        of_process = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]{of_process}", end=": ")
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        # What is left of broken connections would abort the process on its way out.
        leave = os._exit if isinstance(error, LaunchError) else sys.exit
        leave(error.exit_code)


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    render: Annotated[int, typer.Option(help="Show this many prompt pairs, by token.")] = 0,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate the memory of each part.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Of the launch that it is for.")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Weights in shards, for --memory.")] = False,
) -> None:
    """Validate a run without loading a model; with --render, show what each side reads."""
    from opcd.checking import check_launch, check_run, memory_facts

    run, facts = check_run(config, overrides or [])
    check_launch(run, processes)
    facts += memory_facts(run, processes, fsdp) if memory else []
    for line in facts:
        console.print(line, markup=False, highlight=False)
    if render:
        from opcd.showing import show_pairs

        show_pairs(run, render, console)
    console.print(f"{config} is a run that can be started")


@app.command()
def gap(
    config: ConfigPath, overrides: Overrides = None, answers: AnswersShown = ANSWERS_SHOWN
) -> None:
    """Before training: what the context changes on validation rows, and whether to bake it."""
    from opcd.config import load_config

    run = load_config(config, overrides or [])
    from opcd.programs import gap_of
    from opcd.tables import answers_table, gap_table
    from opcd.verdict import verdict

    found = gap_of(run)
    console.print(gap_table(found))
    console.print(answers_table(found["answers"], answers))
    for line in verdict(found):
        console.print(line, highlight=False, markup=False)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete an earlier run of this name.")] = False,
    measure: Annotated[bool, typer.Option("--evaluate", help="Then as opcd evaluate.")] = False,
) -> None:
    """Bake the context in: train, validate, keep the best weights."""
    if measure and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            "--evaluate measures in one process; leave it out, and run opcd evaluate afterwards"
        )
    from opcd.config import load_config

    run = load_config(config, overrides or [])
    from opcd.training import train as start

    outcome = start(run, resume=resume, overwrite=overwrite)
    console.quiet = not outcome.parts.accelerator.is_main_process
    outcome.parts.accelerator.end_training()
    if outcome.interrupted_by is not None:
        console.print(f"stopped after step {outcome.steps}; continue with --resume")
        raise typer.Exit(128 + outcome.interrupted_by)
    best = ", ".join(f"{k} {v:.3g}" for k, v in outcome.best.items() if isinstance(v, float))
    console.print(f"{outcome.folder.path}: {outcome.steps} steps done")
    console.print(f"best is step {outcome.best['step']}: {best}", highlight=False)
    if measure:
        from opcd.programs import evaluate_outcome

        _print_evaluation(evaluate_outcome(outcome))


@app.command()
def evaluate(
    run: RunPath,
    split: Annotated[str, typer.Option(help="Which split to measure.")] = "test",
    answers: AnswersShown = ANSWERS_SHOWN,
    again: Annotated[bool, typer.Option(help="Measure anew what was measured before.")] = False,
) -> None:
    """Measure base, in_context and baked on a split; writes evaluation.json."""
    from opcd.programs import evaluate_run, read_evaluation

    known = None if again else read_evaluation(run, split)
    if known:
        console.print("these weights were measured before; --again measures them anew")
    _print_evaluation(known or evaluate_run(run, split), answers)


def _print_evaluation(found: "Evaluation", answers: int = ANSWERS_SHOWN) -> None:
    from opcd.tables import answers_table, paired_lines, results_table

    console.print(answers_table(found.answers, answers))
    console.print(results_table(found.summary))
    for line in paired_lines(found.summary):
        console.print(line, highlight=False)


@app.command()
def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training runs of each kind.")] = 1,
    lr: Annotated[
        str, typer.Option(help="Let each kind choose among learning rates, commas between.")
    ] = "",
) -> None:
    """Train what is missing; base, in_context, off_policy and baked on the same test rows."""
    from opcd.config import load_config, read_rates

    rates = read_rates(lr) if lr else ()
    run = load_config(config, overrides or [])
    from opcd.comparing import compare as start
    from opcd.tables import comparison_table, paired_lines, search_table, spread_lines

    found = start(run, seeds, rates, console.print)
    for searched in found["searches"].values():
        console.print(search_table(searched))
    console.print(comparison_table(found))
    for line in (*paired_lines(found), *spread_lines(found)):
        console.print(line, highlight=False)


@app.command()
def search(
    config: ConfigPath,
    overrides: Overrides = None,
    lr: Annotated[str, typer.Option(help="Learning rates, with commas between.")] = "",
) -> None:
    """Train with each learning rate and choose one on validation."""
    from opcd.config import load_config, read_rates

    rates = read_rates(lr)
    run = load_config(config, overrides or [])
    from opcd.comparing import search as start
    from opcd.tables import search_table

    found = start(run, rates, console.print)
    console.print(search_table(found))
    console.print(f"chosen on validation: optimizer.lr = {found['chosen']:g}", highlight=False)


@app.command()
def sample(
    run: RunPath,
    prompt: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
) -> None:
    """Answer one prompt as base, in_context and baked, side by side."""
    from opcd.programs import sample_run

    for condition, text in sample_run(run, prompt).items():
        console.print(f"[bold]{condition}[/]", end=": ")
        console.print(text, markup=False, highlight=False)


@app.command()
def costs(  # noqa: PLR0913, PLR0917 - an option each
    run: RunPath,
    input_price: Annotated[
        float | None, typer.Option(help="Price of a million input tokens.")
    ] = None,
    output_price: Annotated[
        float | None, typer.Option(help="Price of a million output tokens.")
    ] = None,
    cached_price: Annotated[
        float | None, typer.Option(help="Price of a million cached input tokens.")
    ] = None,
    training_price: Annotated[
        float | None, typer.Option(help="Price of an hour of training.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Requests answered together.")] = "1,4,16",
    alternatives: Annotated[
        bool, typer.Option(help="Train a soft prompt too; takes minutes.")
    ] = False,
    soft_prompt_steps: Annotated[
        int | None, typer.Option(help="Its steps; default: the run's.")
    ] = None,
    compress_rate: Annotated[
        float | None, typer.Option(help="LLMLingua's share of tokens to keep.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print costs.json only.")] = False,
) -> None:
    """Measure what the context costs a request, and when baking has paid for itself."""
    from opcd.costs import Prices, read_batch_sizes

    prices = Prices(input_price, output_price, cached_price, training_price)
    sizes = read_batch_sizes(batch_sizes)
    from opcd.alternatives import Alternatives
    from opcd.cost_tables import costs_tables, notes_lines
    from opcd.costing import cost_run

    others = Alternatives(alternatives, soft_prompt_steps, compress_rate)
    found = cost_run(run, prices, sizes, others)
    if as_json:
        console.print_json(data=found)
        return
    for table in costs_tables(found):
        console.print(table)
    for line in notes_lines(found):
        console.print(line, markup=False, highlight=False)


@app.command()
def harness(
    run: RunPath,
    tasks: Annotated[str, typer.Option(help="lm-eval's task names, with commas between.")] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with task files of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many rows of each task.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests answered together.")] = 1,
    chat_template: Annotated[bool, typer.Option(help="Ask in the model's chat format.")] = True,
) -> None:
    """Run public benchmarks of lm-eval on base and baked; writes harness.json."""
    from opcd.harness import Benchmarks, harness_run, read_tasks
    from opcd.tables import harness_table

    names = read_tasks(tasks)
    asked = Benchmarks(names, include_path, limit, batch_size, chat_template)
    console.print(harness_table(harness_run(run, asked, console.print)))


@app.command()
def export(
    run: RunPath,
    folder: Annotated[Path, typer.Argument(help="Where to write it.", show_default=False)],
) -> None:
    """Write the baked model as a plain transformers folder, checked against the run."""
    from opcd.exporting import export_run

    agreed = export_run(run, folder)
    console.print(f"{folder}: float32 weights, the run's own greedy answers to {agreed} prompts")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Measured runs.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; default: report.html in the run's folder.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write the curves here, as PNG and SVG files.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about one run, or several compared."""
    from opcd.report import write_report

    written = write_report(runs, out, figures)
    size = f"{written.size_bytes / 1e6:.2f} MB"
    console.print(f"{written.file}: {size}, needs no network", markup=False, highlight=False)
    if figures:
        count = len(written.figures)
        console.print(f"{figures}: {count} files of figures", markup=False, highlight=False)


@app.command()
def prompts(  # noqa: PLR0913, PLR0917 - each is an option of the command
    context: Annotated[
        Path, typer.Argument(help="A text file, or a run's TOML file.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The JSONL file to write.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Who writes; default: the run's.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many messages.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides every draw.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Draw at most this often.")] = 6,
    max_words: Annotated[int, typer.Option(min=1, help="The longest message, in words.")] = 40,
    examples: Annotated[
        Path | None, typer.Option(help='JSONL rows {"prompt"}: messages to show.')
    ] = None,
    instructions: Annotated[
        Path | None, typer.Option(help="A folder with topics.md and messages.md of your own.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, mps or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace the file if it exists.")] = False,
) -> None:
    """Let a model write user messages that a context is meant for, as task rows."""
    from opcd import authoring
    from opcd.screening import Limits
    from opcd.tables import authored_table

    authoring.check_output(out, overwrite)
    text, own, run_model = authoring.read_brief(context)
    shown = authoring.read_messages(examples) if examples else own
    limits = Limits(max_words=max_words)
    brief = authoring.Brief(text, shown, count, seed, rounds, limits)
    writer = authoring.load_writer(model or run_model or "smollm2-135m", device, instructions)
    found = authoring.author(brief, writer, console.print)
    authoring.write_rows(out, found.rows)
    console.print(authored_table(found, limits))
    console.print(f"topics: {authoring.describe(found.topic_lines)} lines", highlight=False)
    if len(found.rows) < count:
        console.print(
            f"only {len(found.rows)} of {count} messages after {found.rounds} rounds, mostly lost "
            f"as: {authoring.describe(found.dropped)}",
            markup=False,
            highlight=False,
        )
    console.print(f"{out}: {len(found.rows)} messages; read some before you train on them")


@app.command()
def play(  # noqa: PLR0913, PLR0917 - an option each
    game: Annotated[str, typer.Argument(help="frozen-lake or sokoban.", show_default=False)],
    size: Annotated[int | None, typer.Option(help="Cells of a side.")] = None,
    holes: Annotated[int | None, typer.Option(help="Of a frozen lake.")] = None,
    boxes: Annotated[int | None, typer.Option(help="Of sokoban.")] = None,
    slippery: Annotated[bool, typer.Option("--slippery", help="Steps may go off.")] = False,
    rules: Annotated[bool, typer.Option(help="Explain the game.")] = True,
    turns: Annotated[
        int | None, typer.Option(help="Default: 5, or one more than the size takes.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the board and every slip.")] = 0,
    model: Annotated[str | None, typer.Option(help="Let this model play, and watch.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, mps or cuda.")] = "auto",
) -> None:
    """Play a text game in the terminal, or watch a model play it."""
    from opcd.playing import play_model, play_person, read_game

    options = {"size": size, "holes": holes, "boxes": boxes, "turns": turns, "seed": seed}
    config = read_game(game, options | {"slippery": slippery or None, "rules": rules})

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if model:
        play_model(config, model, device, say)
    else:
        play_person(config, lambda: input("action (q to stop): "), say)
