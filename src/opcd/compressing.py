"""A context made shorter by LLMLingua, to compare with: an optional package, loaded when used."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace

from opcd.errors import CostsError
from opcd.types import Context, Message

MODEL = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"
"""Tells which tokens to keep; fetched from the hub by LLMLingua itself."""
SLOT = "{prompt}"

Compress = Callable[[str], str]


def check_compression(rate: float) -> None:
    """Refuse a rate that means nothing, or a missing package, before anything is measured.

    Raises:
        CostsError: one of the two.
    """
    if not 0.0 < rate < 1.0:
        raise CostsError(
            f"--compress-rate {rate:g}: it is the share of the context's tokens that is kept, so "
            "it lies between 0 and 1; give for example 0.5"
        )
    if importlib.util.find_spec("llmlingua") is None:
        raise CostsError(
            "--compress-rate needs LLMLingua, which is not installed; run "
            "pip install 'opcd-lm[compress]', or leave the option out"
        )


def build_compressor(rate: float, device: str) -> Compress:
    """LLMLingua-2 as a function from a text to a shorter one.

    Args:
        rate: the share of tokens to keep.
        device: where its model runs, as torch names it.

    Raises:
        CostsError: its model cannot be loaded.
    """
    llmlingua = importlib.import_module("llmlingua")
    try:
        compressor = llmlingua.PromptCompressor(
            model_name=MODEL, use_llmlingua2=True, device_map=device
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CostsError(
            f"--compress-rate: LLMLingua's model {MODEL} cannot be loaded ({reason}); fetch it "
            "where the hub can be reached, or leave the option out"
        ) from error

    def compress(text: str) -> str:
        # Line ends and question marks carry the form of an instruction.
        found = compressor.compress_prompt([text], rate=rate, force_tokens=["\n", "?"])
        return found["compressed_prompt"]

    return compress


def compress_context(context: Context, compress: Compress) -> Context:
    """A context with its texts compressed.

    The answers of worked examples stay whole, since the form of an answer is in them; so does the
    place of the prompt.
    """
    examples = tuple(
        Message(turn.role, _shorten(turn.content, compress)) if turn.role == "user" else turn
        for turn in context.examples
    )
    around = [_shorten(part, compress) for part in context.user_template.split(SLOT)]
    return replace(
        context,
        system=_shorten(context.system, compress),
        examples=examples,
        user_template=SLOT.join(around),
    )


def _shorten(text: str, compress: Compress) -> str:
    """White space at both ends, which separates a text from its neighbours, stays."""
    bare = text.strip()
    return text.replace(bare, compress(bare)) if bare else text
