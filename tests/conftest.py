"""What many tests share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from opcd.config import Run
from worlds import tiny_llama, tokenizer

torch.set_num_threads(1)
settings.register_profile("opcd", derandomize=True, database=None, deadline=None)
settings.load_profile("opcd")


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and its tokenizer, as transformers writes them."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def learner_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with room for the prompts that ask for lessons."""
    folder = tmp_path_factory.mktemp("learner") / "model"
    tiny_llama(positions=2048).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def player_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with room for a game whose player is warned at every turn."""
    folder = tmp_path_factory.mktemp("player") / "model"
    tiny_llama(positions=2048, initializer_range=0.15).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def whole_run_path(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Path:
    """A tiny run with every file that a page shows. Tests that change it make a copy."""
    from tiny import whole_run

    return whole_run(tmp_path_factory.mktemp("whole"), tiny_model_path)


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, learner_path: Path
) -> tuple[Run, dict[str, Any], list[str]]:
    """Two rounds of learning in one go: the run, what was found, and what was said."""
    from learners import Learner, experience_run
    from opcd import assembly
    from opcd.rounds import learn

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "HFEngine", Learner)
        run = experience_run(tmp_path_factory.mktemp("rounds"), learner_path)
        return run, learn(run, 2, said.append), said
