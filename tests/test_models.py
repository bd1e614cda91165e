"""`opcd.models`: heads, and the forward pass that is trained."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BertConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

from opcd import models
from opcd.adapters import (
    causal_model,
    trainable,
)
from opcd.batching import Side, collate
from opcd.chunking import Hidden
from opcd.config.training import Full, Loss
from opcd.errors import ModelError
from opcd.models import (
    Distiller,
    can_be_ragged,
    check_head,
    check_rows,
    check_same_vocabulary,
    hidden_states,
    output_head,
    shared_opening,
    why_no_prefix,
)
from opcd.types import PromptPair
from tiny import IDS_BS, LORA, SHAPE, build, logits, pair_of, reverse_kl, rollout_of, tuned
from worlds import tiny_llama, tokenizer

HEADS = {
    "llama": LlamaConfig(**SHAPE),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma2, capped": Gemma2Config(**SHAPE, final_logit_softcapping=1.5),
    "cohere, multiplied": CohereConfig(**SHAPE, logit_scale=0.3),
    "granite, divided": GraniteConfig(**SHAPE, logits_scaling=7.0),
}


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


SMALL = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
IN_COMPANY = {
    "before other tokens": SMALL,  # no decoder: it looks ahead
    "behind padding": BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=4),
}


@pytest.mark.parametrize("place", list(IN_COMPANY))
def test_a_model_that_reads_rows_otherwise_in_company_is_refused(place: str) -> None:
    """Bart counts positions itself, whatever it is told, so padding moves its answers."""
    check_rows(tiny_llama())
    with pytest.raises(ModelError, match=f"{place} as it reads it alone"):
        check_rows(build(IN_COMPANY[place]))


def side_of(prompts: Sequence[tuple[int, ...]]) -> Side:
    """What a student reads: these prompts, with responses of growing length."""
    pairs = [PromptPair(str(row), prompt, prompt) for row, prompt in enumerate(prompts)]
    rollouts = [rollout_of(pair.task_id, 2 + row) for row, pair in enumerate(pairs)]
    return collate(pairs, rollouts).student


OPENED = side_of([(*range(10, 29), 40 + row, *range(50, 50 + row)) for row in range(5)])


def read_and_differentiate(model: Any, side: Side) -> tuple[Tensor, list[Tensor], int]:
    """`hidden_TD`, the gradients of what is trained, and how many tokens were embedded."""
    read: list[int] = []
    why_no_prefix(model)  # reads a few tokens, when it is asked first
    embed = model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda _, ids, __: read.append(ids[0].numel()))
    hidden_TD = hidden_states(model, side)
    hook.remove()
    (hidden_TD * torch.arange(len(hidden_TD)).unsqueeze(-1)).sum().backward()
    grads = [p.grad for p in trainable(model).values() if p.grad is not None]
    return hidden_TD.detach(), grads, sum(read)


def assert_same_pass(ours: Any, wanted: Any) -> None:
    """The same hidden states and gradients."""
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert len(ours[1]) == len(wanted[1]) > 0
    for our_grad, wanted_grad in zip(ours[1], wanted[1], strict=True):
        assert (our_grad - wanted_grad).norm() < 1e-5 * wanted_grad.norm()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_opening_that_all_rows_share_is_read_once(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows stand side by side, as on a GPU: once and in one forward less long."""
    assert shared_opening(OPENED) == 16, "19 shared tokens, in steps of 8"
    monkeypatch.setattr(models, "PLAIN_ATTENTION_TOKENS", 0)

    def run(tokens: int) -> tuple[Tensor, list[Tensor], int]:
        model = tuned()
        if checkpointed:
            causal_model(model).gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        monkeypatch.setattr(models, "MIN_SAVED_TOKENS", tokens)
        return read_and_differentiate(model, OPENED)

    whole, shared = run(10**6), run(4 * 16)
    assert_same_pass(shared, whole)
    assert whole[2] == OPENED.ids_BS.numel()
    assert shared[2] == whole[2] - (0 if checkpointed else 4 * 16)


@pytest.mark.parametrize("tuning", [LORA, Full()], ids=["lora", "full"])
@pytest.mark.parametrize("opened", [True, False])
def test_short_rows_are_read_one_after_the_other(
    tuning: Any, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same hidden states and gradients as side by side, without padding."""
    side = OPENED if opened else side_of([tuple(range(30 + n, 37 + 4 * n)) for n in range(4)])
    assert bool(shared_opening(side)) == opened
    found = read_and_differentiate(tuned(tuning), side)
    used = len({ids[: end + 1] for ids in side.rows() for end in range(len(ids))})
    assert found[2] == (used // 32 + 1) * 32 < side.ids_BS.numel()
    monkeypatch.setattr(models, "PLAIN_ATTENTION_TOKENS", 0)
    assert_same_pass(found, read_and_differentiate(tuned(tuning), side))


def test_models_with_attention_of_their_own_are_read_side_by_side() -> None:
    """A window, capped scores or dropout are not what `ragged` computes."""
    ids_BS = torch.ones(2, 8, dtype=torch.long)
    assert can_be_ragged(tiny_llama(), ids_BS)
    assert not can_be_ragged(build(HEADS["gemma2, capped"]), ids_BS)
    assert not can_be_ragged(tiny_llama(attention_dropout=0.1), ids_BS)
    gpt2: Any = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300}
    assert can_be_ragged(build(GPT2Config(**gpt2, attn_pdrop=0.0)), ids_BS)
    assert not can_be_ragged(build(GPT2Config(**gpt2, attn_pdrop=0.1)), ids_BS)
    assert not can_be_ragged(tiny_llama(), torch.ones(1, 513, dtype=torch.long))


def test_a_model_that_looks_at_the_functions_name_keeps_its_own() -> None:
    """Falcon's two ways to add ALiBi are not the same; teachers and students go one of them."""
    shape: Any = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    model, side = build(FalconConfig(**shape, alibi=True)), side_of([(7, 8, 9), (9, 8)])
    found_TD = hidden_states(model, side)
    with torch.no_grad():
        torch.testing.assert_close(found_TD.detach(), hidden_states(model, side))


def test_an_opening_ends_before_the_first_response_token() -> None:
    """All prompts alike: what predicts the first response token stays in each row."""
    side = side_of([tuple(range(20))] * 5)
    assert int(side.column_T.min()) == 19 and shared_opening(side) == 16
    assert shared_opening(side_of([tuple(range(20))] * 4)) == 0, "saves 3 x 16 tokens: too few"
    assert shared_opening(side_of([tuple(range(90))] * 2)) == 88, "saves enough with two rows"


def test_logits_are_precise_whatever_the_weights_are() -> None:
    """bfloat16 would round logits of 20 to 0.125; frozen weights are cast once, moved ones anew."""
    model = tiny_llama().to(torch.bfloat16).requires_grad_(False)
    weight, hidden_TD = model.get_output_embeddings().weight, 30 * torch.randn(5, 48)
    head = output_head(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            logits_TV = head(hidden_TD)
        torch.testing.assert_close(logits_TV, hidden_TD @ weight.float().T)
        weight.mul_(-0.5)


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
            kl_T = Distiller(student)(
                batch, Hidden(teacher_TD, output_head(teacher)), loss
            ).divergence_T
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
