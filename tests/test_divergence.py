"""`opcd.divergence` against a pure-Python reference of each token, and against the laws."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from opcd.config.training import ExactSupport, Loss, Sampled, TopK
from opcd.divergence import (
    ABSENT,
    Listed,
    listed_token_stats,
    restrict_listed,
    score_function,
    stats_and_gradient,
    support_ids,
    token_stats,
)

DIRECTIONS = ("reverse_kl", "forward_kl", "jsd")
SIDES = ("student", "teacher", "union")
TAILS = ("bucket", "renormalise", "drop")
CASES = [
    (direction, of, tail) for direction, of, tail in itertools.product(DIRECTIONS, SIDES, TAILS)
]


def logits(tokens: int = 5, vocabulary: int = 13, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's float64 logits, and sampled tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, vocabulary)
    student, teacher = 2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(0, vocabulary, (tokens,), generator=generator)


def slow_probs(row: list[float], temperature: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in row]
    return [weight / sum(weights) for weight in weights]


def slow_divergence(p: list[float], q: list[float], loss: Loss) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if loss.direction == "reverse_kl":
        return kl(p, q)
    if loss.direction == "forward_kl":
        return kl(q, p)
    beta = loss.jsd_beta
    m = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def slow_support(p: list[float], q: list[float], support: TopK) -> list[int]:
    def top(side: list[float]) -> set[int]:
        return set(sorted(range(len(side)), key=lambda i: -side[i])[: support.k])

    return sorted({"student": top(p), "teacher": top(q), "union": top(p) | top(q)}[support.of])


def slow_token(student: list[float], teacher: list[float], loss: Loss) -> float:
    p, q = (slow_probs(row, loss.temperature) for row in (student, teacher))
    if isinstance(loss.support, TopK):
        ids = slow_support(p, q, loss.support)
        inside = [[side[i] for i in ids] for side in (p, q)]
        rest = [[1 - sum(side)] for side in inside] if len(ids) < len(p) else [[], []]
        match loss.support.tail:
            case "bucket":
                inside = [side + other for side, other in zip(inside, rest, strict=True)]
            case "renormalise":
                inside = [[x / sum(side) for x in side] for side in inside]
        p, q = inside
    return slow_divergence(p, q, loss)


def slow(student: Tensor, teacher: Tensor, loss: Loss) -> Tensor:
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return torch.tensor([slow_token(s, t, loss) for s, t in rows], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_exact_equals_the_reference(direction: Any, temperature: float) -> None:
    student, teacher, response = logits()
    loss = Loss(direction=direction, temperature=temperature, jsd_beta=0.3)
    found = token_stats(student, teacher, response, loss).divergence_T
    torch.testing.assert_close(found, slow(student, teacher, loss), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("direction", "of", "tail"), CASES)
def test_top_k_equals_the_reference(direction: Any, of: Any, tail: Any) -> None:
    student, teacher, response = logits()
    support = TopK(k=4, of=of, tail=tail)
    loss = Loss(direction=direction, support=support, jsd_beta=0.3)
    found = token_stats(student, teacher, response, loss).divergence_T
    torch.testing.assert_close(found, slow(student, teacher, loss), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("direction", "of", "tail"), [*CASES, *((d, "", "") for d in DIRECTIONS)])
def test_gradients_are_those_of_the_values(direction: Any, of: Any, tail: Any) -> None:
    student, teacher, response = logits(tokens=3, vocabulary=7)
    support = TopK(k=3, of=of, tail=tail) if of else ExactSupport()
    loss = Loss(direction=direction, support=support, jsd_beta=0.3, temperature=0.8)
    student.requires_grad_()
    assert gradcheck(lambda s: token_stats(s, teacher, response, loss).divergence_T, student)


@st.composite
def sides(draw: Any) -> tuple[Tensor, Tensor]:
    """Logits of both sides, from nearly flat to very peaked."""
    vocabulary = draw(st.integers(2, 12))
    values = st.floats(-30, 30, width=32)
    rows = [draw(st.lists(values, min_size=vocabulary, max_size=vocabulary)) for _ in range(2)]
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in rows)
    return student, teacher


def value(student: Tensor, teacher: Tensor, **loss: Any) -> float:
    response = torch.zeros(len(student), dtype=torch.long)
    return token_stats(student, teacher, response, Loss(**loss)).divergence_T.sum().item()


@settings(max_examples=60)
@given(sides(), st.sampled_from(DIRECTIONS), st.sampled_from(SIDES), st.data())
def test_laws_of_a_divergence(pair: Any, direction: Any, of: Any, data: Any) -> None:
    """Never negative, zero on itself; a bucket only lowers it, and k = V changes nothing."""
    student, teacher = pair
    vocabulary = student.shape[-1]
    exact = value(student, teacher, direction=direction)
    assert exact >= -1e-7
    assert abs(value(student, student, direction=direction)) < 1e-7
    support = TopK(k=data.draw(st.integers(1, vocabulary)), of=of, tail="bucket")
    bucket = value(student, teacher, direction=direction, support=support)
    assert -1e-9 <= bucket <= exact + 1e-9
    for tail in TAILS:
        whole = TopK(k=vocabulary, of=of, tail=tail)
        found = value(student, teacher, direction=direction, support=whole)
        assert found == pytest.approx(exact, abs=1e-9, rel=1e-9)


@settings(max_examples=60)
@given(sides(), st.floats(0.25, 4.0), st.sampled_from(DIRECTIONS))
def test_temperature_divides_both_sides_logits(pair: Any, heat: float, direction: Any) -> None:
    student, teacher = pair
    found = value(student, teacher, direction=direction, temperature=heat)
    wanted = value(student / heat, teacher / heat, direction=direction)
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@settings(max_examples=60)
@given(sides())
def test_jsd_is_symmetric_and_bounded(pair: Any) -> None:
    student, teacher = pair
    found = value(student, teacher, direction="jsd")
    assert found == pytest.approx(value(teacher, student, direction="jsd"), abs=1e-9)
    assert found <= math.log(2) + 1e-7


def test_jsd_of_float64_logits_has_float64_precision() -> None:
    student, teacher, response = logits()
    loss = Loss(direction="jsd", jsd_beta=0.3)
    found = token_stats(student, teacher, response, loss).divergence_T
    torch.testing.assert_close(found, slow(student, teacher, loss), rtol=1e-12, atol=1e-13)


def test_drop_is_no_divergence() -> None:
    """A student that drains its top-k mass gets below zero: why `drop` is never the default."""
    student = torch.tensor([[0.2, 0.1, 5.0, 5.1]]).double().log()
    teacher = torch.tensor([[4.0, 4.0, 1.0, 2.0]]).double().log()
    support = TopK(k=2, of="teacher", tail="drop")
    assert value(student, teacher, support=support) < -0.05
    assert value(student, teacher, support=TopK(k=2, of="teacher")) > 0


def test_score_function_has_the_reverse_kl_as_expected_gradient() -> None:
    """Summed over all tokens by their probability; the bare log-ratio's is nothing but zero."""
    student, teacher, response = logits(tokens=1, vocabulary=9)
    student.requires_grad_()
    exact = token_stats(student, teacher, response, Loss()).divergence_T.sum()
    (wanted,) = torch.autograd.grad(exact, student)
    probs = student.detach().softmax(-1)[0]
    found, bare = torch.zeros_like(student), torch.zeros_like(student)
    mean = 0.0
    for token in range(9):
        taken = torch.tensor([token])
        one = token_stats(student, teacher, taken, Loss(support=Sampled())).divergence_T.sum()
        found += probs[token] * torch.autograd.grad(one, student)[0]
        mean += probs[token].item() * one.item()
        ratio = student.log_softmax(-1)[0, token] - teacher.log_softmax(-1)[0, token]
        bare += probs[token] * torch.autograd.grad(ratio, student)[0]
        assert one.item() == pytest.approx(ratio.item(), rel=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert mean == pytest.approx(exact.item(), rel=1e-9)
    assert bare.abs().max() < 1e-12 < wanted.abs().max()


def test_score_function_gradient_is_the_advantage_times_the_score() -> None:
    student, teacher, response = logits()
    log_probs = student.log_softmax(-1).detach().requires_grad_()
    value_C = score_function(log_probs, teacher.log_softmax(-1), response)
    (found,) = torch.autograd.grad(value_C.sum(), log_probs)
    wanted = torch.zeros_like(found).scatter(-1, response.unsqueeze(-1), value_C.unsqueeze(-1))
    torch.testing.assert_close(found, wanted.detach())


@pytest.mark.parametrize("of", SIDES)
def test_diagnostics_are_exact_whatever_the_loss(of: Any) -> None:
    student, teacher, response = logits()
    support = TopK(k=3, of=of)
    loss = Loss(direction="forward_kl", support=support, temperature=0.7)
    stats = token_stats(student, teacher, response, loss)
    exact = Loss(temperature=0.7)
    torch.testing.assert_close(stats.kl_T, slow(student, teacher, exact))
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        p, q = slow_probs(s, 0.7), slow_probs(t, 0.7)
        ids = slow_support(p, q, support)
        assert stats.entropy_T[row].item() == pytest.approx(-sum(x * math.log(x) for x in p))
        assert stats.student_mass_T[row].item() == pytest.approx(sum(p[i] for i in ids))
        assert stats.teacher_mass_T[row].item() == pytest.approx(sum(q[i] for i in ids))


@pytest.mark.parametrize("support", [ExactSupport(), Sampled()])
def test_mass_is_one_where_nothing_is_left_out(support: Any) -> None:
    stats = token_stats(*logits(), Loss(support=support))
    assert stats.student_mass_T.tolist() == stats.teacher_mass_T.tolist() == [1.0] * 5


@pytest.mark.parametrize("support", [ExactSupport(), Sampled(), TopK(k=3, of="union")])
def test_only_the_divergence_carries_a_gradient_and_only_to_the_student(support: Any) -> None:
    student, teacher, response = logits()
    student.requires_grad_()
    teacher.requires_grad_()
    stats = token_stats(student, teacher, response, Loss(support=support))
    assert [column.requires_grad for column in stats] == [True] + [False] * 5
    stats.divergence_T.sum().backward()
    assert student.grad is not None and student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("support", [ExactSupport(), TopK(k=3)])
def test_bfloat16_logits_are_computed_in_float32(support: Any) -> None:
    student, teacher, response = logits(vocabulary=200)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    stats = token_stats(student, teacher, response, Loss(support=support))
    wanted = token_stats(student.double(), teacher.double(), response, Loss(support=support))
    for found, reference in zip(stats, wanted, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)


def test_a_tail_too_small_for_one_minus_the_sum_is_kept() -> None:
    """The bucket comes from the complement: 1 - sum(p) in float32 would round 1e-9 to nothing."""
    student = torch.tensor([[0.0, -20.0]])
    teacher = torch.tensor([[0.0, -2.0]])
    found = value(student, teacher, direction="forward_kl", support=TopK(k=1))
    wanted = slow(student.double(), teacher.double(), Loss(direction="forward_kl"))
    assert found == pytest.approx(wanted.item(), rel=1e-3)


def test_k_larger_than_the_vocabulary_names_key_and_way_out() -> None:
    student, teacher, _ = logits()
    with pytest.raises(ValueError, match=r"loss\.support\.k = 14 .*vocabulary of 13.*lower it"):
        support_ids(student, teacher, TopK(k=14))


def listed(teacher: Tensor, k: int, response: Tensor) -> Listed:
    """What a server tells of a teacher: its k likeliest, and the sampled token."""
    own = teacher.log_softmax(-1)
    top = own.topk(k)
    return Listed(top.indices, top.values, own.gather(-1, response.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
@pytest.mark.parametrize("direction", ["reverse_kl", "forward_kl", "jsd"])
def test_a_list_gives_what_the_whole_teacher_would(direction: Any, tail: Any) -> None:
    student, teacher, response = logits()
    student.requires_grad_()
    loss = Loss(direction=direction, support=TopK(k=3, of="teacher", tail=tail))
    whole = token_stats(student, teacher, response, loss)
    known = listed_token_stats(student, listed(teacher, 3, response), response, loss)
    for name in ("divergence_T", "entropy_T", "student_mass_T", "teacher_mass_T", "log_prob_T"):
        torch.testing.assert_close(getattr(known, name), getattr(whole, name), msg=name)
    gradients = [
        torch.autograd.grad(s.divergence_T.sum(), student, retain_graph=True)[0]
        for s in (whole, known)
    ]
    torch.testing.assert_close(*gradients)


def test_the_kl_of_a_list_is_its_bucketed_sum() -> None:
    student, teacher, response = logits()
    p, q = student.softmax(-1), teacher.softmax(-1)
    found = listed_token_stats(student, listed(teacher, 2, response), response, Loss()).kl_T
    for row in range(len(p)):
        inside = q[row].topk(2).indices
        rest = [side[row].sum() - side[row, inside].sum() for side in (p, q)]
        classes = [*zip(p[row, inside], q[row, inside], strict=True), rest]
        wanted = sum((ours * (ours / theirs).log()).item() for ours, theirs in classes)
        assert found[row].item() == pytest.approx(wanted)


def test_a_shorter_list_is_filled_up_with_nothing() -> None:
    """Places without a token have no mass on either side, whatever stands in them."""
    student, teacher, response = logits()
    short = listed(teacher, 2, response)
    filled = Listed(
        torch.cat([short.ids_TK, torch.full((5, 1), -1)], -1),
        torch.cat([short.log_probs_TK, torch.full((5, 1), ABSENT).to(teacher)], -1),
        short.sampled_T,
    )
    for direction in ("reverse_kl", "forward_kl"):
        loss = Loss(direction=direction)
        wanted = listed_token_stats(student, short, response, loss).divergence_T
        found = listed_token_stats(student, filled, response, loss).divergence_T
        torch.testing.assert_close(found, wanted)


def test_a_list_that_has_all_of_the_mass_leaves_a_finite_rest() -> None:
    """Rounded probabilities may add up to more than 1."""
    log_probs = torch.tensor([[0.5, 0.5 + 1e-6]]).log()
    assert restrict_listed(log_probs, "bucket")[0, -1].item() == pytest.approx(math.log(1e-7))


def test_log_probabilities_of_sampled_tokens_are_those_of_temperature_one() -> None:
    student, teacher, response = logits()
    stats = token_stats(student, teacher, response, Loss(temperature=2.0))
    wanted = student.log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(stats.log_prob_T, wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("support", [ExactSupport(), TopK(k=4)], ids=["exact", "top_k"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_in_closed_form_are_those_of_autograd(
    direction: Any, support: Any, temperature: float
) -> None:
    """And all statistics are the same; the logits themselves are left as they were."""
    loss = Loss(direction=direction, support=support, temperature=temperature)
    student, teacher, response = logits(seed=3)
    leaf = student.clone().requires_grad_()
    wanted = token_stats(leaf, teacher, response, loss)
    (gradient,) = torch.autograd.grad(wanted.divergence_T.sum(), leaf)
    before = student.clone(), teacher.clone()
    found, closed = stats_and_gradient(student, teacher, response, loss)
    torch.testing.assert_close(closed, gradient)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.detach())
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("direction", DIRECTIONS[:2])
def test_autocast_does_not_round_a_closed_form(direction: Any) -> None:
    """A run's forward pass is under it, and its losses are float32 all the same."""
    student, teacher, response = (part.float() for part in logits(seed=4))
    loss = Loss(direction=direction)
    wanted, _ = stats_and_gradient(student, teacher, response.long(), loss)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradient = stats_and_gradient(student, teacher, response.long(), loss)
    assert gradient.dtype == torch.float32
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
