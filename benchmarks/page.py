"""The page about speed, from the results of one run. Nothing is written by hand but words."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from limits import Shape, Tokens, least_flops
from measures import (
    Figure,
    Goal,
    column,
    judge,
    markdown,
    pair_ratios,
    show,
    show_plain,
    summarise,
)

Row = Mapping[str, Any]
GIB = 2**30
HEADINGS = {"float32": "float32 against float32", "best": "Each side's best"}


def find(rows: Sequence[Row], side: str, context: int) -> Row | None:
    """One side's row in one setting, if it was measured."""
    return next((r for r in rows if r["side"] == side and r["context_tokens"] == context), None)


def contexts_of(rows: Sequence[Row]) -> list[int]:
    """The contexts that were measured, ascending."""
    return sorted({row["context_tokens"] for row in rows})


def peak(row: Row) -> Figure:
    """The highest memory of each process, GiB."""
    return summarise([step["peak_bytes"] / GIB for step in row["steps"]])


def ratio(rows: Sequence[Row], context: int, name: str = "wall_s") -> Figure | None:
    """Ours over theirs, turn by turn."""
    ours, theirs = (find(rows, side, context) for side in ("opcd", "sdft"))
    if ours is None or theirs is None:
        return None
    return pair_ratios(column(ours["steps"], name), column(theirs["steps"], name))


def steps_table(rows: Sequence[Row]) -> str:
    """Seconds, tokens and memory of a step, by context and side."""
    head = (
        "context, tokens",
        "side",
        "s a step",
        "rollout",
        "teacher",
        "train",
        "response tokens/s",
        "peak RSS, GiB",
        "opcd / SDFT",
    )
    lines = []
    for context in contexts_of(rows):
        for side, label in (("opcd", "opcd"), ("sdft", "SDFT")):
            row = find(rows, side, context)
            if row is None:
                continue
            steps = row["steps"]
            parts = [
                show_plain(summarise(column(steps, f"{part}_s")))
                for part in ("rollout", "teacher", "train")
            ]
            speed = summarise([s["response_tokens"] / s["wall_s"] for s in steps])
            found = ratio(rows, context) if side == "opcd" else None
            lines.append(
                (
                    f"{context:,}",
                    f"{label} {row['variant']}",
                    show(summarise(column(steps, "wall_s"))),
                    *parts,
                    show_plain(speed, 0),
                    show(peak(row)),
                    show(found) if found else "",
                )
            )
    return markdown(head, lines)


def tokens_of(row: Row, rows_per_step: int) -> Tokens:
    """What a step of this setting reads at the least."""
    about, response = row["about"], int(row["steps"][0]["response_tokens"])
    others = rows_per_step - 1
    student = about["student_prompt_tokens"] - others * about["student_shared_tokens"]
    teacher = about["teacher_prompt_tokens"]
    if row["context_tokens"]:
        teacher -= rows_per_step * about["teacher_shared_tokens"]
    else:
        teacher -= others * about["student_shared_tokens"]
    unread = response - rows_per_step
    return Tokens(student + unread, teacher + unread, response, row["context_tokens"])


def limit_row(found: Row, row: Row) -> tuple[Figure, float]:
    """The share of the limit that teacher and training reach, and the limit in seconds."""
    shape = Shape.read(found["shape"])
    flops = least_flops(shape, tokens_of(row, found["rows"]), found["rank"])
    limit_s = sum(flops.values()) / found["matmul_flops_per_s"][row["variant"]]
    shares = [limit_s / (step["teacher_s"] + step["train_s"]) for step in row["steps"]]
    return summarise(shares), limit_s


def limits_table(found: Row) -> str:
    """What opcd's steps need at the least, beside what they take."""
    head = (
        "context, tokens",
        "dtype",
        "limit of teacher + train, s",
        "measured, s",
        "of the limit",
    )
    lines = []
    for rows in found["settings"].values():
        for context in contexts_of(rows):
            row = find(rows, "opcd", context)
            if row is None or (f"{context:,}", row["variant"]) in [line[:2] for line in lines]:
                continue
            share, limit_s = limit_row(found, row)
            taken = summarise([step["teacher_s"] + step["train_s"] for step in row["steps"]])
            lines.append(
                (f"{context:,}", row["variant"], f"{limit_s:.2f}", show(taken), show(share))
            )
    return markdown(head, lines)


def goals(found: Row) -> list[tuple[str, str, str, str]]:
    """What was to be reached, and what was."""
    plain, best = found["settings"]["float32"], found["settings"]["best"]
    lines = []
    wanted = (
        (plain, 1000, Goal("s a step at 1,000 tokens, float32, opcd / SDFT", 1 / 3)),
        (best, 1000, Goal("s a step at 1,000 tokens, each side's best, opcd / SDFT", 1 / 6)),
        (best, 4000, Goal("s a step at 4,000 tokens, each side's best, opcd / SDFT", 1 / 10)),
    )
    for rows, context, goal in wanted:
        if figure := ratio(rows, context):
            lines.append(judge(figure, goal))
    for name, rows in found["settings"].items():
        near, far = (find(rows, "opcd", context) for context in (250, 4000))
        if near and far:
            count = min(len(near["steps"]), len(far["steps"]))
            walls = [column(row["steps"][:count], "wall_s") for row in (far, near)]
            words = f"opcd's step at 4,000 tokens / at 250, {HEADINGS[name].lower()}"
            lines.append(judge(pair_ratios(*walls), Goal(words, 1.3)))
        for context in contexts_of(rows):
            if share := ratio(rows, context, "peak_bytes"):
                words = f"peak RSS at {context:,} tokens, {HEADINGS[name].lower()}, opcd / SDFT"
                lines.append(judge(share, Goal(words, 0.6)))
    return lines


