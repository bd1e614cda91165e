"""`benchmarks/`: which figures may be printed, what a step needs at the least, the page."""

import json
from pathlib import Path
from typing import Any

import page
import pytest
from limits import Shape, Tokens, least_flops
from measures import UNSTABLE, Goal, judge, pair_ratios, show, show_plain, summarise
from workload import MARK, Workload, make_context, parse_answer, read_prompts

TINY = Shape(layers=2, hidden=8, inner=12, heads=2, key_heads=1, head_width=4, vocabulary=50)


def test_a_figure_needs_repetitions_that_agree() -> None:
    """One measurement is none; a quarter of the median apart is still agreement."""
    assert show(summarise([2.0, 2.2, 2.5])) == "2.20 [2.00, 2.50]"
    assert show(summarise([2.0, 2.2, 2.6])) == UNSTABLE
    assert show(summarise([2.0])) == UNSTABLE
    assert show_plain(summarise([4.0, 3.0, 3.5]), 1) == UNSTABLE
    assert show_plain(summarise([4.0, 3.5, 3.8]), 1) == "3.8"


def test_ratios_are_taken_turn_by_turn() -> None:
    """A machine that is slow for one turn is slow for both sides of it."""
    found = pair_ratios([1.0, 2.0, 1.0], [4.0, 8.0, 4.0])
    assert (found.median, found.spread) == (0.25, 0.0)
    with pytest.raises(ValueError, match="longer"):
        pair_ratios([1.0], [1.0, 2.0])


def test_a_goal_is_reached_missed_or_not_known() -> None:
    goal = Goal("speed", 0.33)
    assert judge(summarise([0.3, 0.33, 0.32]), goal)[-1] == "yes"
    assert judge(summarise([0.33, 0.35, 0.34]), goal)[-1] == "no"
    assert judge(summarise([0.1, 0.3, 0.2]), goal)[2:] == (UNSTABLE, "-")


def test_least_work_by_hand() -> None:
    """Counted product by product for a model of two layers."""
    assert TINY.weights == 2 * (64 + 32 + 32 + 64 + 96 + 96 + 96)
    assert TINY.adapter_weights(1) == 2 * (16 + 12 + 12 + 16 + 20 + 20 + 20)
    found = least_flops(TINY, Tokens(student=10, teacher=7, response=3, context=100), rank=2)
    head = 2 * 50 * 8 * 3
    scores_and_values = 2 * (2 * 100 * 8 + 2 * 100 * 8)
    assert found["teacher"] == 7 * (2 * TINY.weights + scores_and_values) + head
    assert found["train"] == 10 * (4 * TINY.weights + 6 * 2 * TINY.adapter_weights(1)) + 2 * head


def test_what_all_rows_open_with_is_read_once() -> None:
    """On the student's side; the teacher's context not at all, since it was read before."""
    about = {
        "student_prompt_tokens": 80,
        "student_shared_tokens": 6,
        "teacher_prompt_tokens": 880,
        "teacher_shared_tokens": 104,
    }
    row: dict[str, Any] = {"about": about, "steps": [{"response_tokens": 40}]}
    with_context = page.tokens_of({**row, "context_tokens": 100}, 8)
    assert with_context == Tokens(80 - 7 * 6 + 32, 880 - 8 * 104 + 32, 40, 100)
    alike = {**about, "teacher_prompt_tokens": 80}
    without = page.tokens_of({**row, "about": alike, "context_tokens": 0}, 8)
    assert without.teacher == without.student


def test_only_answers_are_heard() -> None:
    """A library's own words on standard output are not."""
    assert parse_answer(f'{MARK}{{"wall_s": 1.5}}\n') == {"wall_s": 1.5}
    assert parse_answer('{"loss": 0.1}\n') is None


def test_both_sides_are_given_the_same() -> None:
    load = Workload("folder", "float32", "some context", read_prompts(8), 32)
    assert Workload.load(load.dump()) == load
    assert load.template.format(context="c", prompt="p") == "c\n\np"
    bare = Workload("folder", "float32", "", read_prompts(8), 32)
    assert bare.template.format(context="", prompt="p") == "p"
    assert len(set(load.prompts)) == 8


