"""What a lab model is trained from scratch on: documents that obey the facts they begin with.

Where a document's facts leave a question open, its answer is drawn at random. That is all a model
can learn about such questions, so that without a context it is at chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from opcd.lab import language as words
from opcd.lab.lakes import GOAL, Lake, best_actions, neighbour, shore
from opcd.lab.language import END, SYSTEM, USER, VOCABULARY, encode

IGNORED = -100
"""The label of a token that nothing is learned from."""


@dataclass
class Document:
    """Token ids, and of each the token that should follow."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Add a text that is only read."""
        for id_ in encode(text):
            self._add(id_)

    def answer(self, text: str) -> None:
        """Add a text that is to be written, and the end of the turn after it."""
        for id_ in (*encode(text), VOCABULARY[END]):
            self._expect(id_)
            self._add(id_)

    def choose(self, wanted: str, done: str) -> None:
        """Ask for one word, but go on as if another had been written."""
        self._expect(VOCABULARY[wanted])
        self._add(VOCABULARY[done])

    def _expect(self, id_: int) -> None:
        self.labels[-1] = id_

    def _add(self, id_: int) -> None:
        self.ids.append(id_)
        self.labels.append(IGNORED)


Facts = Mapping[str, str]


def tell(document: Document, facts: Facts, random: Random) -> None:
    """Begin with a system message that lists facts in any order; without facts, with none."""
    lines = [f"- {name} is {value}" for name, value in facts.items()]
    random.shuffle(lines)
    if lines:
        document.say(f"{SYSTEM}{' '.join(lines)}")


def some_of(facts: Facts, random: Random, none: float = 0.1) -> dict[str, str]:
    """All, some, or none of the facts."""
    if random.random() < none:
        return {}
    count = len(facts) if random.random() < 0.4 else random.randint(1, len(facts))
    return {name: facts[name] for name in random.sample(list(facts), count)}


def draw_book(random: Random) -> dict[str, str]:
    """A code book: a value for every key."""
    return {key: random.choice(words.VALUES) for key in words.KEYS}


def draw_rules(random: Random) -> dict[str, str]:
    """A rulebook: a desk for every product, and how soon for every tone."""
    desks = {name: random.choice(words.DESKS) for name in words.PRODUCTS}
    return desks | {name: random.choice(words.URGENCIES) for name in words.TONES}


def question(key: str, random: Random) -> str:
    """A question about a key, behind words that say nothing."""
    return " ".join([*random.sample(words.FILLERS, random.randint(0, 2)), key, "?"])


def book_document(random: Random, questions: int = 8) -> Document:
    """Questions about keys, one turn each."""
    book, document = draw_book(random), Document()
    known = some_of(book, random)
    tell(document, known, random)
    for _ in range(questions):
        # Half of them about what was told, however little that was.
        told = known and random.random() < 0.5
        key = random.choice(list(known) if told else words.KEYS)
        document.say(f"{USER}{question(key, random)}")
        document.answer(known.get(key) or random.choice(words.VALUES))
    return document


def message(product: str, tone: str, random: Random) -> str:
    """A message to be routed."""
    fillers = random.sample(words.FILLERS, 4)
    pair = [product, tone] if random.random() < 0.5 else [tone, product]
    return " ".join([*fillers[:2], pair[0], *fillers[2:3], pair[1], fillers[3]])


def rules_document(random: Random, questions: int = 5) -> Document:
    """Messages to be routed, one turn each."""
    rules, document = draw_rules(random), Document()
    known = some_of(rules, random)
    tell(document, known, random)
    for _ in range(questions):
        product, tone = random.choice(words.PRODUCTS), random.choice(words.TONES)
        document.say(f"{USER}{message(product, tone, random)}")
        desk = known.get(product) or random.choice(words.DESKS)
        document.answer(f"{desk} {known.get(tone) or random.choice(words.URGENCIES)}")
    return document


def draw_symbols(random: Random) -> dict[str, str]:
    """Role -> symbol."""
    return dict(zip(words.ROLES, random.sample(words.SYMBOLS, 3), strict=True))


def board_text(lake: Lake, place: int, symbols: Mapping[str, str]) -> str:
    """A board as the game shows it."""
    cells = [symbols["hole" if c in lake.holes else "ice"] for c in range(16)]
    cells[15] = symbols["goal"]
    cells[place] = words.PLAYER
    return " ".join(cells)


def _known_roles(symbols: Mapping[str, str], random: Random) -> dict[str, str]:
    """Symbol -> role, most often of all of them; of little use where the hole is not told."""
    facts = {symbol: role for role, symbol in symbols.items()}
    if random.random() < 0.7:
        return facts
    known = some_of(facts, random, none=0.3)
    if known and random.random() < 0.5:
        known[symbols["hole"]] = "hole"
    return known


