"""What a model wrote, sorted into messages that a user could have sent and reasons why not.

Reasons are modest on purpose: a text is dropped for its form, never for its language or subject.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from opcd.near_duplicates import SeenTexts, quoted_share, quotes_run, runs_of, words_of

REASONS = (
    "cut by the token limit",
    "empty",
    "too long",
    "more than a message",
    "an answer, not a message",
    "repeats itself",
    "quotes the context",
    "repeats an example",
    "exact duplicate",
    "near duplicate",
)
"""Why a message is dropped; the first that holds is counted."""

MAX_TOPIC_WORDS = 20
DISTINCT_SHARE = 0.5
"""A text with fewer distinct runs of three words than this share of all of them is a loop."""

_ITEM = re.compile(r"\s*(?:\d+[.)]|[-*\u2022])\s+(\S.*)")
_OPENS_ANSWER = re.compile(
    r"(?:sure[,!.]|certainly[,!.]|of course[,!] here|here (?:is|are) (?:a|an|the|some) "
    r"|(?:we|i) (?:sincerely )?apologi[sz]e for"
    r"|(?:i'm|i am|we are|we're) (?:so |very |really )?sorry (?:to hear|for (?:the|any) inconven)"
    r"|thank you for (?:reaching out|contacting|choosing|your (?:order|inquiry|feedback|patience))"
    r"|dear (?:customer|user|guest)|(?:the )?(?:user|assistant|instructions(?: of the "
    r"assistant)?)\s*:)",
    re.IGNORECASE,
)
"""How an assistant begins, not a user."""

_HELPS = re.compile(
    r"\b(?:(?:how|what) (?:can|may) (?:i|we) (?:help|assist|do for) you|can i help you"
    r"|(?:i'm|i am|we are|we're) here to (?:help|assist)|(?:can't|cannot|can|to) (?:help|assist) "
    r"you\b|(?:i'm|i am) (?:sorry, )?(?:not able|unable) to (?:provide|deliver|reply|assist)"
    r"|as an ai\b|(?:i'm|i am) an? (?:ai|chatbot|language model)|please try again later"
    r"|would you like (?:me )?to (?:receive|know|help))",
    re.IGNORECASE,
)
"""What an assistant offers or regrets, wherever it stands."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a text becomes too long, too like another, or a quotation."""

    max_words: int = 40
    near_duplicate: float = 0.5
    """Jaccard index of the runs of three words from which on two messages count as one."""
    quoted_share: float = 0.5
    """Share of a message's runs of four words that may not be in the context."""
    quoted_words: int = 8
    """So many words in a row may not be in the context, whatever the rest is."""


class Sieve:
    """Lets each message pass once; remembers what passed."""

    def __init__(self, context: str, examples: Sequence[str], limits: Limits) -> None:
        """Start with nothing kept.

        Args:
            context: what messages may not quote.
            examples: messages that are known already: the user's own and the instructions'.
            limits: where a text becomes too long, too like another, or a quotation.
        """
        self.kept: list[str] = []
        self._context = context
        self._limits = limits
        self._examples = len(examples)
        self._words: set[tuple[str, ...]] = set()
        self._seen = SeenTexts(limits.near_duplicate)
        for example in examples:
            self._seen.add(example)

    def drop(self, answer: str, finished: bool) -> str | None:
        """Why an answer is no new message, one of `REASONS`; `None` where it is kept."""
        text = message_of(answer)
        reason = self._form(text, finished) or self._quotation(text) or self._repetition(text)
        if reason is None:
            self.kept.append(text)
            self._words.add(tuple(words_of(text)))
            self._seen.add(text)
        return reason

    def _form(self, text: str, finished: bool) -> str | None:
        if not finished:
            return "cut by the token limit"
        words = words_of(text)
        if not words:
            return "empty"
        if len(words) > self._limits.max_words:
            return "too long"
        # A closing mark without an opening one, or a new heading: the model went on.
        if text.count('"') % 2 or re.search(r"\n\s*#", text):
            return "more than a message"
        if _answers(text) or (text.startswith("{") and '{"' in self._context):
            return "an answer, not a message"
        if len(words) >= 12 and len(runs_of(text)) < DISTINCT_SHARE * (len(words) - 2):
            return "repeats itself"
        return None

    def _quotation(self, text: str) -> str | None:
        whole = quotes_run(text, self._context, self._limits.quoted_words)
        share = quoted_share(text, self._context)
        return "quotes the context" if whole or share >= self._limits.quoted_share else None

    def _repetition(self, text: str) -> str | None:
        if tuple(words_of(text)) in self._words:
            return "exact duplicate"
        twin = self._seen.twin_of(text)
        if twin is None:
            return None
        return "repeats an example" if twin < self._examples else "near duplicate"


def _answers(text: str) -> bool:
    straight = text.replace("\u2019", "'")
    return bool(_OPENS_ANSWER.match(straight) or _HELPS.search(straight))


def message_of(answer: str) -> str:
    """An answer without the quotation marks around it."""
    text = answer.strip()
    for left, right in (('"', '"'), ("\u201c", "\u201d")):
        if text.startswith(left):
            text = text.removeprefix(left).removesuffix(right).strip()
    return text


def topics_of(answer: str, finished: bool) -> tuple[list[str], int]:
    """The items of a list, and how many of its lines are none.

    The last line of an answer that was cut by the token limit counts among those.
    """
    lines = [line for line in answer.split("\n") if line.strip()]
    whole = lines if finished else lines[:-1]
    items = [found[1].strip().rstrip(".,;") for line in whole if (found := _ITEM.match(line))]
    topics = [item for item in items if 0 < len(words_of(item)) <= MAX_TOPIC_WORDS]
    return topics, len(lines) - len(topics)
