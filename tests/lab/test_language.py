"""The language: what matters survives, what says nothing has no token, and words go both ways."""

from functools import cache
from random import Random
from typing import Any

import pytest

from opcd.envs.boards import SPLITS
from opcd.envs.env import NO_ACTION, STEPS, Action, history_text, parse_action
from opcd.envs.games import boards_of, make_env
from opcd.extraction import items_of
from opcd.graders import feedback_on
from opcd.lab import documents
from opcd.lab import language as words
from opcd.lab.language import END, SYSTEM, USER, VOCABULARY, build_tokenizer, encode
from opcd.lab.minds import LAKE
from opcd.lab.worlds import tell
from opcd.traces import Trace, trace_text
from opcd.types import Message, Task

FACTS = {"mip": "tor", "B": "ice", "lamp": "north", "gladly": "never"}
GAME = LAKE.model_copy(
    update={
        "symbols": LAKE.symbols.model_copy(
            update={"player": "P", "goal": "X", "hole": "B", "ice": "T"}
        )
    }
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def read(text: str) -> list[str]:
    """The tokens of a text, as words."""
    names = list(VOCABULARY)
    return [names[id_] for id_ in encode(text)]


@cache
def episodes(count: int = 40) -> list[tuple[list[str], list[Action | None], str]]:
    """Random games: the observations, the actions, and the ending's kind."""
    random, found = Random(0), []
    for board in boards_of(GAME)["test"][:count]:
        env = make_env(GAME, board)
        seen, done, kind = [env.observation], [], ""
        while not env.finished:
            action: Action | None = random.choice([*STEPS, None])
            result = env.act(action)
            kind = result.ending.kind if result.ending else ""
            seen.append(result.observation)
            done.append(action)
        found.append((seen, done, kind))
    return found


def chats() -> list[list[dict[str, str]]]:
    """Conversations of every kind that a lab model is shown."""
    env = make_env(GAME, boards_of(GAME)["test"][0])
    histories = [history_text(env.introduction, seen, done) for seen, done, _ in episodes()]
    trace = trace_text(
        Trace("1", (Message("system", tell(FACTS)), Message("user", "hey mip ?")), "tor")
    )
    lesson = f"{trace}\n\n{feedback_on(Task('1', (), 'sul'), 0.0, 'answer')}\n\n\n\n{words.LESSONS}"
    asked = [*histories, lesson, "hey mip ?", "well lamp gosh gladly wow", "Anything [w] else?"]
    plain = [[{"role": "user", "content": text}] for text in asked]
    system = {"role": "system", "content": tell(FACTS)}
    answered = {"role": "assistant", "content": "tor"}
    return [*plain, *([system, *chat] for chat in plain), [*plain[-2], answered, *plain[-3]]]


def test_encode_is_the_tokenizer(tokenizer: Any) -> None:
    """Documents are written with `encode`, runs read with the tokenizer: one language."""
    for chat in chats():
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert encode(text) == list(tokenizer.apply_chat_template(chat)["input_ids"])


def test_an_id_is_the_place_in_the_vocabulary(tokenizer: Any) -> None:
    assert list(VOCABULARY.values()) == list(range(len(VOCABULARY)))
    assert len(tokenizer) == len(VOCABULARY)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (VOCABULARY[END],) * 2
    assert [tokenizer.convert_tokens_to_ids(t) for t in VOCABULARY] == list(VOCABULARY.values())


def test_every_word_is_read_alone_and_among_others() -> None:
    for word in words.WORDS:
        assert read(word) == [word]
        assert read(f"then {word}, said nobody") == [word]
    assert read(" ".join(words.WORDS)) == list(words.WORDS)


def test_facts_and_questions() -> None:
    assert read(tell(FACTS)) == [w for fact in FACTS.items() for w in fact]
    assert read(f"{SYSTEM}- mip is tor\n{USER}well hey mip ?\n") == [
        *(SYSTEM, "mip", "tor"),
        *(USER, "well", "hey", "mip"),
    ]


def test_words_within_words_are_not_read() -> None:
    """`Pick` holds a P and `iceberg` ice."""
    assert read("Pick an iceberg, mips, TOR, Xylophone; up and down") == []
    assert read(words.INTRODUCTION) == [] == read(NO_ACTION)


def test_of_a_game_only_boards_actions_and_its_ending_are_read() -> None:
    """Whole episodes: nothing in the game's own prose has a token, and no cell is lost."""
    kinds = set[str]()
    for seen, done, kind in episodes():
        # Of what is seen, single capital letters are cells; the rest is prose.
        boards = [[c for c in text.split() if len(c) == 1 and c.isupper()] for text in seen]
        ending = {"solved": ["X", "solved."], "failed": ["B", "lost."]}.get(kind, [])
        expected = list(boards[0])
        for action, board in zip(done, boards[1:], strict=True):
            expected += [f"[{action}]"] if action else []
            if board is boards[-1]:
                expected += ending
            expected += board
        assert all(len(board) == 16 for board in boards)
        assert read(history_text(words.INTRODUCTION, seen, done)) == expected
        kinds.add(kind)
    assert {"failed", "invalid_moves"} <= kinds


@pytest.mark.parametrize("action", words.ACTIONS)
def test_a_written_action_is_one_the_game_knows(action: str, tokenizer: Any) -> None:
    text = tokenizer.decode([VOCABULARY[action], VOCABULARY[END]], skip_special_tokens=True)
    assert text.strip() == action
    assert f"[{parse_action(text)}]" == action


def test_answers_of_several_words_are_written_with_spaces(tokenizer: Any) -> None:
    """The exact grader compares them with the truth."""
    ids = [*encode("north later"), VOCABULARY[END]]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "north later"


@pytest.mark.parametrize(("name", "value"), [("mip", "tor"), ("B", "hole"), ("lamp", "upper")])
def test_an_item_that_a_model_writes_tells_what_a_fact_tells(
    name: str, value: str, tokenizer: Any
) -> None:
    """From the model's tokens through extraction into a context, read like a context of facts."""
    ids = [VOCABULARY[words.MARK], *encode(f"{name} {value}")] * 2
    items, malformed = items_of(tokenizer.decode(ids))
    assert (items, malformed) == ([f"{name} {value}"] * 2, 0)
    assert encode(f"- {items[0]}\n") == encode(tell({name: value}))


@pytest.mark.parametrize("outcome", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["none", "outcome", "answer"])
def test_feedback_is_read(outcome: float, kind: str) -> None:
    """What a checker says, and nothing around it."""
    told = feedback_on(Task("1", (), "tor"), outcome, kind)
    verdict = [] if kind == "none" else ["right." if outcome else "wrong."]
    right = [words.RIGHT_ANSWER, "tor"] if kind == "answer" else []
    assert read(told) == verdict + right


def test_a_trace_is_read_as_the_lessons_of_the_documents_are() -> None:
    """The extractor's prompt holds what `lesson_document` begins with, in that order."""
    trace = trace_text(Trace("1", (Message("user", "hey mip ?"),), "tor"))
    told = feedback_on(Task("1", (), "sul"), 0.0, "answer")
    prompt = f"{USER}{trace}\n\n{told}\n\n\n\n{words.LESSONS}\n"
    for seed in range(100):
        document = documents.lesson_document(
            "hey mip ?", "tor", "sul", {"mip": "sul"}, Random(seed)
        )
        written = encode(f"{words.MARK} mip sul{END}")
        if document.ids == encode(prompt) + written:
            return
    raise AssertionError("no document is like the prompt")


def test_the_introduction_of_the_documents_is_the_games() -> None:
    env = make_env(GAME, boards_of(GAME)["test"][0])
    assert encode(env.introduction) == encode(words.INTRODUCTION)


def test_every_split_has_boards() -> None:
    """Guards the loops above against games without boards."""
    assert all(boards_of(LAKE)[split] for split in SPLITS)
