"""`opcd.models`: heads, adapters, merged weights, and the forward pass that is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, Qwen3Config

from opcd.batching import collate
from opcd.config.training import Full, Lora, Loss
from opcd.errors import ModelError
from opcd.models import (
    Distiller,
    adapter_off,
    base_weights,
    causal_model,
    check_head,
    check_same_vocabulary,
    hidden_states,
    load_weights,
    merge,
    merged_weights,
    output_head,
    save_weights,
    trainable,
    tune,
)
from tiny import SHAPE, build, nudge, pair_of, reverse_kl, rollout_of
from worlds import tiny_llama, tokenizer

LORA = Lora(rank=4, alpha=8)
IDS_BS = torch.tensor([[7, 8, 9, 10, 11, 12]])
HEADS = {
    "llama": LlamaConfig(**SHAPE),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma2, capped": Gemma2Config(**SHAPE, final_logit_softcapping=1.5),
    "cohere, multiplied": CohereConfig(**SHAPE, logit_scale=0.3),
    "granite, divided": GraniteConfig(**SHAPE, logits_scaling=7.0),
}


def tuned(tuning: Lora | Full = LORA, seed: int = 0, **config: Any) -> Any:
    """A student that has left its base."""
    model = tune(tiny_llama(**config), tuning, seed)
    nudge(model, 3)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS_BS).logits[0]


@pytest.mark.parametrize("name", list(HEADS))
def test_the_output_head_gives_the_models_own_logits(name: str) -> None:
    model = build(HEADS[name], seed=1)
    with torch.no_grad():
        hidden_SD = model.get_decoder()(input_ids=IDS_BS).last_hidden_state[0]
        torch.testing.assert_close(output_head(model)(hidden_SD), logits(model))
    check_head(model)


@pytest.mark.parametrize("name", ["gemma2, capped", "cohere, multiplied", "granite, divided"])
def test_these_families_logits_are_not_the_bare_product(name: str) -> None:
    """Tests the test above."""
    model = build(HEADS[name], seed=1)
    with torch.no_grad():
        hidden_SD = model.get_decoder()(input_ids=IDS_BS).last_hidden_state[0]
        bare_SV = model.get_output_embeddings()(hidden_SD)
    assert (bare_SV - logits(model)).abs().max() > 0.1


def test_a_head_that_is_not_known_is_refused() -> None:
    model = tiny_llama()

    def double(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(double)
    with pytest.raises(ModelError, match="logits of LlamaForCausalLM are not its head applied"):
        check_head(model)


def test_merged_weights_are_those_peft_merges() -> None:
    """Names of the base model; what the rollout engine copies is what export writes."""
    model = tuned()
    before = logits(model)
    merged = {name: weight.clone() for name, weight in merged_weights(model)}
    wanted = dict(merge(model).named_parameters())
    assert merged.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)
    copy = tiny_llama(seed=9)
    copy.load_state_dict(merged)
    torch.testing.assert_close(logits(copy), before, rtol=1e-4, atol=1e-4)


def test_base_weights_are_the_first_ones() -> None:
    first = dict(tiny_llama().named_parameters())
    found = dict(base_weights(tuned()))
    assert found.keys() == first.keys()
    assert all(torch.equal(weight, first[name]) for name, weight in found.items())


@pytest.mark.parametrize("copied", [merged_weights, base_weights])
def test_a_model_without_adapter_is_copied_as_it_is(copied: Any) -> None:
    model = tuned(Full())
    own = dict(model.named_parameters())
    found = dict(copied(model))
    assert found.keys() == own.keys()
    assert all(torch.equal(weight, own[name]) for name, weight in found.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_a_tied_head_is_refused() -> None:
    """Merged, it would change the input embeddings too."""
    with pytest.raises(ModelError, match="shares its weights with the input embeddings"):
        tuned(Lora(rank=4, targets=("lm_head",)), tie_word_embeddings=True)


def test_with_its_adapter_off_a_student_is_its_base() -> None:
    model, base = tuned(), logits(tiny_llama())
    changed = logits(model)
    with adapter_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), changed)
    assert (changed - base).abs().max() > 0.1
    with adapter_off(plain := tiny_llama()):
        assert torch.equal(logits(plain), base)


def test_tuning_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = trainable(tune(tiny_llama(), LORA, seed=5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = trainable(tune(tiny_llama(), LORA, seed=5))
    assert torch.equal(torch.get_rng_state(), state), "the run's own generator is left alone"
    other = trainable(tune(tiny_llama(), LORA, seed=6))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())


def test_lora_trains_the_adapter_and_full_everything() -> None:
    lora, full = tune(tiny_llama(), LORA, 0), tune(tiny_llama(), Full(), 0)
    assert all("lora_" in name for name in trainable(lora))
    assert {weight.dtype for weight in trainable(lora).values()} == {torch.float32}
    assert trainable(full).keys() == dict(full.named_parameters()).keys()
    assert causal_model(full) is full and causal_model(lora) is not lora


def test_targets_that_are_not_there_are_named() -> None:
    with pytest.raises(ModelError, match=r"model.tuning.targets = \('query',\).*all-linear"):
        tune(tiny_llama(), Lora(targets=("query",)), 0)


def test_tokenizers_of_one_vocabulary_pass() -> None:
    check_same_vocabulary(tokenizer(), tokenizer(template=None))


def test_tokenizers_of_one_size_with_other_merges_are_refused() -> None:
    """The vocabulary's size is equal; the text that shows the difference is named."""
    ours, theirs = tokenizer(), tokenizer()
    backend = theirs.backend_tokenizer.to_str()
    swapped = backend.replace('"Q":', '"@@":').replace('"T":', '"Q":').replace('"@@":', '"T":')
    theirs = type(theirs)(tokenizer_object=type(theirs.backend_tokenizer).from_str(swapped))
    assert len(ours) == len(theirs)
    with pytest.raises(ModelError, match=r"different vocabularies: 'The quick brown fox.* is \["):
        check_same_vocabulary(ours, theirs)


