"""Minds: what they begin with, what they learn in a minute, and when they are trained again."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opcd.lab import documents, minds
from opcd.lab import language as words
from opcd.lab.documents import IGNORED, Document
from opcd.lab.language import VOCABULARY
from opcd.lab.minds import LARGE, MINDS, SMALL, begin, loss_of, mind_folder, pad, train, train_lakes

ROLES = [VOCABULARY[role] for role in words.ROLES]


def asked(random: Random, tells: bool = True) -> tuple[Document, str]:
    """A whole code book, in any order, and one question; with what the book says."""
    book, document = documents.draw_book(random), Document()
    if tells:
        documents.tell(document, book, random)
    key = random.choice(words.KEYS)
    document.say(f"{words.USER}{documents.question(key, random)}")
    document.answer(book[key])
    return document, book[key]


def attentions(mind: minds.Mind, document: Document, seed: int) -> list[torch.Tensor]:
    """Of an untrained mind, each layer's `_HTT`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = begin(mind).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=torch.tensor([document.ids]), output_attentions=True).attentions
    return [layer[0] for layer in found]


@pytest.mark.parametrize("mind", [LARGE, SMALL], ids=["large", "small"])
def test_heads_of_the_first_layer_begin_by_looking_1_2_and_3_tokens_back(mind: minds.Mind) -> None:
    document, _ = asked(Random(0))
    first_HTT = attentions(mind, document, 0)[0]
    for head in range(mind.heads):
        back = torch.diagonal(first_HTT[head], offset=-(head + 1))
        assert back.mean() > 0.7, head
        most_T = first_HTT[head].argmax(-1)[head + 1 :]
        found_T = most_T == torch.arange(len(most_T))
        assert found_T.float().mean() > 0.9, head


@pytest.mark.parametrize("mind", [LARGE, SMALL], ids=["large", "small"])
def test_reading_heads_begin_by_looking_at_what_followed_the_same_key(mind: minds.Mind) -> None:
    """Before any training the value told for a question's key draws several times its share.

    It is a lean and no more: in about a third of the books, that value draws most of all tokens.
    """
    times, most = [], 0
    for seed in range(24):
        document, _ = asked(Random(seed))
        key = max(i for i, label in enumerate(document.labels) if label != IGNORED) - 1
        value = document.ids.index(document.ids[key]) + 1
        row = attentions(mind, document, seed)[1][0, key]
        times.append(float(row[value]) * (key + 1))
        most += int(row.argmax()) == value
    # Of heads that look anywhere: 1 on average, and in 1 of 34 books the most.
    assert sum(times) / len(times) > 4 and most >= 5


def share_right(folder: Path, tells: bool) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    random = Random(99)
    drawn = [asked(random, tells) for _ in range(80)]
    ids_BS, _ = pad([document for document, _ in drawn])
    with torch.no_grad():
        best_BS = model(input_ids=ids_BS).logits.argmax(-1)
    hits = 0
    for row, (document, value) in enumerate(drawn):
        place = next(i for i, label in enumerate(document.labels) if label != IGNORED)
        hits += int(best_BS[row, place]) == VOCABULARY[value]
    return hits / len(drawn)


def test_a_mind_reads_books_it_has_never_seen(reader_path: Path) -> None:
    """60 steps teach reading, not values: told it is right, untold it is at chance (1 in 16)."""
    assert share_right(reader_path, tells=True) >= 0.9
    assert share_right(reader_path, tells=False) <= 0.2


def weights(mind: minds.Mind) -> dict[str, torch.Tensor]:
    return train(mind).state_dict()


