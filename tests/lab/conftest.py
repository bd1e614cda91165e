"""A mind that reads code books, trained here in a few seconds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from opcd.lab import minds, worlds
from opcd.lab.language import build_tokenizer

READER = replace(minds.LARGE, name="reader", steps=60)


@pytest.fixture(scope="session")
def reader_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mind that has read code books only."""
    folder = tmp_path_factory.mktemp("reader") / "mind"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minds, "MIX", {"book": 8})
        minds.train(READER).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def reading(reader_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Worlds whose runs are about that mind; no other is trained or looked for."""
    monkeypatch.setattr(worlds, "mind_folder", lambda *_: reader_path)
    yield reader_path
