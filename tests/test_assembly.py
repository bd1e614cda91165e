"""`opcd.assembly`: a run's contexts, each read once, and what the run says of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opcd.adapters import adapter_off, trainable
from opcd.assembly import Parts, assemble, share_openings
from opcd.config import Run
from opcd.config.files import derive
from opcd.distill import accumulate, batch_of, count_rollouts
from opcd.drawing import roll_out
from opcd.prefix_cache import token_bytes
from opcd.tally import Tally
from opcd.training import prepare
from tiny import log_probs_of, make_run, nudge, teacher_of
from worlds import write_jsonl

FEW = ("model.tuning={type='lora', rank=4}", "anchor.share=0", "batch.prompts_per_step=6")
LESSONS = ("Look twice. ", "Count the legs. ", "Never say never, or at most once. ")


def pool_run(tmp_path: Path, model: Path, *overrides: str) -> Run:
    """A run whose train rows are asked with each of three experiences."""
    files = [tmp_path / f"{n}.md" for n in range(len(LESSONS))]
    for n, (file, text) in enumerate(zip(files, LESSONS, strict=True)):
        file.write_text(text * (8 + 2 * n), encoding="utf-8")
    given = {"type": "experience", "path": [str(file) for file in files], "template": None}
    run = make_run(tmp_path, model, *FEW, *overrides)
    return derive(run, context={"placement": "system", **given})


def shared(parts: Parts) -> list[str]:
    return [note for note in parts.notes if "context" in note or "prefix_gib" in note]


def test_each_context_of_a_pool_is_read_once(tiny_model_path: Path, tmp_path: Path) -> None:
    """All prompts that a step can draw have theirs, though two rows of each were looked at."""
    parts = assemble(pool_run(tmp_path, tiny_model_path))
    openings = parts.teacher.openings
    lengths = sorted(map(len, openings.known))
    assert len(lengths) == 3
    (note,) = shared(parts)
    assert note == f"3 shared contexts of {lengths[0]} to {lengths[-1]} tokens are read once each"
    for item in parts.items["train"]:
        assert openings.of(item.pair.teacher_ids) in lengths
    teacher = teacher_of(parts)
    for step in range(3):
        answered = roll_out(parts, step).answered
        _, batch = batch_of(parts, answered)
        found_TV = teacher.head(teacher.hidden(batch.teacher)).double().log_softmax(-1)
        with torch.no_grad(), adapter_off(parts.student):
            wanted = [
                log_probs_of(parts.student, a.pair.teacher_ids, a.rollout.response_ids)
                for a in answered
            ]
        torch.testing.assert_close(found_TV, torch.cat(wanted), rtol=0, atol=1e-4)
    assert (teacher.prefixes.reads, teacher.prefixes.dropped) == (3, 0)


def gradients(parts: Parts) -> dict[str, Tensor]:
    """Of one step's loss."""
    nudge(parts.student)
    prepare(parts)
    rollouts, tally = roll_out(parts, 0), Tally()
    count_rollouts(parts, rollouts, tally)
    accumulate(parts, rollouts.answered, parts.config.loss, tally)
    return {n: p.grad.clone() for n, p in trainable(parts.student).items() if p.grad is not None}


def test_gradients_do_not_depend_on_what_is_read_once(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    run = pool_run(tmp_path, tiny_model_path)
    whole, pooled = assemble(run), assemble(run)
    teacher_of(whole).whole = "as if it could not"
    wanted, found = gradients(whole), gradients(pooled)
    assert (teacher_of(whole).prefixes.reads, teacher_of(pooled).prefixes.reads) == (1, 3)
    assert max(g.abs().max() for g in wanted.values()) > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_contexts_that_do_not_fit_are_said_to_be_read_again(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    """By the bytes that they really take."""
    roomy = assemble(pool_run(tmp_path, tiny_model_path))
    for ids in roomy.teacher.openings.known:
        teacher_of(roomy).prefixes.get(ids)
    held = roomy.teacher.openings.tokens * token_bytes(roomy.student)
    assert teacher_of(roomy).prefixes.bytes == held
    for share, notes in ((1.01, 1), (0.5, 2)):
        gib = f"batch.prefix_gib={share * held / 2**30:.9f}"
        parts = assemble(pool_run(tmp_path, tiny_model_path, gib))
        assert len(shared(parts)) == notes
    assert "more than batch.prefix_gib = " in shared(parts)[1]
    assert "are read again" in shared(parts)[1]


def test_in_shards_what_does_not_fit_is_said_to_be_read_with_every_prompt(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There openings are read before the weights are cut, or not at all."""
    parts = assemble(pool_run(tmp_path, tiny_model_path, "batch.prefix_gib=0.0001"))
    assert any("are read again" in note for note in parts.notes)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    notes = share_openings(teacher_of(parts), parts.items)
    assert any("does not fit is read with every prompt" in note for note in notes)
    assert not any("again" in note for note in notes)


@pytest.mark.parametrize(("common", "alone"), [(3, 0), (2, 1), (0, 3)])
def test_prompts_in_no_group_are_counted(
    tiny_model_path: Path, tmp_path: Path, common: int, alone: int
) -> None:
    """Rows with a context of their own are read in full, those that share one are not."""
    run = make_run(tmp_path, tiny_model_path, *FEW, "context={type='column', template='{context}'}")
    for split in ("train", "validation", "test"):
        texts = ["The kettle is on the hob, and the cat on the kettle. " * 4] * common
        texts += [f"{n} of {split} keeps this to itself. " * 4 for n in range(alone)]
        rows = [
            {"prompt": f"{split} {n}?", "answer": "a", "context": text}
            for n, text in enumerate(texts)
        ]
        write_jsonl(tmp_path / "recipe" / f"{split}.jsonl", rows)
    parts = assemble(run)
    found, known = shared(parts), parts.teacher.openings.known
    if not common:
        assert known == []
        assert found == ["no two of 9 prompts share their context, so each is read in full"]
        return
    assert found[0] == f"the shared context of {len(known[0])} tokens is read once"
    assert [note.partition(" looked")[0] for note in found[1:]] == ["3 of 9 prompts"] * alone
