"""The student: tuning, hidden states, output head, and the one forward pass that is trained.

Knows how to get hidden states and logits out of any transformers causal model; knows nothing of
prompts, teachers' kinds or optimisers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from opcd.batching import Batch, Side
from opcd.chunking import Head, chunked_stats
from opcd.config.training import Full, Lora, Loss
from opcd.divergence import TokenStats
from opcd.errors import ModelError

PROBES = (
    "The quick brown fox, 1,234.50 EUR - naïve café?\n",
    '{"mood": "glad", "n": [1, 2, 3]}',
    "def f(x):\n\treturn x ** 2  # comment",
    "你好, Привет, مرحبا 🙂",
)
"""Texts whose token ids tell two vocabularies apart."""


PLAIN_ATTENTION_TOKENS = 512
"""Up to this length a CPU trains with plain attention, whose scores grow with its square."""


class Distiller(nn.Module):
    """What accelerate prepares: the student, with the whole divergence inside its `forward`.

    Under FSDP the parameters are whole only inside the wrapped module's `forward`, so the chunks
    and the head have to run there.
    """

    def __init__(self, student: Any) -> None:
        """Wrap the model in training."""
        super().__init__()
        self.student = student

    def forward(self, batch: Batch, teacher_TD: Tensor, head: Head, loss: Loss) -> TokenStats:
        """Statistics of each response token, `divergence_T` with its gradient."""
        with _lora_inputs_uncast(self.student):
            student_TD = hidden_states(self.student, batch.student)
        own_head = output_head(self.student)
        return chunked_stats(student_TD, own_head, teacher_TD, head, batch.response_T, loss)


def tune(model: Any, tuning: Lora | Full, seed: int) -> Any:
    """Make a model trainable: with a LoRA adapter (float32) in it, or in all its weights.

    Raises:
        ModelError: the model has none of the named modules.
    """
    if isinstance(tuning, Full):
        return model.requires_grad_(True)
    targets = tuning.targets if isinstance(tuning.targets, str) else list(tuning.targets)
    layers = model.config.get_text_config().num_hidden_layers
    left_out = "|".join(map(str, range(layers - (tuning.last_layers or layers))))
    lora = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=targets,
        exclude_modules=rf".*\.layers\.({left_out})\..*" if left_out else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tuned: Any = get_peft_model(model, lora)
        except ValueError as error:
            raise ModelError(
                f"model.tuning.targets = {tuning.targets!r}: {error}; name modules of this model, "
                'or write "all-linear"'
            ) from error
    head = tuned.get_base_model().get_output_embeddings()
    if isinstance(head, LoraLayer) and model.config.get_text_config().tie_word_embeddings:
        raise ModelError(
            f"model.tuning.targets = {tuning.targets!r} adapts the output head, which shares its "
            'weights with the input embeddings, so it cannot be merged; write "all-linear"'
        )
    return tuned


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_off(model: Any) -> AbstractContextManager[Any, Any]:
    """Within it, a LoRA model answers as its base model."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def causal_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hidden_states(model: Any, side: Side) -> Tensor:
    """The hidden states that predict the response tokens, `hidden_TD`; no head is run."""
    assert side.prefix_tokens == 0, "a shared prefix is read by prefix_cache"
    decoder = causal_model(model).get_decoder()
    on_cpu, length = side.ids_BS.device.type == "cpu", side.ids_BS.shape[1]
    # The CPU's fused attention takes 4 x as long as plain products to differentiate in bfloat16.
    # Checkpointed layers run again in the backward pass, when the choice has been taken back.
    recomputed = getattr(decoder, "gradient_checkpointing", False)
    short = length <= PLAIN_ATTENTION_TOKENS
    plain = on_cpu and torch.is_grad_enabled() and short and not recomputed
    with attention(model, "eager") if plain else nullcontext():
        hidden_BSD = decoder(input_ids=side.ids_BS, use_cache=False).last_hidden_state
    return side.take(hidden_BSD)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Within it, the model computes its attention by another of transformers' functions."""
    config = causal_model(model).get_decoder().config
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def output_head(model: Any) -> Head:
    """A model's map from hidden states to logits, with the scaling its family applies."""
    model = causal_model(model)
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden_CD: Tensor) -> Tensor:
        logits_CV = linear(hidden_CD.to(linear.weight.dtype))
        logits_CV = logits_CV if scale == 1.0 else logits_CV * scale
        return logits_CV if cap is None else torch.tanh(logits_CV / cap) * cap

    return head


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare `output_head` on hidden states with the model's own logits.

    Raises:
        ModelError: they differ, so this model's head does something that is not known here.
    """
    device = next(model.parameters()).device
    ids_BS = torch.arange(4, device=device).unsqueeze(0)
    hidden_TD = causal_model(model).get_decoder()(input_ids=ids_BS).last_hidden_state[0]
    own_TV = causal_model(model)(input_ids=ids_BS).logits[0]
    if not torch.allclose(output_head(model)(hidden_TD), own_TV, rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"the logits of {type(causal_model(model)).__name__} are not its head applied to its "
            "hidden states, so its divergence cannot be computed in chunks; use another model"
        )


def check_same_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Compare what two tokenizers make of probe texts; sizes alone tell nothing.

    Raises:
        ModelError: some text has other ids.
    """
    specials = [str(token) for token in student_tokenizer.all_special_tokens]
    for text in (*PROBES, *specials):
        ours, theirs = (
            tokenizer.encode(text, add_special_tokens=False)
            for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        if ours != theirs:
            raise ModelError(
                f"student and teacher have different vocabularies: {text!r} is {ours[:6]} for "
                f"the one and {theirs[:6]} for the other, so the teacher would score other words. "
                "Set teacher.path to a model of the student's family"
            )


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the model inside, adapters merged in float32, one at a time.

    Names are those of the untouched base model, so that a plain copy of it can take them.
    """
    deltas: dict[str, Any] = {
        f"{name}.base_layer.weight": layer
        for name, layer in causal_model(model).named_modules()
        if isinstance(layer, LoraLayer)
    }
    for name, weight in causal_model(model).named_parameters():
        if ".lora_" in name:
            continue
        merged = weight.detach()
        if name in deltas:
            delta = deltas[name].get_delta_weight("default").detach()
            merged = merged.float() + delta.to(merged.device)
        yield name.replace(".base_layer.", "."), merged


def base_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each weight of the model inside, adapters left out."""
    for name, weight in causal_model(model).named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), weight.detach()


def merge(model: Any) -> Any:
    """The plain transformers model, the adapter merged into its weights for good."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def save_weights(model: Any, folder: Path) -> None:
    """Write what was trained: a PEFT adapter that vLLM serves, or a whole transformers folder."""
    model.save_pretrained(folder)


def load_weights(model: Any, folder: Path) -> None:
    """Give a model the weights that `save_weights` wrote.

    Raises:
        ModelError: the folder holds other weights than the model has.
    """
    try:
        if isinstance(model, PeftModel):
            set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        else:
            saved = type(model).from_pretrained(folder, dtype=torch.float32)
            model.load_state_dict(saved.state_dict())
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} does not hold this run's weights ({error})") from error


@contextmanager
def _lora_inputs_uncast(model: Any) -> Iterator[None]:
    # Under autocast PEFT would turn every activation to float32 only to have it cast back.
    autocast = torch.is_autocast_enabled(next(model.parameters()).device.type)
    with disable_input_dtype_casting(model, active=autocast):
        yield