def test_a_context_that_the_texts_do_not_fill_is_refused() -> None:
    class Letters:
        """A token for each letter."""

        def encode(self, text: str, add_special_tokens: bool) -> list[str]:
            return list(text)

        def decode(self, ids: list[str]) -> str:
            return "".join(ids)

    assert len(make_context(Letters(), 1000)) == 1000
    assert make_context(Letters(), 0) == ""
    with pytest.raises(SystemExit, match="ask for fewer"):
        make_context(Letters(), 10**6)


def step(wall_s: float, teacher_s: float, peak_bytes: float) -> dict[str, float]:
    return {
        "wall_s": wall_s,
        "rollout_s": wall_s / 4,
        "teacher_s": teacher_s,
        "train_s": 0.75 * wall_s - teacher_s,
        "response_tokens": 256,
        "peak_bytes": peak_bytes,
    }


def side(name: str, context: int, walls: tuple[float, ...], gib: float) -> dict[str, Any]:
    about = {"student_prompt_tokens": 400, "teacher_prompt_tokens": 400 + 8 * context}
    about |= {"student_shared_tokens": 20, "teacher_shared_tokens": 20 + context}
    return {
        "side": name,
        "variant": "float32",
        "context_tokens": context,
        "about": about,
        "steps": [step(wall, wall / 4, gib * 2**30) for wall in walls],
        "ends": [{"read_context_s": 6.0 if context else 0.0} for _ in walls],
    }


def results() -> dict[str, Any]:
    rows = [
        side("opcd", 1000, (5.0, 5.2), 1.5),
        side("sdft", 1000, (20.0, 21.0), 3.0),
        side("opcd", 4000, (6.0, 9.0), 1.5),
        side("sdft", 4000, (80.0, 81.0), 3.0),
    ]
    rows[3]["steps"][0]["peak_bytes"] = 2 * 2**30
    passes = {"walls_s": [1.0, 1.1], "peak_bytes": 2**28, "loss_nats": 1.25, "gradient_norm": 0.1}
    return {
        "processor": "a processor, 2 cores",
        "versions": {"torch": "2", "trl": "1.16.0"},
        "model": "smollm2-135m",
        "shape": {
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
        },
        "rows": 8,
        "new_tokens": 32,
        "rank": 16,
        "matmul_flops_per_s": {"float32": 2e11, "bfloat16": 4e11},
        "matmul_side": 2048,
        "trials": {"opcd": {"float32": 5.0}, "sdft": {"float32": 20.0}},
        "best": {"opcd": "float32", "sdft": "float32"},
        "settings": {"float32": rows, "best": rows},
        "kernel": [{"way": way, "vocabulary": 49152, **passes} for way in ("opcd", "trl", "dense")],
        "kernel_tokens": 512,
        "run_s": 1200.0,
    }


def test_the_page_prints_what_was_reproduced_and_nothing_else(tmp_path: Path) -> None:
    """Medians, ratios, goals; where repetitions disagree, on time or memory, there is no figure."""
    page.write(tmp_path / "performance.md", json.loads(json.dumps(results())))
    text = (tmp_path / "performance.md").read_text()
    assert "{" not in text, "every place is filled"
    ours, theirs, unsteady = (
        next(line for line in text.splitlines() if line.startswith(f"| {start}"))
        for start in ("1,000 | opcd", "1,000 | SDFT", "4,000 | opcd")
    )
    assert "5.10 [5.00, 5.20]" in ours
    assert "0.25 [0.25, 0.25]" in ours
    assert "20.50 [20.00, 21.00]" in theirs
    assert UNSTABLE in unsteady and "7.50" not in unsteady
    verdicts = [line for line in text.splitlines() if line.endswith(("| yes |", "| no |", "| - |"))]
    assert any("at 1,000 tokens, float32" in v and "| yes |" in v for v in verdicts)
    assert any("each side's best" in v and "| no |" in v for v in verdicts)
    assert any("at 4,000 tokens" in v and "| - |" in v for v in verdicts)
    assert any("peak RSS" in v and "0.50" in v and "| yes |" in v for v in verdicts)
    assert any("peak RSS at 4,000" in v and UNSTABLE in v for v in verdicts)
    assert (tmp_path / "performance.svg").read_text().startswith("<?xml")
