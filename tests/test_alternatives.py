"""`opcd.alternatives`: the same rows, with other prompts."""

from pathlib import Path

import pytest

from opcd import alternatives
from opcd.alternatives import (
    Alternatives,
    compressed_items,
    measure_alternatives,
    rows_of_responses,
)
from opcd.assembly import Parts, assemble
from opcd.responses import Response
from opcd.types import Answered, PromptPair, Rollout, Score
from tiny import make_run

SYSTEM = "Answer every message of the shop with one word and nothing else, please."


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Parts:
    return assemble(make_run(tmp_path_factory.mktemp("other"), tiny_model_path, system=SYSTEM))


def halve(text: str) -> str:
    return " ".join(text.split()[::2])


def test_rows_keep_their_tasks_and_get_a_shorter_context(parts: Parts) -> None:
    asked: list[str] = []

    def compress(text: str) -> str:
        asked.append(text)
        return halve(text)

    items = parts.items["test"]
    shorter = compressed_items(parts, items, compress)
    assert asked == [SYSTEM], "one text for all rows is compressed once"
    for before, after in zip(items, shorter, strict=True):
        assert after.task == before.task
        assert after.pair.student_ids == before.pair.student_ids
        text = parts.renderer.decode(after.pair.teacher_ids)
        assert halve(SYSTEM) in text and SYSTEM not in text


def test_a_compressed_context_is_answered_by_the_base_model(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressor that changes nothing gives the row of `in_context`."""
    monkeypatch.setattr(alternatives, "build_compressor", lambda rate, device: lambda text: text)
    found = measure_alternatives(parts, None, parts.items["test"], Alternatives(compress_rate=0.5))
    rows = {row.pop("condition"): row for row in found}
    assert list(rows) == ["base", "in_context", "baked", "compressed"]
    assert rows["compressed"] == rows["in_context"]
    assert rows["base"]["prompt_tokens"] < rows["in_context"]["prompt_tokens"]


def test_metrics_come_with_their_intervals() -> None:
    def answers(*marks: float) -> list[Response]:
        given = Answered(PromptPair("x", (1,), (1,)), Rollout("x", (7, 7, 2), True))
        return [Response((given,), f"{m}", Score({"correct": m})) for m in marks]

    responses = {"in_context": answers(1, 1, 1, 0), "soft_prompt": answers(1, 1, 0, 0)}
    tokens = {"in_context": 90.0, "soft_prompt": 26.0}
    _, soft = rows_of_responses(responses, tokens, {"soft_prompt": 768})
    assert soft["correct"] == 0.5
    assert soft["correct_lowest"] < 0.5 < soft["correct_highest"]
    assert soft["agreement"] == 0.75
    assert (soft["prompt_tokens"], soft["extra_parameters"]) == (26.0, 768)
    assert "response_tokens" not in soft
