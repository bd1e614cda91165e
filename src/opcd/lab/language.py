"""The language of the lab: a hundred words, one token each; everything else is not read.

What a lab model reads are facts (`- mip is tor`), questions, boards, and what the text games and
the experience pipeline say around them. Its tokenizer knows the words that matter and drops the
rest, so that a transformer of less than a million weights reads a fact in two tokens and a whole
episode in a hundred.
"""

import re
from functools import cache
from typing import Any

from opcd.envs.env import Limits, introduce

END, SYSTEM, USER = "<|end|>", "<|system|>", "<|user|>"
SPECIALS = (END, SYSTEM, USER)
"""Special tokens, their ids from 0 on; the first ends a response, and pads."""

TEMPLATE = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|end|>' }}"
TEMPLATE += "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
"""An answer follows what was asked without a mark between them."""

KEYS = tuple("mip dax lug wex kob zan fip rud gos tev nal bix jor hem pud vok".split())  # noqa: SIM905 - words
VALUES = tuple("tor sul mek pan dif gar lon bez kim fas rop wid hul nex jat cob".split())  # noqa: SIM905 - words
"""The two sides of a code book."""

PRODUCTS = tuple("lamp chair clock stove radio kettle mirror carpet ladder bottle".split())  # noqa: SIM905 - words
DESKS = tuple("north south east west upper lower".split())  # noqa: SIM905 - words
TONES = tuple("gladly sadly angrily calmly loudly kindly".split())  # noqa: SIM905 - words
URGENCIES = ("first", "later", "never")
FILLERS = tuple("well hey ahem gosh wow oops huh whew hmm yikes".split())  # noqa: SIM905 - words
"""A message to be routed: a product, a tone, and words that say nothing."""

SYMBOLS = tuple("BCDFJKLMNRSTVXYZ")
"""What a cell of a lake may be written with; which is ice and which a hole, a context tells."""
PLAYER = "P"
ROLES = ("goal", "hole", "ice")
ACTIONS = ("[up]", "[down]", "[left]", "[right]")
TURNS = 8
"""Of an episode on a lake of 4 x 4, whose shortest path has 6 or more moves."""
INTRODUCTION = introduce(PLAYER, "", Limits())

MARK = "- EXPERIENCE ITEM:"
LESSONS = "Lessons?"
RIGHT_ANSWER = "The right answer is:"
PHRASES = (MARK, LESSONS, RIGHT_ANSWER, "right.", "wrong.", "lost.", "solved.")
"""What the game and the experience pipeline say that matters, one token each."""

WORDS = (
    *(PLAYER, *ROLES, *ACTIONS, *SYMBOLS, *KEYS, *VALUES),
    *(*PRODUCTS, *DESKS, *TONES, *URGENCIES, *FILLERS),
)
VOCABULARY = {token: number for number, token in enumerate((*SPECIALS, *PHRASES, *WORDS))}

_NAMED = re.escape("The actions are [up], [down], [left] and [right], which")
_UNREAD = rf"You are P\.|{_NAMED}|one of \[up\], \[down\], \[left\], \[right\]"
"""What has words of the language in it and says nothing."""
_ODD = "|".join(re.escape(token) for token in (*PHRASES, *ACTIONS))
_PLAIN = "|".join(word for word in WORDS if word not in ACTIONS)
_TOKEN = rf"{_ODD}|\b(?:{_PLAIN})\b"


def build_tokenizer() -> Any:
    """The language as a tokenizer of transformers, chat template included."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token=END))
    backend.normalizer = normalizers.Replace(Regex(_UNREAD), "")  # type: ignore
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), "removed", invert=True)  # type: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[SYSTEM, USER],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def _splitter() -> re.Pattern[str]:
    specials = "|".join(re.escape(token) for token in SPECIALS)
    return re.compile(rf"{specials}|{_TOKEN}")


def encode(text: str) -> list[int]:
    """Ids as the tokenizer gives them; faster for many short texts."""
    return [VOCABULARY[token] for token in _splitter().findall(re.sub(_UNREAD, "", text))]
