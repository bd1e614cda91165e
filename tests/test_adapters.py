"""`opcd.adapters`: what is trained, merged, shared, saved and given back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, SeedOssConfig

from opcd.adapters import (
    adapter_off,
    causal_model,
    load_weights,
    merge,
    merged_weights,
    save_weights,
    share_frozen,
    trainable,
    tune,
)
from opcd.config.training import Full, Lora
from opcd.errors import ModelError
from tiny import LORA, SHAPE, build, logits, nudge, tuned
from worlds import tiny_llama


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


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_experts_are_merged_as_peft_merges_them() -> None:
    """All experts' weights are one parameter each, adapted one around the other."""
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)
    model = tune(build(config), LORA, 0)
    nudge(model, 3)
    assert any("experts.base_layer.base_layer" in name for name, _ in model.named_parameters())
    merged = {name: weight.clone() for name, weight in merged_weights(model)}
    share_frozen(model, build(config, 1))
    wanted = dict(merge(model).named_parameters())
    assert merged.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)


def test_a_model_without_adapter_is_copied_as_it_is() -> None:
    model = tuned(Full())
    own = dict(model.named_parameters())
    found = dict(merged_weights(model))
    assert found.keys() == own.keys()
    assert all(torch.equal(weight, own[name]) for name, weight in found.items())


@pytest.mark.parametrize("tie", [True, False])
def test_weights_that_training_leaves_alone_are_shared(tie: bool) -> None:
    """The embeddings and the layers below the adapted ones, and nothing that moves."""
    student = tuned(Lora(rank=4, last_layers=1), tie_word_embeddings=tie)
    plain = tiny_llama(seed=9, tie_word_embeddings=tie)
    own = {name: p.data_ptr() for name, p in causal_model(student).named_parameters()}
    share_frozen(student, plain)
    shared = {name for name, p in plain.named_parameters() if p.data_ptr() in own.values()}
    assert "model.embed_tokens.weight" in shared
    assert "model.layers.0.mlp.up_proj.weight" in shared
    assert not any(".layers.2." in name and "_proj" in name for name in shared)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tie
    share_frozen(tuned(Full()), unshared := tiny_llama(seed=9))
    assert all(
        torch.equal(p, q)
        for p, q in zip(unshared.parameters(), tiny_llama(seed=9).parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_embeddings_is_refused(target: str) -> None:
    """Merged, one would change the other too."""
    with pytest.raises(ModelError, match="shares its weights with the other"):
        tuned(Lora(rank=4, targets=(target,)), tie_word_embeddings=True)


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


def test_the_base_of_an_adapted_model_is_what_it_was() -> None:
    """An engine whose models are in shards copies these to answer as the base."""
    plain = dict(tiny_llama().named_parameters())
    found = dict(merged_weights(tuned(), "base"))
    assert found.keys() == plain.keys()
    assert all(torch.equal(weight, plain[name]) for name, weight in found.items())


def test_an_adapter_that_is_off_is_still_trained() -> None:
    """Weights in shards take note of what is trained once; one that is off inside stays off."""
    model = tuned()
    before = list(trainable(model))
    with adapter_off(model):
        assert list(trainable(model)) == before
        with adapter_off(model):
            pass
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert not torch.equal(logits(model), logits(tiny_llama()))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of some loss, for every weight in training."""
    ids_BS = torch.arange(24).view(2, 12)
    model.zero_grad()
    (model(input_ids=ids_BS).logits.float() ** 2).mean().backward()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def slow_down(model: Any) -> None:
    """Give every module its own class's `forward` back."""
    for module in model.modules():
        module.__dict__.pop("forward", None)


def test_fewer_steps_compute_what_peft_does() -> None:
    """Logits and all gradients, with the adapter on and off."""
    model = tuned(LORA)
    quick = logits(model), gradients(model)
    with adapter_off(model):
        base = logits(model)
    assert sum("forward" in module.__dict__ for module in model.modules()) > 7
    slow_down(model)
    torch.testing.assert_close(quick[0], logits(model), rtol=1e-4, atol=1e-5)
    with adapter_off(model):
        torch.testing.assert_close(base, logits(model), rtol=1e-4, atol=1e-5)
    slow = gradients(model)
    assert quick[1].keys() == slow.keys() == trainable(model).keys()
    for name, gradient in slow.items():
        torch.testing.assert_close(quick[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_in_bfloat16_fewer_steps_are_as_near_to_the_truth_as_peft() -> None:
    """Float32 adapters on bfloat16 weights under autocast, as in a run; the truth is float32."""
    exact, model = tuned(LORA), tuned(LORA)
    for name, p in model.named_parameters():
        p.data = p.data if ".lora_" in name else p.data.bfloat16()
    truth = gradients(exact)

    def errors() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(model)
        return {name: (found[name] - truth[name]).norm().item() for name in truth}

    quick = errors()
    slow_down(model)
    slow = errors()
    assert sum(quick.values()) <= 1.2 * sum(slow.values())


def test_what_peft_alone_knows_is_left_to_it() -> None:
    """Dropout draws as PEFT draws; a merged adapter is not added a second time."""
    model = tuned(Lora(rank=4, dropout=0.5)).train()
    torch.manual_seed(1)
    found = gradients(model)
    slow_down(model)
    torch.manual_seed(1)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    model = tuned(LORA)
    wanted = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_a_block_that_only_looks_gated_keeps_its_own_way() -> None:
    """Its parts have the same names, but it computes something else."""
    plain = tiny_llama()
    block = type(plain.model.layers[0].mlp)

    class Other(block):
        """With twice the sum."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for layer in plain.model.layers:
        layer.mlp.__class__ = Other
    before = logits(plain)
    model = tune(plain, Lora(rank=4), 0)
    torch.testing.assert_close(logits(model), before)
    assert "forward" not in causal_model(model).model.layers[0].mlp.__dict__


def test_a_block_that_drops_in_training_goes_on_to() -> None:
    """Seed-OSS's is an ordinary gated block where it answers, and only there."""
    model = tune(build(SeedOssConfig(**SHAPE, residual_dropout=0.5)), LORA, 0)
    block = causal_model(model).model.layers[0].mlp
    assert not block.training
    dropped = block.train()(torch.randn(1, 9, 32)) == 0
    assert 0.3 < dropped.float().mean() < 0.7
