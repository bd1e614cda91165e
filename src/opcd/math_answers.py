"""Are two mathematical answers the same? math-verify, an optional package, parses them."""

import importlib
import re
from typing import Any

from opcd.errors import ConfigError

BOX = "\\boxed{"
THIN_SPACE = re.compile(r"\\[,;:! ]")
"""LaTeX's spaces; inside a number they part thousands."""


def load_verifier() -> Any:
    """The math-verify package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("math_verify")
    except ImportError as error:
        raise ConfigError(
            'grader.type = "math" needs the package math-verify, which is not installed; run '
            'pip install math-verify (or install opcd-lm with its extra: "opcd-lm[math]"), or '
            'take grader.type = "numeric"'
        ) from error


def parse_gold(verifier: Any, answer: str) -> list[Any]:
    """What a gold answer means, with or without LaTeX around it; nothing if it has no meaning."""
    text = answer.strip().strip("$").strip()
    return _parse(verifier, f"${last_box(text) or text}$") if text else []


def parse_response(verifier: Any, response: str) -> list[Any]:
    """The last box of a response, else its last expression; nothing where there is neither."""
    if BOX not in response:
        return _parse(verifier, response)
    inside = last_box(response)
    return _parse(verifier, f"${inside}$") if inside else []


def last_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, if that is closed."""
    _, box, rest = text.rpartition(BOX)
    depth = 1 if box else 0
    for index, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if box and depth == 0:
            return rest[:index].strip()
    return None


def plain_minus(text: str) -> str:
    """The text with the minus that typesetters write (U+2212) as the one of a keyboard."""
    return text.replace("\u2212", "-")


def _parse(verifier: Any, text: str) -> list[Any]:
    plain = plain_minus(text)
    joined = re.sub(rf"(?<=\d)(?:{THIN_SPACE.pattern})(?=\d{{3}}(?!\d))", "", plain)
    # Without a fallback to plain text, which would take any box for an expression.
    return verifier.parse(THIN_SPACE.sub(" ", joined), fallback_mode="no_fallback")
