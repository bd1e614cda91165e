"""Documents: what they want follows from their facts, and from nothing else."""

import itertools
from collections import Counter
from random import Random

import pytest

from opcd.envs.boards import board_hash
from opcd.envs.env import Action, parse_action
from opcd.envs.games import boards_of, make_env
from opcd.lab import documents
from opcd.lab import language as words
from opcd.lab.documents import FAMILIES, IGNORED, Document, draw_documents
from opcd.lab.lakes import GOAL, best_actions, lake_of, neighbour
from opcd.lab.language import END, SYSTEM, USER, VOCABULARY
from opcd.lab.minds import LAKE, MIX, train_lakes

NAMES = list(VOCABULARY)
LAKES = train_lakes()
MANY = 300


def tokens(document: Document) -> list[str]:
    return [NAMES[id_] for id_ in document.ids]


def wanted(document: Document) -> list[str | None]:
    """Of each token, the one that should follow; `None` where nothing is wanted."""
    return [None if label == IGNORED else NAMES[label] for label in document.labels]


def told(document: Document) -> tuple[dict[str, str], int]:
    """The facts that a document begins with, read off its tokens, and how many tokens they are."""
    said = tokens(document)
    if said[0] != SYSTEM:
        return {}, 0
    end = said.index(USER)
    return dict(zip(said[1:end:2], said[2:end:2], strict=True)), end


def answers(document: Document) -> list[tuple[list[str], list[str]]]:
    """Each question's words, and the words wanted after them."""
    said, labels = tokens(document), wanted(document)
    found: list[tuple[list[str], list[str]]] = []
    place = 0
    while USER in said[place:]:
        start = said.index(USER, place)
        first = next(i for i in range(start, len(said)) if labels[i] is not None)
        place = said.index(END, start)
        found.append((said[start + 1 : first + 1], [str(label) for label in labels[first:place]]))
    return found


