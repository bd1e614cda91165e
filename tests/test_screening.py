"""`opcd.screening`: each reason for the text it is meant for, and none for what users write."""

import pytest

from opcd.screening import REASONS, Limits, Sieve, message_of, topics_of

CONTEXT = (
    "You are the desk of a shop. Customers who thank us are happy, customers who shout are angry.\n"
    '{"mood":"happy"}'
)
EXAMPLE = "Third morning without hot water, will anybody come?"


def sieve() -> Sieve:
    return Sieve(CONTEXT, [EXAMPLE], Limits(max_words=20))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        ('"?!"', "empty"),
        (" ".join(f"w{i}" for i in range(21)), "too long"),
        ('"Where is it?"\n\nThe user: another one', "more than a message"),
        ("Sure, here is a message.", "an answer, not a message"),
        ("I'm so sorry to hear that.", "an answer, not a message"),
        ("How can I help you today?", "an answer, not a message"),
        ("Your order is fine. Please try again later!", "an answer, not a message"),
        ("Well, I\u2019m unable to provide you with that.", "an answer, not a message"),
        ('Is it new?" she said and left', "more than a message"),
        ('{"mood":"angry"}', "an answer, not a message"),
        ("I am sorry, I am sorry, I am sorry, I am sorry, I am sorry", "repeats itself"),
        ("Customers who shout are angry", "quotes the context"),
        ("Well, you are the desk of a shop customers who want tea and cake", "quotes the context"),
        ("third morning without hot water, will anybody come soon", "repeats an example"),
    ],
)
def test_each_reason_finds_its_text(answer: str, reason: str) -> None:
    found = sieve()
    assert (found.drop(answer, finished=True), found.kept) == (reason, [])
    assert reason in REASONS


@pytest.mark.parametrize(
    "answer",
    [
        "Sorry, where is my parcel?",
        "The user manual is missing.",
        "Thank you for the lamp, it is lovely.",
        "I am not able to open the box.",
        "Can I help to unload it?",
        "Wo bleibt mein Paket? Ich warte seit Montag.",
        "我的包裹在哪里?",
        'What does "fragile" mean on the box?',
        "Two things:\n- the lamp is broken\n- the plug is missing",
    ],
)
def test_what_users_write_passes(answer: str) -> None:
    """In any language, with quotation marks and line breaks of its own."""
    found = sieve()
    assert found.drop(answer, finished=True) is None
    assert found.kept == [answer]


def test_a_cut_message_is_dropped_however_good_it_looks() -> None:
    assert sieve().drop("Where is my parcel?", finished=False) == "cut by the token limit"


def test_a_message_passes_once() -> None:
    found = sieve()
    answers = ["Where is my big parcel", "where is my big parcel?", "So where is my big parcel?"]
    assert [found.drop(answer, True) for answer in answers] == [
        None,
        "exact duplicate",
        "near duplicate",
    ]


def test_only_the_marks_around_a_message_are_taken_off() -> None:
    assert message_of(' "Is it "new"?" ') == 'Is it "new"?'
    assert message_of('"It opens and never closes') == "It opens and never closes"
    assert message_of('My "new" lamp') == 'My "new" lamp'


def test_lists_are_read_in_any_of_their_forms_and_the_rest_is_counted() -> None:
    answer = "1. a late parcel.\n2) a thank-you\n- a question\n\nNote: none\n4. cut of"
    assert topics_of(answer, finished=True)[0] == [
        "a late parcel",
        "a thank-you",
        "a question",
        "cut of",
    ]
    assert topics_of(answer, finished=False) == (["a late parcel", "a thank-you", "a question"], 2)
    assert topics_of("1. " + "long " * 30, finished=True) == ([], 1)
