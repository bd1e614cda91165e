"""`opcd.candidates`: every score belongs to its own experience, and is measured once."""

from pathlib import Path

import pytest

from learners import grown, lesson_parts
from opcd.assembly import Parts
from opcd.candidates import (
    Candidate,
    Scored,
    batches,
    find_candidates,
    score_candidates,
    standard_error,
)
from opcd.config import derive
from opcd.errors import ConfigError, RunFolderError
from opcd.rollouts.scripted import ScriptedEngine
from opcd.runs import RoundFolder

ROWS = 6


@pytest.fixture
def parts(tiny_model_path: Path, tmp_path: Path) -> Parts:
    """As `lesson_parts`."""
    return lesson_parts(tmp_path, tiny_model_path)


@pytest.mark.parametrize("mark", [0.0, 1.0])
def test_a_share_of_none_or_all_has_an_error_too(mark: float) -> None:
    """Else five rows out of five could not be told from five hundred."""
    few, many = standard_error([mark] * 5), standard_error([mark] * 500)
    assert 0.1 < few < 0.2 and 0.0 < many < 0.01


def test_other_metrics_have_the_error_of_their_own_spread() -> None:
    assert standard_error([2.0, 4.0, 6.0, 8.0]) == pytest.approx(2.581989 / 2)


def test_candidates_are_none_the_last_and_every_so_many(tmp_path: Path) -> None:
    """A candidate's step is that of its file: the text after so many traces."""
    for seed, last in ((0, 5), (1, 4), (10, 2)):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        for step in range(last + 1):
            text = "".join(f"- item {i} of {seed}\n" for i in range(step))
            (folder / f"experience-{step:03d}.md").write_text(text, encoding="utf-8")
    found = find_candidates(RoundFolder(tmp_path), 3, lambda text: len(text.split()))
    assert [(c.seed, c.step) for c in found] == [
        (0, 0), (0, 3), (0, 5), (1, 0), (1, 3), (1, 4), (10, 0), (10, 2),
    ]  # fmt: skip
    assert [c.items for c in found] == [c.step for c in found]
    assert all(c.name.endswith(f"seed-{c.seed}/experience-{c.step:03d}.md") for c in found)
    assert found[0].tokens == 0 and found[1].tokens == 15
    assert found[1].text == "- item 0 of 0\n- item 1 of 0\n- item 2 of 0"


def test_without_experiences_there_is_nothing_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="has no experiences to choose from"):
        find_candidates(RoundFolder(tmp_path), 1, len)


def test_candidates_share_a_call_as_far_as_the_engine_answers_them_together() -> None:
    """A batch holds at most the engine's rows, and every candidate comes once, in its order."""
    short = [Candidate(0, i, f"- {i}", 1, 20) for i in range(5)]
    assert [len(b) for b in batches(short, 30, 64)] == [2, 2, 1]
    assert [len(b) for b in batches(short, 100, 64)] == [1] * 5, "more rows than a batch"
    assert [len(b) for b in batches(short, 30, 0)] == [1] * 5
    assert [len(b) for b in batches(short, 4, 64)] == [5]
    assert [one for batch in batches(short, 30, 64) for one in batch] == short


ROWS = 6


def scores(parts: Parts, folder: RoundFolder) -> list[Scored]:
    candidates = find_candidates(folder, 1, lambda text: len(parts.renderer.encode(text)))
    return score_candidates(parts, candidates, folder.scores, lambda _: None)


def test_the_score_of_an_experience_is_its_own(parts: Parts, tmp_path: Path) -> None:
    """With N lessons N rows are right: a score beside its experience, before or after, shows."""
    folder = RoundFolder(tmp_path / "round")
    grown(folder)
    for one in scores(parts, folder):
        lessons = one.candidate.step // (one.candidate.seed + 1)
        assert one.candidate.items == lessons
        assert one.marks == (1.0,) * lessons + (0.0,) * (ROWS - lessons)


def test_the_last_one_and_none_are_scored_too(parts: Parts, tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path / "round")
    grown(folder, steps=3)
    found = {(one.candidate.seed, one.candidate.step): one.mean for one in scores(parts, folder)}
    assert found[0, 0] == found[1, 0] == 0.0 and found[0, 3] == 0.5


def test_equal_experiences_are_measured_once(parts: Parts, tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path / "round")
    grown(folder)
    found = scores(parts, folder)
    texts = {one.candidate.text for one in found}
    assert len(found) == 10 and len(texts) == 7
    assert isinstance(parts.engine, ScriptedEngine)
    assert len(parts.engine.asked) == len(texts) * ROWS


def test_what_was_scored_is_not_asked_again(parts: Parts, tmp_path: Path) -> None:
    """Interrupted in the middle, even of a line, the rest is measured and the result the same."""
    folder = RoundFolder(tmp_path / "round")
    grown(folder)
    whole = scores(parts, folder)
    lines = folder.scores.read_text("utf-8").splitlines(keepends=True)
    folder.scores.write_text("".join(lines[:3]) + lines[3][:20], encoding="utf-8")
    parts.engine = ScriptedEngine(parts.engine.script)  # type: ignore
    assert scores(parts, folder) == whole
    assert len(parts.engine.asked) == (len(lines) - 3) * ROWS
    parts.engine = ScriptedEngine(lambda *_: pytest.fail("everything is there"))
    assert scores(parts, folder) == whole


def test_scores_of_other_rows_or_another_model_do_not_count(parts: Parts, tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path / "round")
    grown(folder, seeds=1, steps=1)
    scores(parts, folder)
    assert isinstance(parts.engine, ScriptedEngine)
    before = len(parts.engine.asked)
    parts.items["validation"] = parts.items["validation"][1:]
    assert all(len(one.marks) == ROWS - 1 for one in scores(parts, folder))
    assert len(parts.engine.asked) == before + 2 * (ROWS - 1)
    for times, changed in enumerate(({"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}), start=2):
        parts.config = derive(parts.config, evaluation=changed)
        scores(parts, folder)
        assert len(parts.engine.asked) == before + 2 * times * (ROWS - 1), changed


def test_select_rows_are_the_first_ones(parts: Parts, tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path / "round")
    grown(folder, seeds=1, steps=4)
    parts.config = derive(parts.config, experience={"select_rows": 2})
    assert [one.marks for one in scores(parts, folder)][-1] == (1.0, 1.0)


def test_without_a_grader_or_validation_rows_nothing_is_asked(parts: Parts, tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path / "round")
    grown(folder)
    parts.engine = ScriptedEngine(lambda *_: pytest.fail("asked"))
    grader, parts.grader = parts.grader, None
    with pytest.raises(ConfigError, match=r"without \[grader\].*experience.use = \"pool\""):
        scores(parts, folder)
    parts.grader = grader
    del parts.items["validation"]
    with pytest.raises(ConfigError, match=r"without a validation split.*test rows never choose"):
        scores(parts, folder)


def test_a_metric_that_the_rows_do_not_have_is_refused(parts: Parts, tmp_path: Path) -> None:
    folder = RoundFolder(tmp_path / "round")
    grown(folder, seeds=1, steps=1)
    parts.config = derive(parts.config, evaluation={"select_by": "elegance"})
    with pytest.raises(ConfigError, match=r"graded by \['correct', 'valid'\]"):
        scores(parts, folder)