def shares(found: Row) -> list[tuple[str, str, str, str]]:
    """How much of the limit is reached, against the half that was wanted."""
    lines = []
    for name, rows in found["settings"].items():
        row = find(rows, "opcd", 1000)
        if row:
            share, _ = limit_row(found, row)
            reached = "-"
            if share.is_reproduced:
                reached = "yes" if share.median >= 0.5 else "no"
            words = f"share of the limit, teacher + train, 1,000 tokens, {HEADINGS[name].lower()}"
            lines.append((words, "at least 0.50", show(share), reached))
    return lines


def context_table(found: Row) -> str:
    """What reading the context once takes, and what of it falls on a step."""
    head = ("context, tokens", "dtype", "read once and checked, s", "of a step, in a run of 30, s")
    lines = []
    for rows in found["settings"].values():
        for context in contexts_of(rows):
            row = find(rows, "opcd", context)
            if context and row and (f"{context:,}", row["variant"]) not in [x[:2] for x in lines]:
                once_s = column(row["ends"], "read_context_s")
                of_step = summarise([wall_s / 30 for wall_s in once_s])
                told = show(summarise(once_s)), show_plain(of_step)
                lines.append((f"{context:,}", row["variant"], *told))
    return markdown(head, lines)


def kernel_table(found: Row) -> str:
    """The loss alone, three ways."""
    head = ("vocabulary", "way", "value and gradient, s", "memory it adds, MiB", "loss, nats")
    names = {"opcd": "opcd", "trl": "TRL's chunked divergence", "dense": "dense logits"}
    lines = [
        (
            f"{row['vocabulary']:,}",
            names[row["way"]],
            show(summarise(row["walls_s"])),
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['loss_nats']:.6f}",
        )
        for row in found["kernel"]
    ]
    return markdown(head, lines)


def draw(target: Path, found: Row) -> None:
    """Seconds a step over the context, for each side and pairing."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (name, rows) in zip(axes, found["settings"].items(), strict=True):
        for side, label, colour in (("sdft", "SDFT", "#b35c1e"), ("opcd", "opcd", "#1f6f78")):
            measured = [(c, find(rows, side, c)) for c in contexts_of(rows)]
            known = [(c, summarise(column(r["steps"], "wall_s"))) for c, r in measured if r]
            shown = [(c, f) for c, f in known if f.is_reproduced]
            middle = [f.median for _, f in shown]
            below = [f.median - f.lowest for _, f in shown]
            above = [f.highest - f.median for _, f in shown]
            places = [c for c, _ in shown]
            axis.errorbar(
                places,
                middle,
                yerr=(below, above),
                marker="o",
                capsize=3,
                color=colour,
                label=label,
            )
        axis.set_title(HEADINGS[name])
        axis.set_xlabel("tokens of context")
        axis.set_yscale("log")
    axes[0].set_ylabel("seconds a step")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def write(target: Path, found: Row) -> None:
    """The page and its figure."""
    picture = target.with_suffix(".svg")
    draw(picture, found)
    target.parent.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    rates = found["matmul_flops_per_s"]
    trials = "; ".join(
        f"{side}: " + ", ".join(f"{name} {wall_s:.2f} s" for name, wall_s in seconds.items())
        for side, seconds in found["trials"].items()
    )
    tables = goals(found) + shares(found)
    text = (Path(__file__).parent / "page.md").read_text(encoding="utf-8")
    filled = {
        "processor": found["processor"],
        "versions": versions,
        "model": found["model"],
        "rows": str(found["rows"]),
        "new_tokens": str(found["new_tokens"]),
        "rank": str(found["rank"]),
        "trials": trials,
        "goals": markdown(("what", "wanted", "measured", "reached"), tables),
        "picture": picture.name,
        "float32": steps_table(found["settings"]["float32"]),
        "best": steps_table(found["settings"]["best"]),
        "context": context_table(found),
        "matmul_side": f"{found['matmul_side']:,}",
        "rate_float32": f"{rates['float32'] / 1e9:,.0f}",
        "rate_bfloat16": f"{rates['bfloat16'] / 1e9:,.0f}",
        "limits": limits_table(found),
        "kernel_tokens": str(found["kernel_tokens"]),
        "kernel": kernel_table(found) if found["kernel"] else "Not measured in this run.",
        "minutes": f"{found['run_s'] / 60:.0f}",
    }
    for name, value in filled.items():
        text = text.replace("{" + name + "}", value)
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).parents[1]
    results = here / "benchmarks/results/sdft.json"
    write(here / "docs/performance.md", json.loads(results.read_text(encoding="utf-8")))
