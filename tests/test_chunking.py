"""`opcd.chunking`: the unchunked numbers, with the memory of one chunk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from opcd.chunking import Asked, chunked_stats, stats_against
from opcd.config.training import ExactSupport, Loss, Sampled, TopK
from opcd.divergence import Listed, TokenStats, listed_token_stats, token_stats

TOKENS, WIDTH, VOCABULARY = 23, 6, 31
SUPPORTS = [
    ExactSupport(),
    Sampled(),
    *(TopK(k=5, of=of, tail=tail) for of in ("student", "union") for tail in ("bucket", "drop")),
]
CASES = [
    (direction, support)
    for direction in ("reverse_kl", "forward_kl", "jsd")
    for support in SUPPORTS
    if direction == "reverse_kl" or not isinstance(support, Sampled)
]


def linear(vocabulary: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(WIDTH, vocabulary, bias=False, dtype=dtype)


def hidden(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, tokens, WIDTH, generator=generator, dtype=dtype)
    return student.requires_grad_(), teacher


def sampled(tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.arange(tokens) % vocabulary


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100])
@pytest.mark.parametrize(("direction", "support"), CASES)
def test_chunked_equals_unchunked(direction: Any, support: Any, chunk_tokens: int) -> None:
    """In value and in the gradients of hidden states and head; 23 = 4 x 5 + 3 is ragged."""
    loss = Loss(direction=direction, support=support, chunk_tokens=chunk_tokens)
    weights_T = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)
    teacher_head = linear(VOCABULARY, 1)

    def run(stats: Callable[..., TokenStats]) -> tuple[TokenStats, Tensor, Tensor]:
        student_head, (student_TD, teacher_TD) = linear(VOCABULARY, 0), hidden()
        found = stats(student_TD, student_head, teacher_TD, teacher_head)
        (found.divergence_T * weights_T).sum().backward()
        assert student_TD.grad is not None and student_head.weight.grad is not None
        return found, student_TD.grad, student_head.weight.grad

    chunked = run(lambda s, sh, t, th: chunked_stats(s, sh, t, th, sampled(), loss))
    dense = run(lambda s, sh, t, th: token_stats(sh(s), th(t), sampled(), loss))
    for ours, wanted in zip((*chunked[0], *chunked[1:]), (*dense[0], *dense[1:]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    assert teacher_head.weight.grad is None


@pytest.mark.parametrize("trained", [True, False])
def test_chunked_equals_unchunked_against_a_list(trained: bool) -> None:
    loss = Loss(direction="forward_kl", support=TopK(k=5, of="teacher"), chunk_tokens=5)
    (student_TD, teacher_TD), head = hidden(), linear(VOCABULARY, 0).requires_grad_(trained)
    top = linear(VOCABULARY, 1)(teacher_TD).log_softmax(-1).detach().topk(5)
    known = Listed(top.indices, top.values, top.values[:, 0])
    dense = listed_token_stats(head(student_TD), known, sampled(), loss)
    chunked = stats_against(student_TD, head, known, sampled(), loss)
    for ours, wanted in zip(chunked, dense, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    gradients = [
        torch.autograd.grad(stats.divergence_T.sum(), student_TD)[0] for stats in (chunked, dense)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_teacher_that_scores_chosen_ids_is_asked_for_the_students_likeliest() -> None:
    (student_TD, _), head = hidden(), linear(VOCABULARY, 0)
    asked: list[Tensor] = []

    def ask(ids_TK: Tensor) -> Listed:
        asked.append(ids_TK)
        return Listed(ids_TK, torch.full(ids_TK.shape, -3.0), torch.full((TOKENS,), -3.0))

    loss = Loss(support=TopK(k=4), chunk_tokens=5)
    stats_against(student_TD, head, Asked(4, ask), sampled(), loss)
    assert torch.equal(asked[0], head(student_TD).topk(4).indices)
    assert not asked[0].requires_grad


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's output has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, list | tuple) else [result]
        sizes = [out.numel() for out in outputs if isinstance(out, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("support", [ExactSupport(), TopK(k=16, of="union")])
def test_neither_sides_logits_ever_exist(support: Any) -> None:
    """No output of any operation, forward or backward, and nothing saved, is near T x V."""
    tokens, vocabulary, chunk = 256, 500, 16
    student_TD, teacher_TD = hidden(tokens, torch.float32)
    heads = (linear(vocabulary, 0, torch.float32), linear(vocabulary, 1, torch.float32))
    saved: list[int] = []
    loss = Loss(support=support, chunk_tokens=chunk)

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as seen:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            response_T = sampled(tokens, vocabulary)
            stats = chunked_stats(student_TD, heads[0], teacher_TD, heads[1], response_T, loss)
        stats.divergence_T.sum().backward()
    assert seen.numel == chunk * vocabulary
    assert sum(saved) < chunk * vocabulary, "only slices of hidden states are kept"


def test_the_recorder_sees_logits_where_there_are_any() -> None:
    """Tests the test above: the unchunked computation is caught."""
    student_TD, teacher_TD = hidden()
    with LargestTensor() as seen:
        heads = linear(VOCABULARY, 0), linear(VOCABULARY, 1)
        token_stats(heads[0](student_TD), heads[1](teacher_TD), sampled(), Loss())
    assert seen.numel >= TOKENS * VOCABULARY


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_heads_of_one_vocabulary_may_be_padded_to_other_widths(wider: str) -> None:
    """What one head has beyond the other is no token: it takes no part on either side."""
    student_TD, teacher_TD = hidden()
    padded = linear(VOCABULARY + 9, 0)
    other = linear(VOCABULARY, 1)
    heads = (padded, other) if wider == "student" else (other, padded)
    loss = Loss(chunk_tokens=7)
    found = chunked_stats(student_TD, heads[0], teacher_TD, heads[1], sampled(), loss)
    student_TV, teacher_TV = heads[0](student_TD), heads[1](teacher_TD)
    cut = student_TV[:, :VOCABULARY], teacher_TV[:, :VOCABULARY]
    wanted = token_stats(*cut, sampled(), loss)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
