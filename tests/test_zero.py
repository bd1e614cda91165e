"""`opcd.zero`: two processes whose weights DeepSpeed cuts give what one gives.

Skipped where DeepSpeed is not installed (`pip install 'opcd-lm[deepspeed]'`); the config that is
shipped for it is read in `test_launch.py` in any case.
"""

import pytest

from opcd import checkpoint
from opcd.config import Run
from opcd.runs import open_run
from opcd.training import train
from test_launch import (
    FULL,
    LORA,
    UNEVEN,
    Ends,
    assert_same_first_step,
    assert_same_numbers,
    load_best,
    rows_of,
    run_all,
)
import torch

pytest.importorskip("deepspeed")

RUNS = {
    "zero_lora": (*LORA, *UNEVEN),
    "zero_full": (*FULL, *UNEVEN, "model.gradient_checkpointing=true"),
    "zero_live": (*FULL, 'teacher={type="live"}', "optimizer.clip_norm=0.01"),
    "zero_bf16": (*FULL, "model.dtype=bfloat16", "steps=2"),
    "zero_lora16": (*LORA, "model.dtype=bfloat16", "steps=2"),
    "zero_stopped": FULL,
    "zero_resumed": (*FULL, *UNEVEN),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return run_all(tmp_path_factory, RUNS)


@pytest.mark.parametrize("name", ["zero_lora", "zero_full", "zero_live"])
def test_two_processes_give_what_one_gives(ends: Ends, name: str) -> None:
    """Losses, norms, validation, weights, optimiser and what was kept as the best."""
    assert ends.of(name) == [{"steps": 4, "interrupted_by": None}] * 2, ends.said
    assert_same_numbers(ends.folder_of(name, 2), ends.folder_of(name, 1))
    best, other = (load_best(ends.folder_of(name, count)) for count in (2, 1))
    assert best.keys() == other.keys()
    for key, weight in best.items():
        torch.testing.assert_close(weight, other[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["zero_bf16", "zero_lora16"])
def test_bfloat16_stays_near_one_process(ends: Ends, name: str) -> None:
    assert_same_first_step(*(rows_of(ends.folder_of(name, n))[0] for n in (2, 1)))


def test_a_checkpoint_of_two_resumes_in_one(ends: Ends) -> None:
    assert [end["steps"] for end in ends.of("zero_stopped")] == [2, 2]
    folder, run = open_run(ends.folder_of("zero_stopped", 2).path)
    assert train(run, resume=True).steps == 4
    assert_same_numbers(folder, ends.folder_of("zero_stopped", 1))


def test_a_checkpoint_of_one_resumes_in_two(ends: Ends) -> None:
    assert ends.of("zero_resumed") == [{"steps": 4, "interrupted_by": None}] * 2
    assert_same_numbers(ends.folder_of("zero_resumed", 2), ends.folder_of("zero_resumed", 1))
