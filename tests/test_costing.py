"""`opcd.costing`: costs.json of a finished run, against the run itself."""

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig

from opcd.assembly import Parts
from opcd.costing import (
    Alternatives,
    Sharing,
    cost_run,
    find_sharing,
    kv_shape,
    mean_requests,
    plain_models,
)
from opcd.costs import Prices
from opcd.errors import CostsError, RunFolderError, TaskError
from opcd.programs import evaluate_run, open_baked
from opcd.runs import create_run, read_jsonl
from opcd.training import train
from tiny import SHAPE, build, make_game_run, make_run, random_ids

SYSTEM = "Answer every message of the shop with one word and nothing else, please. " * 4
PRICES = Prices(1.0, 2.0, 0.25, 3.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("costs")
    lr = ("optimizer.lr=0.02", "optimizer.warmup_steps=0", "steps=2")
    return train(make_run(folder, tiny_model_path, *lr, system=SYSTEM)).folder.path


@pytest.fixture(scope="module")
def parts(path: Path) -> Parts:
    return open_baked(path)[1]


@pytest.fixture(scope="module")
def found(path: Path) -> dict[str, Any]:
    return cost_run(path, PRICES, [1, 2])


def test_costs_json_is_flat_rows_of_numbers_by_section(path: Path, found: dict[str, Any]) -> None:
    written = json.loads((path / "costs.json").read_text("utf-8"))
    assert written == json.loads(json.dumps(found, allow_nan=False))
    sections = ["prompt_tokens", "prefill", "kv_cache", "training", "break_even", "notes"]
    assert list(written) == sections
    for section in written.values():
        for row in [section] if isinstance(section, dict) else section:
            assert all(isinstance(v, int | float | str | None) for v in row.values())


def test_prompts_are_those_of_the_test_rows(parts: Parts, found: dict[str, Any]) -> None:
    pairs = [item.pair for item in parts.items["test"]]
    prompt = found["prompt_tokens"]
    assert prompt["rows"] == len(pairs) == 4
    assert prompt["context_tokens"] == parts.context_tokens > 64
    assert prompt["with_context_tokens"] == sum(len(p.teacher_ids) for p in pairs) / 4


def test_each_condition_has_its_rows(found: dict[str, Any]) -> None:
    names = ["in_context", "in_context_cached", "baked"]
    assert [row["condition"] for row in found["kv_cache"]] == names
    assert [(r["batch_size"], r["condition"]) for r in found["prefill"]] == [
        (size, name) for size in (1, 2) for name in names
    ]
    assert [row["against"] for row in found["break_even"]] == names[:2]
    read = [row["prompt_tokens_read"] for row in found["prefill"]]
    assert read[0] - read[1] == found["prompt_tokens"]["shared_tokens"]


def test_training_counts_what_the_steps_reported(path: Path, found: dict[str, Any]) -> None:
    metrics = list(read_jsonl(path / "metrics.jsonl"))
    rows = {row["part"]: row for row in found["training"]}
    assert rows["student learns"]["task_response_tokens"] == sum(
        row["response_tokens"] for row in metrics
    )
    assert rows["all"]["wall_s"] == pytest.approx(sum(row["wall_s"] for row in metrics))
    assert rows["student learns"]["sequences"] == 2 * 4


def test_bytes_of_a_token_are_those_of_a_real_cache(parts: Parts) -> None:
    """The formula against keys and values that were read, in both dtypes."""
    base, _ = plain_models(parts)
    for dtype in (torch.float32, torch.bfloat16):
        model = base.to(dtype)
        cache = model(torch.tensor([random_ids(10, 0)])).past_key_values
        sides = [side for layer in cache.layers for side in (layer.keys, layer.values)]
        assert kv_shape(model).bytes_per_token * 10 == sum(side.nbytes for side in sides)


def test_plain_models_are_the_base_and_the_merged_student(parts: Parts) -> None:
    base, baked = plain_models(parts)
    ids_1S = torch.tensor([random_ids(12, 1)])
    with torch.no_grad():
        student_SV = parts.student.eval()(input_ids=ids_1S).logits
        baked_SV = baked(input_ids=ids_1S).logits
        torch.testing.assert_close(baked_SV, student_SV, rtol=1e-4, atol=1e-4)
        with parts.student.disable_adapter():
            base_SV = parts.student(input_ids=ids_1S).logits
        torch.testing.assert_close(base(input_ids=ids_1S).logits, base_SV)
    assert not torch.allclose(student_SV, base_SV, atol=1e-3)


def test_rows_that_share_too_little_have_no_cached_condition(parts: Parts) -> None:
    """As where every row brings its own context."""
    items = parts.items["test"]
    base, _ = plain_models(parts)
    pairs = [item.pair for item in items]
    apart = [
        type(items[0])(item.task, type(pair)(pair.task_id, pair.student_ids, random_ids(90, i)))
        for i, (item, pair) in enumerate(zip(items, pairs, strict=True))
    ]
    sharing = find_sharing(base, apart)
    assert sharing.tokens == 0
    assert sharing.why_not and "share their first 0 tokens only" in sharing.why_not
    responses = {"in_context": Fraction(3), "baked": Fraction(4)}
    assert list(mean_requests(apart, sharing, responses)) == ["in_context", "baked"]
    assert mean_requests(apart, sharing, responses)["in_context"].prompt_tokens == 90


def test_a_model_that_cannot_keep_a_context_has_no_cached_condition(parts: Parts) -> None:
    window = build(MistralConfig(sliding_window=16, **SHAPE))
    sharing = find_sharing(window, parts.items["test"])
    assert sharing.why_not and "window of 16 tokens" in sharing.why_not
    assert sharing == Sharing(sharing.ids, sharing.why_not) and sharing.tokens == 0


def test_the_length_of_answers_is_the_measured_one(
    path: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    """Before `opcd evaluate`, that of training, for both sides."""
    before = {row["condition"]: row["own_tokens_per_request"] for row in found["kv_cache"]}
    prompt = found["prompt_tokens"]
    extra = before["baked"] - prompt["without_context_tokens"]
    assert before["in_context"] - prompt["with_context_tokens"] == pytest.approx(extra)
    assert any("opcd evaluate measures them" in note["note"] for note in found["notes"])
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    task = evaluate_run(copy).summary["suites"]["task"]
    after = {r["condition"]: r for r in cost_run(copy, Prices(), [1])["kv_cache"]}
    measured = task["baked"]["response_tokens"]["mean"]
    own = after["baked"]["own_tokens_per_request"]
    assert own - prompt["without_context_tokens"] == pytest.approx(measured)


def test_without_prices_the_options_are_named(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    found = cost_run(copy, Prices(), [1])
    assert found["break_even"] == []
    notes = [note["note"] for note in found["notes"] if note["about"] == "break_even"]
    assert notes == ["left out; --input-price and --training-price would give it"]
    assert any("this machine's" in note["note"] for note in found["notes"])


def test_alternatives_stand_beside_the_conditions(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    found = cost_run(copy, Prices(), [1], Alternatives(True, 1))
    rows = {row["condition"]: row for row in found["alternatives"]}
    assert list(rows) == ["base", "in_context", "baked", "soft_prompt"]
    prompt = found["prompt_tokens"]
    assert rows["soft_prompt"]["prompt_tokens"] == prompt["without_context_tokens"] + 16
    assert rows["in_context"]["prompt_tokens"] == prompt["with_context_tokens"]
    assert rows["soft_prompt"]["extra_parameters"] == 16 * 48
    assert rows["base"]["extra_parameters"] == 0 < rows["baked"]["extra_parameters"]
    for row in rows.values():
        low, high = row["correct_lowest"], row["correct_highest"]
        assert low - 1e-9 <= row["correct"] <= high + 1e-9


def test_what_is_measured_stays_when_an_alternative_fails(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    (copy / "costs.json").unlink(missing_ok=True)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("opcd.costing.measure_alternatives", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cost_run(copy, Prices(), [1], Alternatives(True, 1))
    assert json.loads((copy / "costs.json").read_text("utf-8"))["prefill"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Alternatives(True, 0), "--soft-prompt-steps 0: it takes at least one step"),
        (Alternatives(False, 5), "no soft prompt is trained without --alternatives"),
        (Alternatives(False, None, 2.0), "--compress-rate 2: it is the share"),
    ],
)
def test_alternatives_that_mean_nothing_are_refused_before_anything_is_read(
    wanted: Alternatives, message: str
) -> None:
    with pytest.raises(CostsError, match=message):
        cost_run(Path("none"), Prices(), [1], wanted)


@pytest.mark.parametrize(
    ("missing", "message"), [("best", "has no best/ yet"), ("metrics.jsonl", "has no rows in")]
)
def test_an_unfinished_run_is_refused(
    path: Path, tmp_path: Path, missing: str, message: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    gone = copy / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(RunFolderError, match=message):
        cost_run(copy, Prices(), [1])


def test_a_run_without_test_rows_is_refused(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(path, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["tasks"]["test"] = []
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TaskError, match="the run has no test split"):
        cost_run(copy, Prices(), [1])


def test_a_game_has_no_request_to_measure(tmp_path: Path) -> None:
    """Said before anything is loaded."""
    folder = create_run(make_game_run(tmp_path, tmp_path / "no model"), overwrite=False)
    with pytest.raises(CostsError, match=r"plays a game, whose prompts grow from turn to turn"):
        cost_run(folder.path, PRICES, [1])
