"""`opcd lab`: the paper's claims on a laptop; heavy imports wait until a verb needs them."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Test the method's claims in a tiny world.", no_args_is_help=True)
console = Console()

QUICK_PACE = 0.4
SEEDS = 3


@app.command()
def build() -> None:
    """Train the lab's models from scratch, unless they are in the cache."""
    from opcd.lab.building import build_minds

    for name, folder in build_minds(os.cpu_count() or 1, _say).items():
        _say(f"{name}: {folder}")


@app.command()
def claims(
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, fewer steps: a look, no verdict.")
    ] = False,
    only: Annotated[str, typer.Option(help="Claims, with commas between; default: all.")] = "",
    out: Annotated[Path, typer.Option(help="Where claims.md and claims.svg go.")] = Path("docs"),
    work: Annotated[Path, typer.Option(help="Where trials are kept.")] = Path("runs/lab"),
    seeds: Annotated[int, typer.Option(min=1, help="Worlds of each kind.")] = SEEDS,
    processes: Annotated[
        int | None, typer.Option(min=1, help="At the same time; default: one a core.")
    ] = None,
) -> None:
    """Test the claims and write claims.md; what was tried before is not tried again."""
    from opcd.lab.page import write_page
    from opcd.lab.running import read_claims, run_claims
    from opcd.lab.setups import Setup

    names, count = read_claims(only), 1 if quick else seeds
    setup = Setup(work, tuple(range(count)), QUICK_PACE if quick else 1.0)
    started, workers = time.monotonic(), processes or os.cpu_count() or 1
    out.mkdir(parents=True, exist_ok=True)
    found = run_claims(setup, names, workers, _say)
    less = f"{100 * setup.pace:.0f} % of the steps; " if quick else ""
    size = "models of under a million weights, trained from scratch"
    page = write_page(out, found, f"{count} worlds of each kind; {less}{size}.")
    minutes = (time.monotonic() - started) / 60
    for name, finding in found.items():
        console.print(f"{name}: {finding.verdict}", highlight=False)
    console.print(f"{page}: tables and figure; {minutes:.1f} minutes", highlight=False)


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
