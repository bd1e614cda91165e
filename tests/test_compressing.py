"""`opcd.compressing`: LLMLingua is asked as its documentation says; a stub stands in for it."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from opcd.compressing import MODEL, build_compressor, check_compression, compress_context
from opcd.errors import CostsError
from opcd.types import Context, Message


class PromptCompressor:
    """Keeps every second word, and what it was asked."""

    made: dict[str, Any]
    asked: dict[str, Any]

    def __init__(self, **settings: Any) -> None:
        """Takes the settings that the real one documents."""
        PromptCompressor.made = settings

    def compress_prompt(self, context: list[str], **settings: Any) -> dict[str, Any]:
        PromptCompressor.asked = settings
        return {"compressed_prompt": " ".join(" ".join(context).split()[::2]), "rate": "50.0%"}


def install(monkeypatch: pytest.MonkeyPatch, compressor: Any) -> None:
    module = ModuleType("llmlingua")
    module.__spec__ = ModuleSpec("llmlingua", None)
    module.__dict__["PromptCompressor"] = compressor
    monkeypatch.setitem(sys.modules, "llmlingua", module)


def halve(text: str) -> str:
    return " ".join(text.split()[::2])


def test_llmlingua_2_is_asked_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, PromptCompressor)
    check_compression(0.5)
    compress = build_compressor(0.5, "cpu")
    assert compress("a b c d") == "a c"
    made = {"model_name": MODEL, "use_llmlingua2": True, "device_map": "cpu"}
    assert PromptCompressor.made == made
    assert PromptCompressor.asked["rate"] == 0.5


def test_texts_are_compressed_but_not_the_answers_of_examples() -> None:
    """Nor the place of the prompt, nor the white space that keeps it apart."""
    context = Context(
        system="one two three",
        examples=(Message("user", "four five six"), Message("assistant", '{"a": 1, "b": 2}')),
        user_template="seven eight nine\n\n{prompt}",
    )
    assert compress_context(context, halve) == Context(
        system="one three",
        examples=(Message("user", "four six"), Message("assistant", '{"a": 1, "b": 2}')),
        user_template="seven nine\n\n{prompt}",
    )
    assert compress_context(Context(), halve) == Context()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CostsError, match=r"not installed; run pip install 'opcd-lm\[compress\]'"):
        check_compression(0.5)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, float("nan")])
def test_a_rate_outside_its_bounds_is_refused(rate: float) -> None:
    with pytest.raises(CostsError, match="lies between 0 and 1"):
        check_compression(rate)


def test_a_model_that_cannot_be_fetched_is_a_plain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("We couldn't connect\nmore lines")

    install(monkeypatch, refuse)
    with pytest.raises(CostsError, match=r"meetingbank cannot be loaded \(We couldn't connect\)"):
        build_compressor(0.5, "cpu")
