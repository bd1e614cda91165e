"""Compose the unit conversions of the experience recipe.

Writes ``problems.jsonl`` (to learn from), ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``;
no question is in two of them. Running the script again writes the same bytes.

Usage: ``python compose.py [output folder]`` (default: the folder of this script).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COUNTS = {"problems": 48, "train": 96, "validation": 48, "test": 96}
UNITS = (
    ("hours", "minutes", 60, ("A film lasts", "The train takes", "She slept for")),
    ("minutes", "seconds", 60, ("The song lasts", "He held on for", "The egg boils for")),
    ("days", "hours", 24, ("The trip takes", "The shop is shut for", "It rained for")),
    ("weeks", "days", 7, ("The holiday lasts", "The parcel took", "The course lasts")),
    ("dozen eggs", "single eggs", 12, ("The baker bought", "The fridge holds", "We need")),
    ("metres", "centimetres", 100, ("The rope measures", "The plank measures", "The wall measures")),
    ("kilometres", "metres", 1000, ("The walk is", "The lake is", "The school is away by")),
    ("kilograms", "grams", 1000, ("The sack weighs", "The dog weighs", "The pumpkin weighs")),
    ("litres", "millilitres", 1000, ("The bucket holds", "The pot holds", "The can holds")),
    ("pounds", "pence", 100, ("The ticket costs", "The book costs", "The lamp costs")),
)
"""The larger unit, the smaller one, how many of it the larger has, and what the question opens with."""


def questions() -> list[dict[str, Any]]:
    """Every question there is, in a fixed random order, with its answer as text."""
    found = [
        {
            "prompt": f"{opening} {count} {larger}. How many {smaller} is that?",
            "answer": str(count * factor),
        }
        for larger, smaller, factor, openings in UNITS
        for opening in openings
        for count in range(2, 13)
    ]
    random.Random("unit conversions").shuffle(found)
    return found


def main() -> None:
    """Write the rows of every split."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    rows = questions()
    for split, count in COUNTS.items():
        taken, rows = rows[:count], rows[count:]
        lines = [
            json.dumps({"id": f"{split}-{number:04d}", **row}) + "\n"
            for number, row in enumerate(taken, start=1)
        ]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
