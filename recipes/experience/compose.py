"""Compose the sums in words of the experience recipe.

Writes ``problems.jsonl`` (to learn from), ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``;
no question is in two of them. Running the script again writes the same bytes.

Usage: ``python compose.py [output folder]`` (default: the folder of this script).
"""

from __future__ import annotations

import json
import random
import sys
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COUNTS = {"problems": 48, "train": 96, "validation": 48, "test": 96}
NAMES = ("Tom", "Ada", "Ben", "Mia", "Joe", "Eva")
THINGS = ("apples", "coins", "books", "pens", "shells", "stamps")


def questions() -> list[dict[str, Any]]:
    """Every question there is, in a fixed random order, with its answer as text."""
    found = [
        {
            "prompt": f"{name} has {a} {thing}, and gets {b} more. How many {thing} is that?",
            "answer": str(a + b),
        }
        for name in NAMES
        for thing in THINGS
        for a, b in product(range(2, 10), repeat=2)
    ]
    found += [
        {
            "prompt": f"There are {a} boxes with {b} {thing} in each. How many {thing} is that?",
            "answer": str(a * b),
        }
        for thing in THINGS
        for a, b in product(range(2, 10), repeat=2)
    ]
    random.Random("sums in words").shuffle(found)
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
