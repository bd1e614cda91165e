"""Prompt pairs token by token, so that a person sees what each side reads."""

from rich.console import Console
from rich.text import Text

from opcd.assembly import max_prompt_tokens
from opcd.config import Run
from opcd.items import Item, pairs_of, render_splits
from opcd.rendering import Renderer, common_prefix
from opcd.weights import load_tokenizer, positions


def show_pairs(run: Run, count: int, console: Console) -> None:
    """Print the first train pairs: tokens alternate in shade, the shared response is marked."""
    tokenizer = load_tokenizer(run.model.path, run.model.revision)
    holds = positions(run.model.path, run.model.revision)
    renderer = Renderer(tokenizer, run.rendering, max_prompt_tokens(run, holds))
    items, notes = render_splits(run, renderer)
    for note in notes:
        console.print(note, markup=False)
    prompts = [pair.teacher_ids for pair in pairs_of(items)]
    shared = common_prefix(prompts)
    console.print(f"all {len(prompts)} teacher prompts begin with the same {shared} tokens")
    console.print("before a first user message the chat template itself writes:", end=" ")
    console.print(repr(renderer.preamble), markup=False, highlight=False)
    for item in items["train"][:count]:
        _show_pair(item, renderer, shared, console)


def _show_pair(item: Item, renderer: Renderer, shared: int, console: Console) -> None:
    for side, ids in (("student", item.pair.student_ids), ("teacher", item.pair.teacher_ids)):
        console.rule(f"{item.task.id}, {side}: {len(ids)} tokens")
        text = Text()
        for index, token in enumerate(ids):
            shade = "on grey23" if index % 2 else "on grey15"
            dim = "dim " if side == "teacher" and index < shared else ""
            text.append(renderer.tokenizer.decode([token]), style=f"{dim}{shade}")
        text.append("<response: the same token ids on both sides>", style="bold reverse")
        console.print(text)
