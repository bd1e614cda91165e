"""What is told of gathering and of rounds: every count, and nothing left out."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from opcd.experience import Accumulation, Limits
from opcd.gathering import Answer
from opcd.learning_tables import count_traces, gathered_words, learned_lines, rounds_grid
from opcd.traces import Trace
from opcd.types import Message

USER = (Message("user", "?"),)
TRACES = [
    [Trace("a", USER, "x", outcome=1.0), Trace("b", USER, "y", outcome=0.0, cut=True)],
    [Trace("c", USER, "z")],
]
ANSWERS = [
    [
        Answer(1, "a", "m", "- EXPERIENCE ITEM: one two three four\n- EXPERIENCE ITEM: five six\n"),
        Answer(2, "b", "m", "- EXPERIENCE ITEM: five six\nnoise\n- EXPERIENCE ITEM: cut o", False),
    ],
    [Answer(1, "c", "m", "", skipped="the prompt is too long")],
]


def grown() -> list[Accumulation]:
    found: list[Accumulation] = []
    for traces, answers in zip(TRACES, ANSWERS, strict=True):
        own = Accumulation(Limits(1000), len)
        for trace, answer in zip(traces, answers, strict=True):
            own.add(trace, answer.items, answer.model)
        found.append(own)
    return found


def measured(**shares: float) -> dict[str, Any]:
    return {
        name: {"correct": {"mean": share, "ci95": [share, share], "n": 4}}
        for name, share in shares.items()
    }


def test_every_count_of_a_round_is_told_in_words() -> None:
    """Cut replies and malformed pieces too: a run that loses most of it must not look well."""
    assert gathered_words(TRACES, ANSWERS, grown()) == [
        "3 traces, mean outcome 0.50 of 2 known; 1 cut at the token limit",
        "3 answers about them: 3 items, 2 malformed pieces; 1 cut at the token limit",
        "items: 2 kept, 1 exact duplicate",
    ]


def test_where_nothing_was_written_it_says_none() -> None:
    empty = [Accumulation(Limits(1000), len)]
    assert gathered_words([[TRACES[1][0]]], [ANSWERS[1]], empty) == [
        "1 trace; 0 cut at the token limit",
        "1 answer about them: 0 items, 0 malformed pieces; 0 cut at the token limit",
        "items: none",
    ]


def test_unknown_outcomes_are_no_failures() -> None:
    of_first, of_second = count_traces(TRACES)
    assert (of_first["outcome known"], of_first["mean outcome"]) == (2, "0.50")
    assert (of_second["outcome known"], of_second["mean outcome"]) == (0, "-")
    assert of_first["cut at the token limit"] == 1


def test_rounds_stand_one_below_the_other_by_their_conditions() -> None:
    rounds = [
        {"round": 1, "rows": 4, "conditions": measured(base=0.25, baked=0.5)},
        {"round": 2, "rows": 4, "conditions": measured(base=0.5, baked=0.75)},
        {"round": 3, "rows": 4, "conditions": {}},
    ]
    grid = rounds_grid(rounds)
    assert [row[:2] for row in grid.rows] == [
        ["1", "base"],
        ["", "baked"],
        ["2", "base"],
        ["", "baked"],
    ]
    assert "25.0 %" in grid.rows[0][2] and grid.title.startswith("4 test rows")


@pytest.mark.parametrize(
    "names",
    [
        ("correct", "valid", "response_tokens", "truncated"),
        ("correct", "turns", "invalid_moves", "response_tokens", "truncated"),
    ],
    ids=["answers", "games"],
)
def test_all_conditions_fit_into_80_columns_and_say_what_was_cut(names: tuple[str, ...]) -> None:
    """An answer that the token limit ended is seldom right, whatever was learned."""
    found = {"mean": 0.875, "ci95": [0.75, 0.96], "n": 24}
    tokens = {"mean": 1023.5, "ci95": [1000.0, 1024.0], "n": 24}
    table = {name: tokens if name == "response_tokens" else found for name in names}
    grid = rounds_grid([{"round": 1, "rows": 24, "conditions": {"raw_traces": table}}])
    console = Console(width=80, file=StringIO())
    console.print(grid.for_terminal())
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert sum(line.startswith("│") for line in lines) == 1, "no row is folded"
    assert grid.headings[-1] == "cut off" and grid.rows[0][-1] == "88 %"


def test_verdicts_tests_and_notes_are_told_with_their_round() -> None:
    test = {
        "first": "baked",
        "second": "base",
        "difference": 0.25,
        "metric": "correct",
        "p": 0.5,
        "test": "mcnemar",
    }
    found = {
        "rounds": [
            {
                "round": 1,
                "selected": {"verdict": "the longest"},
                "paired": [test],
                "notes": ["no off_policy: why"],
            },
            {"round": 2, "verdict": "nothing", "paired": []},
        ],
        "paired": [{**test, "first": "round 1"}],
    }
    assert learned_lines(found) == [
        "round 1: the longest",
        "round 1: baked against base: +25.0 points correct, p = 0.5 (mcnemar)",
        "round 1: no off_policy: why",
        "round 2: nothing",
        "round 1 against base: +25.0 points correct, p = 0.5 (mcnemar)",
    ]
    assert learned_lines({**found, "rounds": found["rounds"][:1]})[-1].startswith("round 1: no off")
