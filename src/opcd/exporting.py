"""The baked model as a plain transformers folder that anything can serve."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opcd import adapters, weights
from opcd.assembly import Parts
from opcd.errors import ExportError, RunFolderError
from opcd.items import pairs_of
from opcd.programs import open_baked
from opcd.types import PromptPair

PROMPTS = 16
"""Greedy answers compared before the export counts as done."""


def export_run(path: Path, target: Path) -> int:
    """Merge a run's best weights in float32, write them, and compare greedy answers.

    The comparison is between the run's adapter, unmerged, and the folder read back, both through
    transformers' own `generate`.

    Returns:
        How many prompts were answered alike.

    Raises:
        RunFolderError: the target exists.
        ExportError: it cannot be written, or some answer differs; nothing is left behind.
    """
    if target.exists():
        raise RunFolderError(f"{target} exists; name another folder, or delete it first")
    folder, parts, _ = open_baked(path)
    config = parts.config
    plain = weights.load_model(config.model.path, torch.float32, config.model.revision)
    student = adapters.tune(plain, config.model.tuning, config.seed)
    adapters.load_weights(student, folder.best)
    pairs = _prompts(parts)
    before = _greedy(student.eval(), pairs, parts)
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        adapters.save_weights(adapters.merge(student), draft)
        parts.renderer.tokenizer.save_pretrained(draft)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise ExportError(
            f"{target} could not be written ({error}); free space on the disk, or name another"
        ) from error
    after = _greedy(weights.load_model(str(draft.resolve()), torch.float32), pairs, parts)
    different = [p.task_id for p, a, b in zip(pairs, before, after, strict=True) if a != b]
    if different:
        shutil.rmtree(draft)
        raise ExportError(
            f"the exported model answers {len(different)} of {len(pairs)} prompts otherwise than "
            f"its run ({', '.join(different[:3])}), so it was not kept; please report this"
        )
    draft.rename(target)
    return len(pairs)


def _prompts(parts: Parts) -> list[PromptPair]:
    """Half from the run's rows, half from other system messages."""
    own = pairs_of(dict(reversed(parts.items.items())))
    others = parts.render_anchors(parts.kept.draw(PROMPTS // 2, "export"))
    return [*own[: PROMPTS - len(others)], *others]


@torch.no_grad()
def _greedy(model: Any, pairs: Sequence[PromptPair], parts: Parts) -> list[list[int]]:
    answers: list[list[int]] = []
    for pair in pairs:
        ids_1S = torch.tensor([pair.student_ids], device=model.device)
        found_1S = model.generate(
            input_ids=ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            do_sample=False,
            max_new_tokens=parts.config.rollout.max_new_tokens,
            pad_token_id=0,
        )
        answers.append(found_1S[0, len(pair.student_ids) :].tolist())
    return answers
