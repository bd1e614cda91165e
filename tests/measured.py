"""Folders of finished, measured runs for tests of what is reported; no model has run for them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd.config import dump_config, load_config
from opcd.intervals import estimate
from opcd.runs import write_json, write_text
from worlds import write_jsonl, write_run

TEXTS = {
    "base": ("wrong", "wrong", "word2", "wrong"),
    "in_context": ("word0", "wrong", "word2", "word3"),
    "baked": ("word0", "word1", "other", "word3"),
}
"""Each condition's answers to four rows whose right answers are word0 to word3."""
COSTS: dict[str, Any] = {
    "prompt_tokens": {},
    "prefill": [],
    "kv_cache": [],
    "training": [],
    "break_even": [],
    "notes": [],
}
"""A `costs.json` without figures."""
HARNESS = {
    "tasks": {
        "arc_easy": {
            "base": {"acc": {"mean": 0.5531, "stderr": 0.0102}},
            "in_context": {"acc": {"mean": 0.5, "stderr": 0.01}},
            "baked": {"acc": {"mean": 0.5494, "stderr": 0.0103}},
            "difference": {"acc": {"mean": -0.0037, "stderr": 0.004}},
        },
        "wikitext": {
            "base": {"word_perplexity": {"mean": 31.42, "stderr": None}},
            "baked": {"word_perplexity": {"mean": 31.8, "stderr": None}},
        },
    },
    "lm_eval": "0.4.9",
    "limit": 500,
}
"""Two benchmarks, one of shares and one that is none."""
HOSTILE = "</script><script>alert(1)</script> \" ' & <b>bold</b> \u2028 {{ 7 * 7 }} $x$"
"""What models may write; it must arrive as text."""


def measured_run(
    folder: Path,
    texts: Mapping[str, Sequence[str]] = TEXTS,
    warmup_steps: int = 2,
    graded: bool = True,
    **summary: Any,
) -> Path:
    """A run of four steps measured on its test rows; `summary` replaces keys of evaluation.json."""
    loss = f"[loss]\nwarmup = {{ steps = {warmup_steps} }}" if warmup_steps else ""
    config = load_config(write_run(folder.with_name(f"{folder.name}_recipe"), tables=loss))
    folder.mkdir(parents=True)
    write_text(folder / "config.json", dump_config(config))
    (folder / "best").mkdir()
    write_json(folder / "best" / "best.json", {"step": 4, "chosen_by": "correct"})
    answers = [_answer(texts, index, graded) for index in range(len(texts["baked"]))]
    write_jsonl(folder / "answers.jsonl", answers)
    write_json(folder / "evaluation.json", _summary(texts, answers) | summary)
    write_jsonl(folder / "metrics.jsonl", [_metrics(step) for step in range(4)])
    validation = [
        {"step": step, "rows": 3, "correct": 0.25 * step, "kl_nats_per_token": 1.0 / step}
        for step in (1, 3)
    ]
    write_jsonl(folder / "validation.jsonl", validation)
    return folder


def trace(folder: Path, tokens: Sequence[str], base_kl_nats: Sequence[float | None]) -> None:
    """A `token_kl.jsonl` of one answer; the baked model keeps a tenth of each token's KL."""
    row = {
        "id": "test-0",
        "prompt": "question 0?",
        "tokens": list(tokens),
        "base_kl_nats": list(base_kl_nats),
        "baked_kl_nats": [None if kl is None else kl / 10 for kl in base_kl_nats],
    }
    write_jsonl(folder / "token_kl.jsonl", [row])


def rewrite(file: Path, **changes: Any) -> None:
    """Replace keys of a JSON object in a file."""
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | changes)


def _answer(texts: Mapping[str, Sequence[str]], index: int, graded: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": f"test-{index}",
        "prompt": f"question {index}?",
        "answer": f"word{index}",
    }
    for condition, found in texts.items():
        score = {"correct": float(found[index] == f"word{index}")} if graded else {}
        row[condition] = {"text": found[index], "note": "", **score}
    return row


def _summary(
    texts: Mapping[str, Sequence[str]], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    task: dict[str, Any] = {}
    for condition in texts:
        rows = [row[condition] for row in answers]
        agreement = [
            float(a["text"] == b["in_context"]["text"]) for a, b in zip(rows, answers, strict=True)
        ]
        metrics = {"agreement": agreement, "response_tokens": [3.0] * len(rows)}
        if "correct" in rows[0]:
            metrics = {"correct": [row["correct"] for row in rows], **metrics}
        task[condition] = {name: estimate(values).as_json() for name, values in metrics.items()}
    kept = {"baked": {"kl_nats_per_token": estimate([0.1, 0.2]).as_json()}}
    test = {"suite": "task", "metric": "correct", "first": "baked", "second": "base"}
    return {
        "suites": {"task": task, "kept": kept},
        "paired": [test | {"difference": 0.25, "p": 0.5, "test": "McNemar, exact"}],
        "split": "test",
        "checkpoint": "step-4",
        "context_tokens": 1234,
        "seed": 7,
    }


def _metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "kl_nats_per_token": 10.0 / 10**step,
        "anchor_kl_nats_per_token": 0.01,
        "student_entropy_nats": 1.0 - 0.1 * step,
        "tokens_per_response": 4.0 + step,
        "truncated_fraction": 0.5,
        "skipped_steps": 0,
        "response_tokens": 100,
        "wall_s": 2.5,
        "rollout_s": 1.0,
        "teacher_s": 0.5,
        "train_s": 1.0,
        "peak_bytes": 2**30,
    }
