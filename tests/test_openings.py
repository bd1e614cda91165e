"""`opcd.openings`: which prompts are read behind one copy of what they share."""

import random

import pytest

from opcd.openings import MIN_PREFIX_TOKENS, Openings, find_openings, in_passes
from tiny import random_ids

HEADER = random_ids(30, 1)
CONTEXTS = [HEADER + random_ids(100 + 10 * n, 10 + n) for n in range(10)]


def behind(opening: tuple[int, ...], count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts that part right after an opening."""
    return [(*opening, 290 + row % 9, row, *random_ids(5, seed + row)) for row in range(count)]


def test_one_context_is_one_group() -> None:
    """Though some of its prompts go on alike for a while: that saves too little to be apart."""
    prompts = behind(CONTEXTS[0], 6) + behind(CONTEXTS[0] + random_ids(20, 3), 3)
    assert find_openings(prompts) == [130] * 9


def test_a_pool_is_a_group_for_each_context() -> None:
    """In whatever order its prompts come; what all contexts share is too short to matter."""
    prompts = [ids for n, context in enumerate(CONTEXTS) for ids in behind(context, 3, 50 * n)]
    random.Random(0).shuffle(prompts)
    cuts = find_openings(prompts)
    assert {ids[:cut] for ids, cut in zip(prompts, cuts, strict=True)} == set(CONTEXTS)
    assert all(ids[:cut] in CONTEXTS for ids, cut in zip(prompts, cuts, strict=True))


def test_a_prompt_of_its_own_is_in_no_group() -> None:
    prompts = [*behind(CONTEXTS[0], 2), random_ids(200, 5), *behind(CONTEXTS[1], 1)]
    assert find_openings(prompts) == [130, 130, 0, 0]


def test_those_without_a_context_in_common_share_a_long_header() -> None:
    """A group that is much deeper stands by itself; the rest falls back to what it shares."""
    header = random_ids(MIN_PREFIX_TOKENS + 6, 8)
    deep = header + random_ids(900, 9)
    prompts = [*behind(deep, 3), header + random_ids(50, 20), header + random_ids(60, 21)]
    assert find_openings(prompts) == [970, 970, 970, 70, 70]


@pytest.mark.parametrize(("extra", "apart"), [(MIN_PREFIX_TOKENS - 4, False), (200, True)])
def test_a_group_has_to_be_longer_by_the_least_length(extra: int, apart: bool) -> None:
    """Fewer tokens than that are read with every prompt: fuller batches are worth more."""
    shared = random_ids(80, 1)
    prompts = [i for n in range(3) for i in behind((*shared, n, *random_ids(extra, n)), 40, 99)]
    assert find_openings(prompts) == [81 + extra if apart else 80] * 120


def test_openings_shorter_than_the_least_are_none() -> None:
    for length, found in ((MIN_PREFIX_TOKENS - 1, 0), (MIN_PREFIX_TOKENS, MIN_PREFIX_TOKENS)):
        assert find_openings(behind(random_ids(length, 2), 4)) == [found] * 4


def test_the_last_token_of_a_prompt_is_always_its_own() -> None:
    """Its logits predict the response: of equal prompts, and of one that begins another."""
    ids = random_ids(90, 4)
    assert find_openings([ids, ids]) == [89, 89]
    assert find_openings([ids, (*ids, 7, 8)]) == [89, 89]
    assert find_openings([]) == [] and find_openings([ids]) == [0]


def test_groups_share_what_they_are_said_to() -> None:
    """On random trees: a cut is the same tokens for two prompts at least, or it is none."""
    draw = random.Random(3)
    for _ in range(60):
        stems = [random_ids(draw.randrange(1, 300), n) for n in range(3)]
        prompts = [
            draw.choice(stems)[: draw.randrange(1, 300)] + random_ids(draw.randrange(1, 90), n % 4)
            for n in range(draw.randrange(1, 12))
        ]
        cuts = find_openings(prompts)
        heads = [ids[:cut] for ids, cut in zip(prompts, cuts, strict=True)]
        for ids, head in zip(prompts, heads, strict=True):
            assert len(head) < len(ids)
            assert not head or (len(head) >= MIN_PREFIX_TOKENS and heads.count(head) >= 2)


def test_an_example_may_stand_for_many_prompts() -> None:
    """Two rows of each context of a large pool are as good as all of them."""
    shared = random_ids(100, 1)
    contexts = [shared + random_ids(150, n) for n in range(4)]
    examples = [ids for n, context in enumerate(contexts) for ids in behind(context, 2, 50 * n)]
    assert find_openings(examples) == [100] * 8
    assert find_openings(examples, [500.0] * 8) == [250] * 8


def test_the_openings_of_a_run_are_found_in_any_prompt() -> None:
    """The longest that a prompt begins with; not one that it is only a part of."""
    prompts = [*behind(CONTEXTS[0], 3), *behind(CONTEXTS[1], 3), random_ids(99, 40)]
    openings = Openings(prompts)
    assert openings.known == sorted(CONTEXTS[:2])
    assert (openings.without, openings.tokens) == (1, 130 + 140)
    assert [openings.of((*context, 5, 6)) for context in CONTEXTS[:3]] == [130, 140, 0]
    assert openings.of(CONTEXTS[0]) == 0, "nothing would be left of it"
    assert openings.of(CONTEXTS[0][:100]) == openings.of(()) == 0
    nested = Openings(behind(CONTEXTS[0], 3) + behind(CONTEXTS[0] + random_ids(2000, 6), 3))
    assert [len(ids) for ids in nested.known] == [130, 2130]
    assert nested.of(nested.known[1] + (1, 2)) == 2130
    assert nested.of(nested.known[1][:500]) == 130


@pytest.mark.parametrize(
    ("most_rows", "most_tokens", "expected"),
    [
        (9, 999, [[0, 1], [2, 3, 4, 5, 6]]),
        (2, 999, [[0, 1], [2, 3], [4, 5], [6]]),
        (9, 70, [[0, 1], [2, 3, 4], [5, 6]]),
        (9, 10, [[0, 1], [2, 3, 4], [5], [6]]),
    ],
)
def test_passes_have_few_rows_behind_few_openings(
    most_rows: int, most_tokens: int, expected: list[list[int]]
) -> None:
    """And every row once, in its order; an opening longer than allowed has passes of its own."""
    openings = [(), (), (1,) * 60, (1,) * 60, (1,) * 60, (2,) * 30, (3,) * 40]
    assert list(in_passes(openings, most_rows, most_tokens, 2)) == expected


def test_rows_without_an_opening_have_a_limit_of_their_own() -> None:
    assert list(in_passes([()] * 5, 9, 99, 2)) == [[0, 1], [2, 3], [4]]
