"""What a report shows of a run's rows: answers side by side, tokens with their KL."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from opcd.columns import Column
from opcd.findings import Findings

TOKEN_ROWS_SHOWN = 200
"""More than that, a browser cannot scroll; the page says what is left out."""
KL_EDGES_NATS = (0.01, 0.1, 0.5, 2.0, 8.0)
"""Where one colour of a token ends and the next begins."""


def answer_rows(columns: Sequence[Column], runs: Sequence[Findings]) -> list[dict[str, Any]]:
    """Each task with its answers under all columns, and the filters that it passes."""
    by_id = [{row["id"]: row for row in column.run.answers} for column in columns]
    rows: list[dict[str, Any]] = []
    others = [{row["id"]: row for row in run.answers} for run in runs]
    for row in runs[0].answers:
        tags = sorted(set().union(*(_tags(rows_of_run[row["id"]]) for rows_of_run in others)))
        cells = [
            (column.label, rows_of_run[row["id"]][column.condition])
            for column, rows_of_run in zip(columns, by_id, strict=True)
        ]
        answer = row.get("answer")
        expected = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        rows.append(
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "expected": None if answer is None else expected,
                "tags": " ".join(tags),
                "cells": cells,
            }
        )
    return rows


def token_rows(runs: Sequence[Findings]) -> list[dict[str, Any]]:
    """Answers whose tokens carry the KL that the context causes there, two lines each."""
    share = max(1, TOKEN_ROWS_SHOWN // len(runs))
    return [
        {
            "id": row.get("id", ""),
            "prompt": row.get("prompt", ""),
            "run": run.label if len(runs) > 1 else "",
            "lines": [
                (name, [_token(*pair) for pair in zip(row["tokens"], row[key], strict=True)])
                for name, key in (("base", "base_kl_nats"), ("baked", "baked_kl_nats"))
            ],
        }
        for run in runs
        for row in run.token_kl[:share]
    ]


def kl_legend() -> list[tuple[int, str]]:
    """The colours' levels and what they stand for, in nats."""
    edges = [f"{edge:g}" for edge in KL_EDGES_NATS]
    between = [f"{low} to {high}" for low, high in pairwise(edges)]
    return list(enumerate([f"below {edges[0]}", *between, f"{edges[-1]} and more"]))


def _token(text: str, kl_nats: float | None) -> tuple[str, int | str, str]:
    """What is shown, the level of its colour, and its number."""
    shown = text.replace("\n", "↵\n") or "∅"
    if kl_nats is None:
        return shown, "x", "not finite"
    return shown, sum(kl_nats >= edge for edge in KL_EDGES_NATS), f"{max(kl_nats, 0):.3f}"


def _tags(row: Mapping[str, Any]) -> set[str]:
    baked, tags = row["baked"], set[str]()
    if "in_context" in row and baked["text"] != row["in_context"]["text"]:
        tags.add("differs")
    if baked.get("correct", 1) < 1:
        tags.add("wrong")
    elif row.get("base", {}).get("correct", 1) < 1:
        tags.add("fixed")
    return tags