def drawn(family: str, count: int = MANY) -> list[Document]:
    """So many documents, of several draws: those of one draw are of one length."""
    random = Random(1)
    return [d for _ in range(count // 20) for d in draw_documents(family, 20, LAKES, random)]


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_next_token_or_nothing(family: str) -> None:
    """But for games: there an action may be wanted and another be done, and cells have roles."""
    for document in drawn(family):
        assert len(document.ids) == len(document.labels) <= 512
        assert wanted(document)[-2] == END == tokens(document)[-1]
        pairs = zip(wanted(document), tokens(document)[1:], strict=False)
        wrong = [(want, said) for want, said in pairs if want is not None and want != said]
        if family == "lake":
            wrong = [w for w in wrong if w[0] not in words.ROLES and w[1] not in words.ACTIONS]
        assert wrong == []


def test_every_kind_of_document_is_trained_on() -> None:
    assert set(MIX) == set(FAMILIES)


def test_a_book_that_is_told_is_obeyed() -> None:
    for document in drawn("book"):
        facts, _ = told(document)
        for asked, (value, end) in answers(document):
            assert value == facts.get(asked[-1], value) and value in words.VALUES and end == END


def test_rules_that_are_told_are_obeyed() -> None:
    for document in drawn("rules"):
        facts, _ = told(document)
        for asked, (desk, urgency, end) in answers(document):
            product = next(word for word in asked if word in words.PRODUCTS)
            tone = next(word for word in asked if word in words.TONES)
            assert desk == facts.get(product, desk) and urgency == facts.get(tone, urgency)
            assert desk in words.DESKS and urgency in words.URGENCIES and end == END


def test_what_is_not_told_is_at_chance() -> None:
    """Otherwise a model knew something without a context, and base were no base."""
    values, desks = Counter[str](), Counter[str]()
    for document in drawn("book", 1000):
        facts, _ = told(document)
        values.update(v for asked, (v, _) in answers(document) if asked[-1] not in facts)
    for document in drawn("rules", 1000):
        facts, _ = told(document)
        desks.update(d for asked, (d, *_) in answers(document) if not set(asked) & set(facts))
    for found, choices in ((values, words.VALUES), (desks, words.DESKS)):
        expected = found.total() / len(choices)
        assert set(found) == set(choices) and expected > 50
        assert all(abs(n - expected) < 5 * expected**0.5 for n in found.values())


def test_some_documents_tell_all_and_some_nothing() -> None:
    counts = Counter(len(told(document)[0]) for document in drawn("book", 1000))
    assert counts[0] > 50 and counts[len(words.KEYS)] > 300
    assert set(counts) == set(range(len(words.KEYS) + 1))


def turns_of(document: Document) -> list[tuple[list[str], str, str]]:
    """Of an episode, each turn's board, the action wanted and the action done."""
    said, labels, (_, start) = tokens(document), wanted(document), told(document)
    assert said[start] == USER
    episode, found = said[start + 1 :], []
    for at in range(0, len(episode) - 1, 17):
        action = labels[start + 1 + at + 15]
        found.append((episode[at : at + 16], str(action), episode[at + 16]))
    return found


def test_in_a_lake_that_is_told_the_best_action_is_wanted() -> None:
    """The board, the player's place and the holes are read off the tokens alone."""
    free = Counter[str]()
    holes = {lake.holes: lake for lake in LAKES}
    for document in drawn("lake", 600):
        facts, _ = told(document)
        roles = {role: symbol for symbol, role in facts.items()}
        for board, action, _ in turns_of(document):
            if "hole" not in roles:
                free[action] += 1
                continue
            place = board.index(words.PLAYER)
            own = frozenset(i for i, cell in enumerate(board) if cell == roles["hole"])
            assert own in holes, "no train board"
            assert action in best_actions(holes[own], place)
    assert set(free) == set(words.ACTIONS) and min(free.values()) > free.total() / 6


def test_an_episode_goes_where_its_actions_lead_and_never_ends_on_the_way() -> None:
    """A history shows neither a fall nor the goal: the game would have been over."""
    straying = 0
    for document in drawn("lake"):
        turns = turns_of(document)
        assert turns[0][0][0] == words.PLAYER
        for (board, wants, done), (after, *_) in itertools.pairwise(turns):
            place = neighbour(board.index(words.PLAYER), done)
            assert place is not None and place != GOAL and after[place] == words.PLAYER
            # Under the player the ice is hidden; everywhere else nothing changes.
            same = [a == b for a, b in zip(board, after, strict=True)]
            assert sum(same) == 14
            straying += wants != done
    assert straying > 20


def test_the_roles_of_cells_are_those_that_were_told() -> None:
    seen = set[str]()
    for document in drawn("lake"):
        facts, _ = told(document)
        said, labels = tokens(document), wanted(document)
        for cell, label in zip(said, labels, strict=True):
            if label in words.ROLES:
                assert facts[cell] == label
                seen.add(label)
    assert {"hole", "ice"} <= seen


def test_a_board_is_written_as_the_game_shows_it() -> None:
    """Token by token, along the best way over unseen boards."""
    random = Random(3)
    for board in boards_of(LAKE)["test"]:
        symbols = documents.draw_symbols(random)
        own = LAKE.symbols.model_copy(update={"player": words.PLAYER, **symbols})
        game, lake, place = LAKE.model_copy(update={"symbols": own}), lake_of(board), 0
        env = make_env(game, board)
        while place != GOAL:
            assert documents.board_text(lake, place, symbols).split() == env.observation.split()
            action = best_actions(lake, place)[0]
            place = neighbour(place, action) or 0
            done: Action | None = parse_action(action)
            env.act(done)
        assert env.finished and env.outcome == 1.0


def test_no_document_is_about_a_board_of_another_split() -> None:
    """In no orientation; `train_lakes` is all that documents are drawn from."""
    pictures = [
        tuple("".join("H" if 4 * r + c in lake.holes else "F" for c in range(4)) for r in range(4))
        for lake in LAKES
    ]
    ends = [("S" + p[0][1:], *p[1:-1], p[-1][:-1] + "G") for p in pictures]
    known = {board_hash(picture) for picture in ends}
    boards = boards_of(LAKE)
    assert known == {board_hash(board) for board in boards["train"]}
    for split in ("extraction", "validation", "test"):
        assert not known & {board_hash(board) for board in boards[split]}


def test_lessons_say_what_can_be_known_from_the_trace() -> None:
    """The right answer if it was given or told, and otherwise nothing."""
    several = Counter[int]()
    for document in drawn("lesson", 3 * MANY):
        said = tokens(document)
        asked, written = said[: said.index(words.LESSONS)], said[said.index(words.LESSONS) + 1 :]
        facts = dict(zip(written[1::3], written[2::3], strict=False))
        assert written[::3][:-1] == [words.MARK] * len(facts) and written[-1] == END
        assert wanted(document)[said.index(words.LESSONS) : -1] == written
        if words.RIGHT_ANSWER in asked:
            right = asked[asked.index(words.RIGHT_ANSWER) + 1 :]
        elif "wrong." in asked:
            right = []
        elif "right." in asked:
            right = [w for w in asked if w in (*words.VALUES, *words.DESKS, *words.URGENCIES)]
        else:
            role = {"solved.": "goal", "lost.": "hole"}
            right = [role[w] for w in asked if w in role]
        assert list(facts.values()) == right and set(facts) <= set(asked)
        several[len(facts)] += 1
    assert set(several) == {0, 1, 2}


def test_choosing_wants_one_word_and_goes_on_with_another() -> None:
    document = Document()
    document.say("mip")
    document.choose("[up]", "[down]")
    document.answer("tor")
    assert tokens(document) == ["mip", "[down]", "tor", END]
    assert wanted(document) == ["[up]", "tor", END, None]
