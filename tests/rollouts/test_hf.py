"""`opcd.rollouts.hf`: what transformers would generate, in batches that change nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4TextConfig, GraniteConfig, MistralConfig, Qwen3NextConfig

from allocated import peak_bytes
from opcd.adapters import tune
from opcd.config.training import Full, Lora
from opcd.prefix_cache import read_prefix, token_bytes
from opcd.prefix_store import PrefixStore
from opcd.rollouts import hf
from opcd.rollouts.engine import Prompt, Sampling
from opcd.rollouts.hf import HFEngine, choose, cut_prompts
from opcd.rollouts.layers import find_layers
from tiny import SHAPE, build, nudge, random_ids
from worlds import END_ID, tiny_llama

WARM = Sampling(temperature=1.0, seed="0/7")
PROMPTS = [Prompt(f"t{i}", random_ids(length, i), 12) for i, length in enumerate((3, 11, 6, 2, 9))]
SHARED = random_ids(70, 99)
BEHIND = [Prompt(p.task_id, SHARED + p.ids, p.max_new_tokens) for p in PROMPTS]


def engine_of(model: Any, rows: int = 8, ends: frozenset[int] = frozenset({END_ID})) -> HFEngine:
    engine = HFEngine(model, model, torch.float32, ends, rows)
    engine.use("student", 0)
    return engine


def answers(engine: HFEngine, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
    rollouts = engine.generate(prompts, sampling)
    assert [r.task_id for r in rollouts] == [p.task_id for p in prompts]
    return [list(rollout.response_ids) for rollout in rollouts]


@torch.no_grad()
def generated(model: Any, prompt: Prompt, end: int = END_ID) -> list[int]:
    """Transformers' own greedy answer, one prompt at a time."""
    ids_1S = torch.tensor([prompt.ids])
    found_1S = model.generate(
        input_ids=ids_1S,
        attention_mask=torch.ones_like(ids_1S),
        do_sample=False,
        max_new_tokens=prompt.max_new_tokens,
        eos_token_id=end,
        pad_token_id=0,
    )
    return found_1S[0, len(prompt.ids) :].tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(seed=2)


@pytest.fixture(scope="module")
def common_end(model: Any) -> int:
    """A token that some greedy answers reach early, and some never: rows that finish."""
    found = [generated(model, prompt, end=-1) for prompt in PROMPTS]
    inside = [t for answer in found for t in answer[1:-1]]
    return next(t for t in inside if not all(t in answer for answer in found))


def test_greedy_answers_are_those_of_generate(model: Any, common_end: int) -> None:
    """Ragged prompts in one batch; rows that have finished leave it."""
    engine = engine_of(model, ends=frozenset({common_end}))
    rollouts = engine.generate(PROMPTS, Sampling())
    wanted = [generated(model, prompt, common_end) for prompt in PROMPTS]
    assert [list(r.response_ids) for r in rollouts] == wanted
    assert [r.finished for r in rollouts] == [w[-1] == common_end for w in wanted]
    assert len({r.finished for r in rollouts}) == 2, "some finish, some are cut"


@pytest.mark.parametrize("prompts", [PROMPTS, BEHIND], ids=["plain", "shared prefix"])
def test_a_model_whose_layers_are_not_known_is_read_by_transformers(prompts: list[Prompt]) -> None:
    """Ragged prompts in one batch, of which rows leave at different steps."""
    model = build(GraniteConfig(**SHAPE, residual_multiplier=0.5), seed=3)
    assert find_layers(model) is None
    limits = [3, 12, 7, 12, 5]
    asked = [replace(p, max_new_tokens=n) for p, n in zip(prompts, limits, strict=True)]
    found = answers(engine_of(model), asked, Sampling())
    assert found == [generated(model, prompt) for prompt in asked]