def lake_document(lake: Lake, turns: int, random: Random, astray: float = 0.2) -> Document:
    """An episode as its last prompt tells it, with the best action wanted at every turn."""
    symbols, document = draw_symbols(random), Document()
    known = _known_roles(symbols, random)
    tell(document, known, random)
    document.say(f"{USER}{words.INTRODUCTION}")
    told = "hole" in known.values()
    place = 0
    for turn in range(turns):
        board = board_text(lake, place, symbols)
        for cell in board.split():
            # What each cell is, where the facts say so: nobody reads it, but it has to be known.
            document.ids.append(VOCABULARY[cell])
            document.labels.append(VOCABULARY[known[cell]] if cell in known else IGNORED)
        best = best_actions(lake, place)[0]
        wanted = best if told else random.choice(words.ACTIONS)
        # Episodes end at the goal, so that no history has it.
        onward = [a for a in shore(lake, place) if neighbour(place, a) != GOAL]
        if turn == turns - 1 or not onward:
            document.answer(wanted)
            return document
        strays = not told or best not in onward or random.random() < astray
        done = random.choice(onward) if strays else best
        document.choose(wanted, done)
        place = neighbour(place, done) or 0
    return document


def lesson_document(asked: str, given: str, right: str, lessons: Facts, random: Random) -> Document:
    """A trace of one answer, what was said of it, and what it teaches.

    The checker says more or less: nothing, right or wrong, or the right answer too. What cannot
    be known from it is not written down.
    """
    document = Document()
    said, hit = random.choice(("outcome", "answer", "answer")), given == right
    told = f"The answer is {'right' if hit else 'wrong'}."
    if said == "answer":
        told += f" {words.RIGHT_ANSWER} {right}"
    document.say(f"{USER}{asked} {given} {told} {words.LESSONS}")
    known = lessons if hit or said == "answer" else {}
    document.answer(" ".join(f"{words.MARK} {name} {value}" for name, value in known.items()))
    return document


def book_lesson(random: Random) -> Document:
    """What one question of a code book teaches: one pair."""
    key, right = random.choice(words.KEYS), random.choice(words.VALUES)
    given = right if random.random() < 0.3 else random.choice(words.VALUES)
    return lesson_document(question(key, random), given, right, {key: right}, random)


def rules_lesson(random: Random) -> Document:
    """What one routed message teaches: where the product goes, and how soon such a tone."""
    product, tone = random.choice(words.PRODUCTS), random.choice(words.TONES)
    answers = [f"{random.choice(words.DESKS)} {random.choice(words.URGENCIES)}" for _ in range(2)]
    right, given = answers[0], answers[random.random() < 0.7]
    desk, urgency = right.split()
    lessons = {product: desk, tone: urgency}
    return lesson_document(message(product, tone, random), given, right, lessons, random)


def lake_lesson(lake: Lake, random: Random) -> Document:
    """What an episode teaches that ended in a hole or at the goal: which symbol that was."""
    symbols, document, place = draw_symbols(random), Document(), 0
    document.say(USER)
    if random.random() < 0.5:
        # Few get as far as the goal by themselves.
        place = random.choice([p for p in lake.moves if p != GOAL])
    known: Facts = {}
    for _ in range(words.TURNS - 1):
        document.say(board_text(lake, place, symbols))
        action = random.choice(words.ACTIONS)
        if random.random() < 0.5 and place in lake.moves:
            action = best_actions(lake, place)[0]
        after = neighbour(place, action)
        document.say(action)
        if after is None:
            continue
        if after == GOAL or after in lake.holes:
            role, told = ("goal", "solved.") if after == GOAL else ("hole", "lost.")
            known = {symbols[role]: role}
            document.say(f"{symbols[role]} {told}")
            document.say(board_text(lake, after, symbols))
            break
        place = after
    document.say(words.LESSONS)
    document.answer(" ".join(f"{words.MARK} {name} {value}" for name, value in known.items()))
    return document


FAMILIES = ("book", "rules", "lake", "lesson")


def draw_documents(
    family: str, count: int, lakes: Sequence[Lake], random: Random
) -> list[Document]:
    """Documents of one kind, of nearly one length."""
    if family == "book":
        return [book_document(random) for _ in range(count)]
    if family == "rules":
        return [rules_document(random) for _ in range(count)]
    if family == "lake":
        turns = max(random.randint(1, words.TURNS), random.randint(1, words.TURNS))
        return [lake_document(random.choice(lakes), turns, random) for _ in range(count)]
    lessons = (book_lesson, rules_lesson, lambda r: lake_lesson(r.choice(lakes), r))
    return [lessons[number % 3](random) for number in range(count)]
