"""`recipes/minimal_loop.py` is the same method: one step of it has the library's loss."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from opcd.distill import accumulate, count_rollouts
from opcd.drawing import roll_out
from opcd.tally import Tally
from opcd.training import prepare
from tiny import make_run, nudge, parts_of

FILE = Path(__file__).parent.parent / "recipes" / "minimal_loop.py"


def minimal_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_loop", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl"])
def test_one_step_has_the_librarys_loss(
    direction: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    """The same prompts, rendered by each side for itself, and the same responses."""
    keys = ("anchor.share=0.0", f"loss.direction={direction}", "model.tuning.rank=4")
    parts = parts_of(make_run(tmp_path, tiny_model_path, *keys))
    nudge(parts.student)
    prepare(parts)
    rollouts, tally = roll_out(parts, 0), Tally()
    count_rollouts(parts, rollouts, tally)
    answered = rollouts.answered
    accumulate(parts, answered, parts.config.loss, tally)

    loop, losses = minimal_loop(), []
    messages = {item.task.id: item.task.messages[-1].content for item in parts.items["train"]}
    context = [{"role": "system", "content": "Answer in verse."}]
    parts.student.eval()
    for one in answered:
        prompts = loop.prompts_of(parts.renderer.tokenizer, messages[one.pair.task_id], context)
        response_1T = torch.tensor([one.rollout.response_ids])
        losses.append(loop.distillation_loss(parts.student, *prompts, response_1T, direction))
    assert torch.stack(losses).mean().item() == pytest.approx(tally.sums["loss_nats"], rel=1e-4)


def test_it_stays_short() -> None:
    assert len(FILE.read_text(encoding="utf-8").splitlines()) < 150
