"""`opcd.items`: items are what the run asks, each with the context that its teacher sees."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from opcd.assembly import assemble
from opcd.config import derive
from opcd.config.training import Rendering
from opcd.envs.games import openings_of
from opcd.errors import OverLongError
from opcd.items import Item, Pool, render_pool, weights_of, with_context
from opcd.rendering import Renderer, common_prefix
from opcd.tasks import draw
from opcd.types import Context, Message, Origin, PromptPair, Task
from tiny import make_game_run, make_run
from worlds import tokenizer


def test_items_know_the_context_they_were_rendered_with(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    parts = assemble(make_run(tmp_path, tiny_model_path))
    assert list(parts.items) == ["train", "validation", "test"]
    for item in (item for items in parts.items.values() for item in items):
        assert item.context == Context(system="Answer in verse.") and item.game is None
        assert item.pair == parts.renderer.pair(item.task, item.context)


def test_boards_become_items_by_split(player_path: Path, tmp_path: Path) -> None:
    """Also those that experience is gathered on; `task` and `pair` are their first turn."""
    parts = assemble(make_game_run(tmp_path, player_path))
    assert parts.config.game
    boards = openings_of(parts.config.game)
    assert {split: len(items) for split, items in parts.items.items()} == {
        "train": 4,
        "extraction": 2,
        "validation": 2,
        "test": 2,
    }
    for split, items in parts.items.items():
        assert [(item.task.id, item.game) for item in items] == list(boards[split].items())  # type: ignore[index]
        for item in items:
            assert item.game
            env = item.game.start()
            text = f"{env.introduction}\n\n{env.observation}"
            assert [m.content for m in item.task.messages] == [text]
            assert item.pair == parts.renderer.pair(item.task, Context("Go down, then right."))


def test_items_with_another_context_are_the_same_tasks(player_path: Path, tmp_path: Path) -> None:
    """None is dropped, whatever the run does with rows that do not fit."""
    parts = assemble(make_game_run(tmp_path, player_path, "rendering.over_long=drop_row"))
    items = parts.items["validation"]
    others = with_context(parts.renderer, items, Context(system="Mind the holes."))
    for item, other in zip(items, others, strict=True):
        assert (other.task, other.game) == (item.task, item.game)
        assert other.pair.student_ids == item.pair.student_ids
        assert other.context.system == "Mind the holes."
        assert "Mind the holes." in parts.renderer.decode(other.pair.teacher_ids)
    with pytest.raises(OverLongError, match="validation-00000"):
        with_context(parts.renderer, items, Context(system="Mind the holes. " * 900))


def test_turns_that_cannot_fit_are_known_before_the_run(player_path: Path, tmp_path: Path) -> None:
    """Not after an hour: the last turn is tried first."""
    keys = ("game.turns=9", "rendering.max_prompt_tokens=300")
    with pytest.raises(OverLongError, match=r"train-00000/turn-9.*at most 300"):
        assemble(make_game_run(tmp_path, player_path, *keys))
    notes = assemble(
        make_game_run(tmp_path, player_path, *keys, "rendering.over_long=drop_row")
    ).notes
    assert any(note.startswith("episodes that go on so long are dropped") for note in notes)


# --- pools


@dataclass(frozen=True)
class Watched(Renderer):
    """A renderer that remembers what it was asked for."""

    rendered: list[str] = field(default_factory=list)

    def pair(self, task: Task, context: Context, origin: Origin = "task") -> PromptPair:
        self.rendered.append(task.id)
        return super().pair(task, context, origin)


LESSONS = [Context(system="lesson " * n) for n in (1, 3, 9)]
ROWS = [(Task(f"t{n}", (Message("user", "word " * 8 * n),)), None) for n in range(1, 30)]


def watched(fits: int, over_long: str = "drop_row") -> Watched:
    config = Rendering.model_validate({"over_long": over_long})
    return Watched(tokenizer(), config, fits)


def test_a_pool_is_the_product_of_rows_and_contexts() -> None:
    """Each under an id of its own, in the order of the rows; places may count from the end."""
    renderer = watched(9999)
    pool, dropped = render_pool(renderer, ROWS, LESSONS)
    product = [
        Item(named, renderer.pair(named, context), context)
        for task, _ in ROWS
        for n, context in enumerate(LESSONS)
        for named in [replace(task, id=f"{task.id}/lessons-{n}")]
    ]
    assert list(pool) == product and dropped == []
    assert len({item.task.id for item in product}) == len(pool) == 3 * len(ROWS)
    assert pool[-1] == product[-1] and pool[2:70:5] == product[2:70:5]
    assert pool.examples == [*product[:3], *product[-3:]]
    with pytest.raises(IndexError):
        pool[len(pool)]


def test_the_examples_of_a_pool_share_what_all_of_its_prompts_share() -> None:
    """Rows that open alike would make an opening of their own words; each stands for its share."""
    texts = ("word two", "word three", "a word", "word one", "Zebra word", "word")
    rows = [(Task(f"t{n}", (Message("user", text),)), None) for n, text in enumerate(texts)]
    pool, _ = render_pool(watched(9999), rows, LESSONS)
    assert len(pool.examples) == 2 * len(LESSONS)
    for n in range(len(LESSONS)):
        of_all = [item.pair.teacher_ids for item in list(pool)[n :: len(LESSONS)]]
        of_examples = [item.pair.teacher_ids for item in pool.examples[n :: len(LESSONS)]]
        assert common_prefix(of_examples) == common_prefix(of_all)
    assert weights_of({"train": pool, "test": pool[:2]}) == [3.0] * 6 + [1.0] * 2


def test_a_pool_renders_only_what_is_drawn() -> None:
    """And draws what a list of all would have been drawn from it, whatever was drawn before."""
    renderer = watched(9999)
    pool, _ = render_pool(renderer, ROWS, LESSONS)
    assert renderer.rendered == []
    drawn = draw(pool, 4, 7, seed=3)
    assert renderer.rendered == [item.task.id for item in drawn] and len(drawn) == 4
    assert draw(list(pool), 4, 7, seed=3) == drawn


@pytest.mark.parametrize("fits", [150, 700, 2000])
def test_a_pool_keeps_the_rows_that_fit_with_every_context(fits: int) -> None:
    """Also where only those near the limit are rendered to find out."""
    renderer = watched(fits)
    longest = {
        task.id: max(len(watched(9999).pair(task, context).teacher_ids) for context in LESSONS)
        for task, _ in ROWS
    }
    pool, dropped = render_pool(renderer, ROWS, LESSONS)
    assert (len(dropped) > 0, len(set(renderer.rendered)) < len(ROWS)) == (fits < 2000, fits > 150)
    assert dropped == [id_ for id_, tokens in longest.items() if tokens > fits]
    assert [task.id for task, _ in pool.rows] == [i for i in longest if i not in dropped]
    if dropped:
        with pytest.raises(OverLongError, match=rf"row '{dropped[0]}'"):
            render_pool(watched(fits, "error"), ROWS, LESSONS)
    with pytest.raises(OverLongError, match="all 29 rows"):
        render_pool(watched(10), ROWS, LESSONS)


def test_only_train_rows_are_a_pool(tiny_model_path: Path, tmp_path: Path) -> None:
    """What a context adds is known of it without rendering all."""
    run = make_run(tmp_path, tiny_model_path)
    files = [tmp_path / f"{n}.md" for n in range(2)]
    for n, file in enumerate(files):
        file.write_text("- short\n" * (n + 1), encoding="utf-8")
    given = {"type": "experience", "path": [str(file) for file in files], "template": None}
    parts = assemble(derive(run, context={"placement": "user", **given}))
    train = parts.items["train"]
    assert isinstance(train, Pool) and len(train) == 2 * len(train.rows)
    assert not any(isinstance(parts.items[split], Pool) for split in ("validation", "test"))
    assert parts.context_tokens > 0
