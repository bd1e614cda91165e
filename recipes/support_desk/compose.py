"""Compose the customer messages of the support desk recipe.

Reads ``templates.json`` beside this script and writes ``train.jsonl``, ``validation.jsonl`` and
``test.jsonl``. Each split has templates of its own, so no wording is shared between splits. The
output depends on ``templates.json`` alone: running the script again writes the same bytes.

Usage: ``python compose.py [output folder]`` (default: the folder of this script).
"""

from __future__ import annotations

import json
import random
import string
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")


def slot_names(template: str) -> list[str]:
    """Return the slots of a template, each once, in order of appearance."""
    found = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    return list(dict.fromkeys(found))


def fill(template: str, slots: dict[str, list[str]], count: int, rng: random.Random) -> list[str]:
    """Fill a template ``count`` times; no slot repeats a value within one template."""
    names = slot_names(template)
    if not names:
        raise ValueError(f"template has no slot: {template!r}")
    columns = [rng.sample(slots[name], count) for name in names]
    rows = zip(*columns, strict=True)
    filled = (template.format(**dict(zip(names, row, strict=True))) for row in rows)
    return [message[0].upper() + message[1:] for message in filled]


def compose_split(split: str, source: dict[str, Any]) -> list[dict[str, Any]]:
    """Compose the rows of one split, with the moods in a fixed random order."""
    rng = random.Random(f"support desk {split}")
    rows: list[dict[str, Any]] = []
    for mood, templates in source["templates"][split].items():
        for number, template in enumerate(templates, start=1):
            name = f"{split}-{mood}-{number:03d}"
            for prompt in fill(template, source["slots"], source["fills"][split], rng):
                answer = {"mood": mood, "team": source["team"][mood]}
                rows.append({"prompt": prompt, "answer": answer, "template": name})
    rng.shuffle(rows)
    return [{"id": f"{split}-{number:04d}", **row} for number, row in enumerate(rows, start=1)]


def check(splits: dict[str, list[dict[str, Any]]], source: dict[str, Any]) -> None:
    """Raise if a message or a template occurs twice, within a split or across splits."""
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    if len(set(prompts)) != len(prompts):
        raise ValueError("a message occurs twice")
    groups = [moods[mood] for moods in source["templates"].values() for mood in moods]
    templates = [template for group in groups for template in group]
    if len(set(templates)) != len(templates):
        raise ValueError("a template occurs twice")


def main() -> None:
    """Compose the three splits and write them."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    source = json.loads((HERE / "templates.json").read_text(encoding="utf-8"))
    splits = {split: compose_split(split, source) for split in SPLITS}
    check(splits, source)
    for split, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(rows)} rows")


if __name__ == "__main__":
    main()