@pytest.mark.parametrize("prompts", [PROMPTS, BEHIND], ids=["plain", "shared prefix"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_samples_do_not_depend_on_the_batch(model: Any, prompts: list[Prompt], rows: int) -> None:
    """Same seed and task id, same response: whatever the batch size, the order, and who leaves."""
    ends = frozenset(range(0, 300, 6))
    wanted = answers(engine_of(model, 8, ends), prompts, WARM)
    assert len({len(answer) for answer in wanted}) > 2, "rows leave at different steps"
    assert answers(engine_of(model, rows, ends), prompts, WARM) == wanted
    backwards = answers(engine_of(model, rows, ends), prompts[::-1], WARM)
    assert backwards[::-1] == wanted


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, BEHIND], ids=["plain", "shared prefix"])
def test_kept_states_are_those_of_reading_the_answer(model: Any, prompts: list[Prompt]) -> None:
    """Of all tokens, also of rows that leave early; and only where they were asked for."""
    engine = engine_of(model, ends=frozenset(range(0, 300, 6)))
    asked = [replace(prompt, keep_hidden=i != 2) for i, prompt in enumerate(prompts)]
    rollouts = engine.generate(asked, WARM)
    assert len({len(r.response_ids) for r in rollouts}) > 2, "rows leave at different steps"
    for prompt, rollout in zip(asked, rollouts, strict=True):
        ids_1S = torch.tensor([prompt.ids + rollout.response_ids[:-1]])
        read_SD = model.get_decoder()(input_ids=ids_1S).last_hidden_state[0]
        wanted_TD = read_SD[len(prompt.ids) - 1 :]
        if prompt.keep_hidden:
            torch.testing.assert_close(rollout.hidden_TD, wanted_TD, rtol=1e-4, atol=1e-4)
        else:
            assert rollout.hidden_TD is None


def test_another_seed_samples_otherwise(model: Any) -> None:
    engine = engine_of(model)
    first = answers(engine, PROMPTS, WARM)
    assert answers(engine, PROMPTS, WARM) == first
    assert answers(engine, PROMPTS, Sampling(1.0, seed="0/8")) != first


def test_each_prompt_has_its_own_limit(model: Any) -> None:
    """A row that reaches its limit leaves, is not finished, and changes no other row."""
    limits = [1, 12, 4, 7, 12]
    prompts = [Prompt(p.task_id, p.ids, n) for p, n in zip(PROMPTS, limits, strict=True)]
    engine = engine_of(model, ends=frozenset({-1}))
    whole = answers(engine, PROMPTS, WARM)
    rollouts = engine.generate(prompts, WARM)
    cut = [answer[:limit] for answer, limit in zip(whole, limits, strict=True)]
    assert [list(r.response_ids) for r in rollouts] == cut
    assert not any(r.finished for r in rollouts)


def test_the_end_token_is_part_of_the_response(model: Any, common_end: int) -> None:
    """Even where it comes as the very last token that fits."""
    prompt = next(p for p in PROMPTS if common_end in generated(model, p, -1))
    at = generated(model, prompt, -1).index(common_end) + 1
    engine = engine_of(model, ends=frozenset({common_end}))
    for limit, finished in ((at, True), (at + 1, True), (at - 1, False)):
        exact = Prompt(prompt.task_id, prompt.ids, limit)
        (rollout,) = engine.generate([exact], Sampling())
        assert rollout.finished == finished
        assert (rollout.response_ids[-1] == common_end) == finished


def test_a_shared_prefix_is_read_once_and_changes_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = hf.read_prefix

    def counted(of: Any, ids: Sequence[int]) -> Any:
        reads.append(len(ids))
        return read(of, ids)

    monkeypatch.setattr(hf, "read_prefix", counted)
    engine = engine_of(model, rows=2)
    shared = [answers(engine, BEHIND, sampling) for sampling in (Sampling(), WARM)]
    assert reads == [len(SHARED)], "once for these weights, whatever is asked of them"
    monkeypatch.setattr(hf, "why_no_prefix", lambda _: "as if it could not")
    assert [answers(engine, BEHIND, sampling) for sampling in (Sampling(), WARM)] == shared
    assert shared[0] == [generated(model, prompt) for prompt in BEHIND]


CONTEXTS = [random_ids(70 + 40 * n, 50 + n) for n in range(3)]
POOL = [
    Prompt(f"{p.task_id}/{n}", context + p.ids, p.max_new_tokens)
    for p in PROMPTS
    for n, context in enumerate(CONTEXTS)
]
"""Five questions, each behind three contexts."""


@pytest.mark.parametrize("room", [10**6, 160, 1], ids=["all", "some", "one at a time"])
@pytest.mark.parametrize("rows", [4, 64])
def test_each_context_of_a_pool_is_read_once(model: Any, rows: int, room: int) -> None:
    """For rows of one batch or of several, whatever fits into the budget; the base is asked."""
    reads: list[int] = []

    def read(ids: Sequence[int]) -> Any:
        reads.append(len(ids))
        return read_prefix(model, ids)

    store = PrefixStore(model, read, room * token_bytes(model))
    engine = HFEngine(model, model, torch.float32, frozenset({END_ID}), rows, store)
    engine.use("base", 0)
    for _ in range(2):
        assert answers(engine, POOL, Sampling()) == [generated(model, prompt) for prompt in POOL]
    lengths = [len(context) for context in CONTEXTS]
    assert reads[:3] == reads[-3:] or room > 1000
    assert sorted(reads) == sorted(lengths * (1 if room > 1000 else 2))