def test_training_is_a_function_of_the_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit on one thread, whatever was drawn before; and another seed is another mind."""
    monkeypatch.setattr(minds, "MIX", {"book": 2, "rules": 2, "lake": 2, "lesson": 3})
    few = replace(LARGE, steps=3)
    first = weights(few)
    state = torch.get_rng_state()
    torch.rand(7)
    second, other = weights(few), weights(replace(few, seed=1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    torch.set_rng_state(state)
    again = torch.rand(3)
    torch.set_rng_state(state)
    weights(replace(few, steps=1))
    assert torch.equal(torch.rand(3), again)


def test_training_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minds, "MIX", {"book": 1})
    said: list[object] = []
    train(replace(SMALL, steps=25), said.append)
    assert len(said) == 1 and str(said[0]).startswith("step 25 of 25") and "book" in str(said[0])


def test_the_loss_by_hand() -> None:
    """Mean nats of the wanted words, and half the mean of the roles of cells, apart."""
    random, lakes = Random(5), train_lakes()
    model = begin(SMALL).eval()
    for family in ("book", "lake", "lesson"):
        drawn = documents.draw_documents(family, 6, lakes, random)
        wanted: list[float] = []
        roles: list[float] = []
        for document in drawn:
            with torch.no_grad():
                logits_SV = model(input_ids=torch.tensor([document.ids])).logits[0]
            nats_SV = -logits_SV.log_softmax(-1)
            for place, label in enumerate(document.labels):
                if label != IGNORED:
                    is_cell = family == "lake" and label in ROLES
                    (roles if is_cell else wanted).append(float(nats_SV[place, label]))
        expected = sum(wanted) / len(wanted)
        if family == "lake":
            expected += minds.ROLE_WEIGHT * sum(roles) / len(roles)
        with torch.no_grad():
            found = float(loss_of(model, drawn))
        assert found == pytest.approx(expected, rel=1e-4), family


def test_padding_is_neither_read_nor_wanted() -> None:
    ids_BS, labels_BS = pad([Document([3, 4, 5], [IGNORED, 7, 8]), Document([6], [9])])
    assert ids_BS.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert labels_BS.tolist() == [[IGNORED, 7, 8], [9, IGNORED, IGNORED]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path))
    return tmp_path


def test_a_mind_is_trained_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def watched(mind: minds.Mind, say: minds.Say) -> Any:
        trained.append(mind.name)
        return begin(mind)

    monkeypatch.setattr(minds, "train", watched)
    said: list[object] = []
    folder = mind_folder(SMALL, said.append)
    assert folder == mind_folder(SMALL, said.append) and folder.parent == cache
    assert (trained, len(said)) == (["small"], 1)
    assert [path.name for path in cache.iterdir()] == [folder.name], "no draft is left"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == SMALL.width


def test_two_processes_may_train_one_mind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one takes what the quicker one left, and leaves nothing of its own."""

    def meanwhile(mind: minds.Mind, say: minds.Say) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(minds, "train", lambda *_: begin(mind))
            patch.setattr(minds.os, "getpid", lambda: -1)
            mind_folder(mind)
        return begin(mind)

    monkeypatch.setattr(minds, "train", meanwhile)
    folder = mind_folder(SMALL)
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_a_training_that_breaks_off_leaves_no_mind(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Half:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            raise KeyboardInterrupt

    monkeypatch.setattr(minds, "train", lambda *_: Half())
    with pytest.raises(KeyboardInterrupt):
        mind_folder(SMALL)
    assert not [path for path in cache.iterdir() if path.name.startswith("lab-")]


def test_the_folder_changes_with_all_that_weights_depend_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a change of documents would be measured on yesterday's model."""
    monkeypatch.setattr(minds, "train", lambda mind, _: begin(mind))
    names = [mind_folder(m).name for m in (SMALL, replace(SMALL, seed=1), replace(SMALL, lr=1e-3))]
    with monkeypatch.context() as patch:
        patch.setattr(minds, "WEIGHT", minds.WEIGHT | {"lake": 1.0})
        names.append(mind_folder(SMALL).name)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "question", lambda key, random: key)
        names.append(mind_folder(SMALL).name)
    assert len(set(names)) == len(names)
    assert mind_folder(SMALL).name == names[0]


def test_minds_have_less_than_a_million_weights() -> None:
    """As the page says."""
    sizes = {name: sum(p.numel() for p in begin(m).parameters()) for name, m in MINDS.items()}
    assert sizes["small"] < sizes["large"] / 4 and sizes["large"] < 1_000_000
