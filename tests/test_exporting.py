"""`opcd.exporting`: a plain folder that answers as its run, or none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opcd import adapters
from opcd.errors import ExportError, RunFolderError
from opcd.exporting import export_run
from opcd.programs import open_baked
from opcd.training import Outcome, train
from tiny import make_run

LEARNING = ("optimizer.lr=0.02", "optimizer.warmup_steps=0")
FULL = ('model.tuning={type="full"}', 'teacher={type="frozen"}')


@pytest.fixture(scope="module", params=[(), FULL], ids=["lora", "full"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path
) -> Outcome:
    folder = tmp_path_factory.mktemp("trained")
    return train(make_run(folder, tiny_model_path, *LEARNING, *request.param))


def test_the_folder_loads_with_transformers_alone(trained: Outcome, tmp_path: Path) -> None:
    """And gives the logits of the run's own student, chat template and all."""
    target = tmp_path / "exported"
    assert export_run(trained.folder.path, target) == 16
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    _, parts, _ = open_baked(trained.folder.path)
    turns = [{"role": "user", "content": "test 0?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tuple(ids) == parts.items["test"][0].pair.student_ids
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits
        wanted = parts.student.eval()(input_ids=torch.tensor([ids])).logits
        base = parts.base.model
        with adapters.adapter_off(base):
            before = base(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert (found - before).abs().max() > 0.1, "something was baked in"
    assert not (target / "adapter_config.json").exists()
    modes = {file.stat().st_mode for file in target.iterdir()}
    assert len(modes) == 1, "who may read one file may read all"
    assert [path.name for path in tmp_path.iterdir()] == ["exported"], "no draft is left"


def test_a_target_that_exists_is_refused_and_left_alone(trained: Outcome, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("note", encoding="utf-8")
    with pytest.raises(RunFolderError, match="exists; name another folder, or delete it"):
        export_run(trained.folder.path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_export_that_answers_otherwise_is_not_kept(
    trained: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is with the adapter unmerged, so a wrong merge cannot hide."""
    merge = adapters.merge

    def sabotaged(model: Any) -> Any:
        plain = merge(model)
        with torch.no_grad():
            plain.get_output_embeddings().weight.mul_(-1)
        return plain

    monkeypatch.setattr(adapters, "merge", sabotaged)
    with pytest.raises(ExportError, match=r"answers 16 of 16 prompts otherwise .*not kept"):
        export_run(trained.folder.path, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_what_is_no_run_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run"):
        export_run(tmp_path / "nothing", tmp_path / "exported")
