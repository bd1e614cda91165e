"""`opcd.near_duplicates`: against brute force over small worlds of words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opcd.near_duplicates import near_duplicates, quoted_share, quotes_run, runs_of, words_of

TEXTS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=8).map(" ".join)


def jaccard(first: str, second: str) -> float:
    ours, theirs = runs_of(first), runs_of(second)
    if not ours and not theirs:
        return 1.0
    return len(ours & theirs) / len(ours | theirs)


@given(st.lists(TEXTS, max_size=12), st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]))
def test_near_duplicates_are_those_of_a_comparison_of_all_pairs(
    texts: list[str], threshold: float
) -> None:
    """The index from runs to texts must not lose a pair; ties go to the first."""
    kept: list[int] = []
    twins: dict[int, int] = {}
    for index, text in enumerate(texts):
        best = max(kept, key=lambda k: (jaccard(text, texts[k]), -k), default=None)
        if best is not None and jaccard(text, texts[best]) >= threshold:
            twins[index] = best
        else:
            kept.append(index)
    found = near_duplicates(texts, threshold)
    assert (list(found.kept), found.twins) == (kept, twins)


@given(st.lists(TEXTS, max_size=12))
def test_at_threshold_1_only_equal_sets_of_runs_are_twins(texts: list[str]) -> None:
    found = near_duplicates(texts, 1.0)
    assert len({runs_of(text) for text in texts}) == len(found.kept)
    assert all(runs_of(texts[i]) == runs_of(texts[twin]) for i, twin in found.twins.items())


@given(TEXTS, TEXTS, st.integers(1, 5))
def test_the_quoted_share_is_that_of_a_search_in_the_text(
    text: str, source: str, words: int
) -> None:
    found = text.split()
    runs = {" ".join(found[i : i + words]) for i in range(len(found) - words + 1)}
    hits = [run for run in runs if f" {run} " in f" {source} "]
    assert quoted_share(text, source, words) == (len(hits) / len(runs) if runs else 0.0)
    assert quotes_run(text, source, words) == bool(hits)


def test_case_punctuation_and_space_do_not_tell_texts_apart() -> None:
    texts = ["Where is my parcel?", "where  is my PARCEL", "Where is my parcel, please!"]
    assert near_duplicates(texts, 0.6).twins == {1: 0, 2: 0}
    assert near_duplicates(texts, 0.7).twins == {1: 0}


def test_scripts_without_spaces_are_compared_by_character() -> None:
    """Else a whole Chinese sentence would be one word and no two of them alike."""
    assert words_of("我的包裹在哪里? Paket 7") == [*"我的包裹在哪里", "paket", "7"]
    assert near_duplicates(["我的包裹在哪里", "我的包裹在哪里呢"], 0.5).twins == {1: 0}


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.1])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        near_duplicates(["a"], threshold)


def test_quoted_share_counts_runs_of_words() -> None:
    source = "One two three four five six."
    assert quoted_share("one TWO three, four five", source, 5) == 1.0
    assert quoted_share("zero one two three four five", source, 5) == 0.5
    assert quoted_share("five four three two one", source, 5) == 0.0
    assert quoted_share("one two three", source, 5) == 0.0, "shorter than a run"