@pytest.mark.parametrize("tuning", [LORA, Full()], ids=["lora", "full"])
def test_saved_weights_come_back(tmp_path: Path, tuning: Any) -> None:
    model, fresh = tuned(tuning), tune(tiny_llama(), tuning, 1).eval()
    assert not torch.allclose(logits(model), logits(fresh), atol=1e-2)
    save_weights(model, tmp_path)
    load_weights(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("tuning", [LORA, Full()], ids=["lora", "full"])
def test_weights_that_are_missing_or_of_another_shape_are_refused(
    tmp_path: Path, tuning: Any
) -> None:
    with pytest.raises(ModelError, match="does not hold this run's weights"):
        load_weights(tuned(tuning), tmp_path)
    save_weights(tuned(tuning, hidden_size=24), tmp_path / "other")
    with pytest.raises(ModelError, match="does not hold this run's weights"):
        load_weights(tuned(tuning), tmp_path / "other")


@pytest.mark.parametrize("tuning", [LORA, Full()], ids=["lora", "full"])
def test_the_distillers_loss_and_gradient_equal_those_of_full_logits(tuning: Any) -> None:
    pairs = [pair_of("a", 4, 9, seed=1), pair_of("b", 7, 15, seed=2)]
    rollouts = [rollout_of("a", 6, 1), rollout_of("b", 3, 2)]
    teacher = tiny_llama(seed=8)
    grads, values = [], []
    for brute in (True, False):
        student = tuned(tuning)
        batch = collate(pairs, rollouts)
        with torch.no_grad():
            teacher_TD = hidden_states(teacher, batch.teacher)
        if brute:
            kl_T = brute_kl(student, teacher, pairs, rollouts)
        else:
            loss = Loss(chunk_tokens=4)
            kl_T = Distiller(student)(batch, teacher_TD, output_head(teacher), loss).divergence_T
        kl_T.sum().backward()
        values.append(kl_T.detach())
        grads.append({name: weight.grad for name, weight in trainable(student).items()})
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-4)
    for name, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][name], wanted, rtol=1e-3, atol=1e-3)
    assert max(g.abs().max().item() for g in grads[0].values() if g is not None) > 0.01


def brute_kl(student: Any, teacher: Any, pairs: Any, rollouts: Any) -> Tensor:
    parts = []
    for pair, rollout in zip(pairs, rollouts, strict=True):
        sides = []
        for model, prompt in ((student, pair.student_ids), (teacher, pair.teacher_ids)):
            ids_1S = torch.tensor([[*prompt, *rollout.response_ids]])
            sides.append(model(input_ids=ids_1S).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        parts.append(reverse_kl(sides[0], sides[1].detach()))
    return torch.cat(parts)
