"""On-policy context distillation without the library, to be read from top to bottom.

    python recipes/minimal_loop.py MODEL_FOLDER

What the library adds: batches, a context that is read once, logits that never exist as a whole,
anchors, validation, checkpoints. The loss of a step is the same; a test compares them.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPE = Path(__file__).parent / "support_desk"
STEPS, PROMPTS_PER_STEP, WARMUP_STEPS, MAX_NEW_TOKENS = 30, 12, 16, 16


def prompts_of(
    tokenizer: Any, message: str, context: list[dict[str, str]]
) -> tuple[Tensor, Tensor]:
    """The same message without and with the context, as token ids `_1S`."""
    turn = [{"role": "user", "content": message}]
    texts = (
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for turns in (turn, context + turn)
    )
    student, teacher = (
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts
    )
    return student, teacher


@torch.no_grad()
def respond(model: Any, prompt_1S: Tensor) -> Tensor:
    """The student's own answer, sampled; it ends with the end-of-sequence token, if it ends."""
    whole_1S = model.generate(
        input_ids=prompt_1S,
        attention_mask=torch.ones_like(prompt_1S),
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=0,
    )
    return whole_1S[:, prompt_1S.shape[1] :]


def next_token_log_probs(model: Any, prompt_1S: Tensor, response_1T: Tensor) -> Tensor:
    """Log-probabilities `_TV` of each response token's place, given all that comes before it.

    With a prompt of P tokens, the logits at P-1 ... P+T-2 predict the tokens 0 ... T-1.
    """
    logits_SV = model(input_ids=torch.cat([prompt_1S, response_1T], dim=1)).logits[0]
    first = prompt_1S.shape[1] - 1
    return logits_SV[first : first + response_1T.shape[1]].float().log_softmax(-1)


def distillation_loss(
    model: Any, student_1S: Tensor, teacher_1S: Tensor, response_1T: Tensor, direction: str
) -> Tensor:
    """1/|y| sum_t KL at each token of one response, in nats; only the student has gradients."""
    with torch.no_grad(), model.disable_adapter():
        q_TV = next_token_log_probs(model, teacher_1S, response_1T)
    p_TV = next_token_log_probs(model, student_1S, response_1T)
    if direction == "forward_kl":
        p_TV, q_TV = q_TV, p_TV
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1).mean()


def read_recipe() -> tuple[list[dict[str, str]], list[str]]:
    """The context as chat turns, and the customers' messages."""
    context = [{"role": "system", "content": (RECIPE / "system.md").read_text().strip()}]
    for line in (RECIPE / "examples.jsonl").read_text().splitlines():
        example = json.loads(line)
        context += [
            {"role": "user", "content": example["prompt"]},
            {"role": "assistant", "content": example["response"]},
        ]
    rows = (RECIPE / "train.jsonl").read_text().splitlines()
    return context, [json.loads(row)["prompt"] for row in rows]


def train(folder: str) -> Iterator[float]:
    """Bake the support desk's context into a LoRA adapter; yields the loss of each step."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-4, weight_decay=0.0)
    context, messages = read_recipe()
    for step in range(STEPS):
        direction = "forward_kl" if step < WARMUP_STEPS else "reverse_kl"
        loss_nats = 0.0
        for message in random.Random(step).sample(messages, PROMPTS_PER_STEP):
            student_1S, teacher_1S = prompts_of(tokenizer, message, context)
            response_1T = respond(model, student_1S)
            loss = distillation_loss(model, student_1S, teacher_1S, response_1T, direction)
            (loss / PROMPTS_PER_STEP).backward()
            loss_nats += loss.item() / PROMPTS_PER_STEP
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss_nats


if __name__ == "__main__":
    for number, step_loss_nats in enumerate(train(sys.argv[1])):
        print(f"step {number}: {step_loss_nats:.3f} nats")