def test_prompts_that_share_nothing_are_read_apart_when_they_are_long(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of them would have a mask of all with all. Nothing of them is kept."""
    monkeypatch.setattr(hf, "PREFILL_TOKENS", 90)
    prompts = [*PROMPTS[:2], *(Prompt(f"long{n}", random_ids(95 + n, n), 5) for n in range(3))]
    assert cut_prompts(prompts) == [0, 0, 94, 95, 96]
    engine = engine_of(model)
    assert answers(engine, prompts, Sampling()) == [generated(model, p) for p in prompts]
    assert engine._prefixes["student"].bytes == 0


def test_few_that_share_little_stay_in_the_batch() -> None:
    """Another round of decoding costs more than reading 70 tokens twice."""
    pair = [replace(prompt, max_new_tokens=12) for prompt in BEHIND[:2]]
    assert cut_prompts(pair) == [70, 70]
    assert cut_prompts([*pair, *PROMPTS]) == [0] * 7
    many = [replace(BEHIND[0], ids=(*SHARED, n, 5)) for n in range(13)]
    assert cut_prompts([*many, *PROMPTS]) == [70] * 13 + [0] * 5


def test_rows_of_a_batch_make_no_copy_of_a_long_context() -> None:
    """16 rows behind 8,192 tokens: what decoding takes is the rows' own."""
    model, context = tiny_llama(positions=9000), random_ids(8192, 1)
    engine = engine_of(model, 16, frozenset({-1}))
    prompts = [Prompt(str(n), context + random_ids(9, n), 6) for n in range(16)]
    answers(engine, prompts, Sampling())
    peak = peak_bytes(lambda: answers(engine, prompts, Sampling()))
    assert peak < 8192 * token_bytes(model) / 2


HYBRID: Any = {
    **SHAPE,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
}
HEADS: Any = {
    **SHAPE,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 64,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
}
MIXED = {
    "linear attention": Qwen3NextConfig(**HYBRID),
    "heads of two widths": Gemma4TextConfig(**HEADS),
}


@pytest.mark.parametrize("name", list(MIXED))
def test_layers_may_keep_different_things(name: str) -> None:
    """Rows leave them all, whatever a layer remembers of its rows."""
    ends = frozenset(range(0, 300, 6))
    model = build(MIXED[name], seed=3)
    found = answers(engine_of(model, ends=ends), PROMPTS, WARM)
    assert len({len(answer) for answer in found}) > 2, "rows leave at different steps"
    alone = engine_of(model, 1, ends)
    assert found == [answers(alone, [prompt], WARM)[0] for prompt in PROMPTS]


def test_a_sliding_window_is_respected_behind_a_shared_prefix() -> None:
    model = build(MistralConfig(**SHAPE, sliding_window=16), seed=3)
    found = answers(engine_of(model), BEHIND, Sampling())
    assert found == [generated(model, prompt) for prompt in BEHIND]


def test_a_sliding_window_is_respected_without_one() -> None:
    """Tests the test above: left padding, growing cache and window go together."""
    model = build(MistralConfig(**SHAPE, sliding_window=16), seed=3)
    found = [answers(engine_of(model), [prompt], Sampling())[0] for prompt in BEHIND]
    assert found == [generated(model, prompt) for prompt in BEHIND]


@pytest.mark.parametrize("tuning", [Lora(rank=4), Full()], ids=["lora", "full"])
def test_student_and_base_are_told_apart(tuning: Any) -> None:
    """The student's current weights, adapter merged, against those it started from."""
    base = tiny_llama()
    student = tune(tiny_llama(), tuning, 0).eval()
    nudge(student, size=0.2)
    frozen = student if tuning.type == "lora" else base
    engine = HFEngine(student, frozen, torch.float32, frozenset({END_ID}), 8)
    engine.use("student", 1)
    found = answers(engine, PROMPTS, Sampling())
    assert found == [generated(student, prompt) for prompt in PROMPTS]
    engine.use("base", 0)
    first = answers(engine, PROMPTS, Sampling())
    assert first == [generated(base, prompt) for prompt in PROMPTS] != found
    nudge(student, seed=1, size=0.2)
    engine.use("student", 2)
    assert answers(engine, PROMPTS, Sampling()) == [generated(student, p) for p in PROMPTS]


def test_weights_that_have_not_moved_are_copied_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for the loaded version again copies nothing, unless something wrote to the weights."""
    student = tune(tiny_llama(), Full(), 0).eval()
    engine, copies = engine_of(student), []
    real = hf.merged_weights
    monkeypatch.setattr(hf, "merged_weights", lambda *of: copies.append(of) or real(*of))
    first = answers(engine, PROMPTS, Sampling())
    engine.use("base", 0)
    engine.use("student", 0)
    assert not copies and answers(engine, PROMPTS, Sampling()) == first
    nudge(student, size=0.3)
    engine.use("student", 0)
    assert len(copies) == 1 and answers(engine, PROMPTS, Sampling()) != first


PROBS = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)


def chosen(uniforms: Sequence[float] | Tensor, **sampling: Any) -> list[int]:
    uniforms_B = torch.as_tensor(uniforms, dtype=torch.float64)
    logits_BV = PROBS.log().expand(len(uniforms_B), -1)
    return choose(logits_BV, uniforms_B, Sampling(**{"temperature": 1.0, **sampling})).tolist()


def test_choosing_inverts_the_cumulative_distribution() -> None:
    """A token without mass is never taken, not at the edges either."""
    edge = 1 - 2**-53
    assert chosen([0.0, 0.4999, 0.5, 0.7999, 0.8, edge]) == [0, 0, 2, 2, 3, 3]
    reversed_BV = PROBS.flip(0)[:2].log().expand(1, -1)
    assert choose(reversed_BV, torch.zeros(1), Sampling(1.0)).tolist() == [0]


def test_no_draw_falls_off_the_end() -> None:
    """The largest uniform number there is, on vocabularies whose sum is rounded."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(200, 4999, generator=generator) * 3
    logits_BV[:, 4000:] = -torch.inf
    uniforms_B = torch.full((200,), 1 - 2**-53, dtype=torch.float64)
    assert choose(logits_BV, uniforms_B, Sampling(1.0)).max() < 4000
    assert choose(logits_BV, uniforms_B, Sampling(1.0, top_p=0.9)).max() < 4000


def test_temperature_zero_takes_the_likeliest() -> None:
    assert chosen([0.0, 0.99], temperature=0.0) == [0, 0]


def test_top_p_keeps_the_first_token_and_those_that_reach_the_mass() -> None:
    grid = torch.linspace(0, 1 - 1e-9, 101, dtype=torch.float64)
    assert set(chosen(grid, top_p=0.01)) == {0}
    assert set(chosen(grid, top_p=0.5)) == {0}
    assert set(chosen(grid, top_p=0.51)) == {0, 2}
    assert set(chosen(grid, top_p=0.81)) == {0, 2, 3}
    shares = torch.bincount(torch.tensor(chosen(grid, top_p=0.6)), minlength=4) / 101
    assert shares[0] == pytest.approx(0.5 / 0.8, abs=0.02), "what stays is scaled up"


def test_top_k_keeps_the_likeliest_and_top_p_counts_among_them() -> None:
    """As vLLM and transformers do it: 0.5 / 0.8 of what two tokens leave is more than 0.6."""
    grid = torch.linspace(0, 1 - 1e-9, 101, dtype=torch.float64)
    assert set(chosen(grid, top_k=1)) == {0}
    assert set(chosen(grid, top_k=2)) == {0, 2}
    assert set(chosen(grid, top_k=9)) == {0, 2, 3}
    assert set(chosen(grid, top_k=2, top_p=0.6)) == {0}
    assert set(chosen(grid, top_p=0.6)) == {0, 2}
    assert set(chosen(grid, top_k=3, top_p=0.81)) == {0, 2, 3}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    """Chi-square of 40,000 draws over 20 tokens: below 60 but once in 100,000 times."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(20, generator=generator) * 1.5
    draws = torch.cat(
        [Sampling(seed="s").uniforms(Prompt(f"t{i}", (), 0), 1000) for i in range(40)]
    )
    found = choose(logits_V.expand(len(draws), -1), draws, Sampling(temperature))
    counts_V = torch.bincount(found, minlength=20).double()
    wanted_V = (logits_V.double() / temperature).softmax(-1) * len(draws)
    assert ((counts_V - wanted_V) ** 2 / wanted_V).sum() < 60
