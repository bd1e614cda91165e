"""`opcd.rollouts.engine`: draws that depend on the seed and the task alone."""

import torch

from opcd.rollouts.engine import Prompt, Sampling


def test_draws_are_a_function_of_seed_and_task() -> None:
    """And of nothing else: not of torch's generator, nor of how many are asked for."""
    torch.manual_seed(1)
    first = Sampling(seed="0/3").uniforms(Prompt("task-1", (), 0), 8)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    cold = Sampling(seed="0/3", temperature=0.5).uniforms(Prompt("task-1", (1, 2), 9), 8)
    assert torch.equal(cold, first)
    assert torch.equal(Sampling(seed="0/3").uniforms(Prompt("task-1", (), 0), 5), first[:5])
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_task_or_draw_draws_otherwise() -> None:
    draws = [
        Sampling(seed=seed).uniforms(Prompt(task, (), 0, draw), 4)
        for seed in ("0/3", "0/31", "1/3")
        for task in ("task-1", "task-11")
        for draw in ("", "/7", "/8")
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_draws_are_uniform() -> None:
    """20,000 numbers over 50 tasks: each tenth of [0, 1) holds a tenth, within 5 sigma."""
    parts = [Sampling(seed="x").uniforms(Prompt(f"task-{i}", (), 0), 400) for i in range(50)]
    counts = torch.histc(torch.cat(parts).float(), bins=10, min=0, max=1)
    assert torch.cat(parts).dtype == torch.float64
    assert (counts - 2000).abs().max() < 5 * (20_000 * 0.1 * 0.9) ** 0.5
