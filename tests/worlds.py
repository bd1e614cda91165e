"""Small real things for tests: tokenizers with chat templates, a tiny Llama, the files of a run.

Nothing here is a mock: the tokenizer is trained in the process on a few lines, and the model is a
real `LlamaForCausalLM` with random weights. torch and transformers are imported where they are
used, so that tests of text alone stay light.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""System, user and assistant turns, nothing added."""

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
) + CHATML
"""As SmolLM2's: writes a system message of its own where the conversation has none."""

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
) + CHATML
"""As Gemma's: refuses a system message."""

THINKING = CHATML + (
    "{% if add_generation_prompt %}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\\n' }}"
    "{% else %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
"""As Qwen 3's: opens a thought with `enable_thinking`, else closes an empty one."""

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""Special tokens, their ids from 0 on."""
END_ID = SPECIALS.index("<|im_end|>")
"""Ends a turn; is the padding token as well, as in SmolLM2."""

CORPUS = (
    "You are the message desk of a small shop. Answer every message with one line of JSON.",
    '{"mood": "happy", "escalate": false} {"mood": "angry", "escalate": true}',
    "The kettle I bought on Monday is broken, and nobody at the Mill Lane shop would help me.",
    "system user assistant You are a helpful assistant. What is the capital of France? Paris.",
)


def tokenizer(template: str | None = CHATML, specials: Sequence[str] = SPECIALS) -> Any:
    """A byte-level BPE tokenizer with a chat template (`None`: without one); 300 tokens.

    The second special token opens a text and the third ends a turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    backend.decoder = decoders.ByteLevel()  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=specials[1],
        eos_token=specials[2],
        pad_token=specials[2],
        chat_template=template,
    )


def tiny_llama(vocabulary: int = 300, seed: int = 0, positions: int = 512, **config: Any) -> Any:
    """A random Llama of 3 layers whose distributions are far from flat; float32, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": SPECIALS.index("<|im_start|>"),
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | config))).eval()


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows as a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


RUN = """
name = "desk"
steps = 4
{top}

[context]
type = "system_prompt"
path = "system.md"

[tasks]
train = "train.jsonl"
validation = "validation.jsonl"
test = "test.jsonl"

[grader]
type = "exact"
"""


def write_run(folder: Path, top: str = "", tables: str = "", toml: str = RUN) -> Path:
    """A small valid run: `run.toml` and the files it names; `top` and `tables` are added to it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "system.md").write_text("Answer with one lower-case word.\n", encoding="utf-8")
    for split, count in (("train", 8), ("validation", 3), ("test", 3)):
        rows = [{"prompt": f"{split} question {i}?", "answer": f"word{i}"} for i in range(count)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    path = folder / "run.toml"
    path.write_text(toml.replace("{top}", top) + "\n" + tables, encoding="utf-8")
    return path
