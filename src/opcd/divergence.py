"""How far student and teacher are apart at each response token, in nats.

With p the student's and q the teacher's distribution over the next token:

    reverse_kl  KL(p || q) = sum p (log p - log q)         mode-seeking; the paper's loss
    forward_kl  KL(q || p) = sum q (log q - log p)         mass-covering
    jsd         b KL(q || m) + (1 - b) KL(p || m),  m = b q + (1 - b) p

each over the whole vocabulary, over k tokens with a policy for the rest of the mass, or as a
score-function estimate from the sampled token. Pure functions of logits; everything is computed
in float32 at least. Nothing is averaged here: the trainer divides once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from opcd.config.training import Direction, ExactSupport, Loss, Sampled, TopK

# Log-probability of a class that is not there: exp() of it is 0 in every dtype, and unlike -inf
# it gives 0 * (x - x) = 0 rather than nan, in the value and in the gradient.
ABSENT = -1e4
MIN_REST = 1e-7
"""The least probability that is taken to lie outside a list."""


class TokenStats(NamedTuple):
    """What is known about each response token; only `divergence_T` carries a gradient."""

    divergence_T: Tensor
    """The loss of the token, in nats."""
    kl_T: Tensor
    """Exact reverse KL at the loss's temperature, in nats, whatever the loss is; of a teacher that
    is known by a list of tokens, over those and one class for the rest, which is less."""
    entropy_T: Tensor
    """The student's entropy, in nats."""
    student_mass_T: Tensor
    """Student's probability inside the loss's support (1 for exact and sampled)."""
    teacher_mass_T: Tensor
    """Teacher's probability inside the loss's support."""
    log_prob_T: Tensor
    """The student's log-probability of the sampled token, at temperature 1."""


class Listed(NamedTuple):
    """What is known of a teacher that is far away: some tokens' log-probabilities."""

    ids_TK: Tensor
    """Tokens of each position; -1 where there are fewer."""
    log_probs_TK: Tensor
    """Theirs, at temperature 1; `ABSENT` where there are fewer."""
    sampled_T: Tensor
    """That of the sampled token, which need not be among them."""


def token_stats(
    student_logits_CV: Tensor, teacher_logits_CV: Tensor, response_C: Tensor, loss: Loss
) -> TokenStats:
    """Divergence and diagnostics for each token.

    Args:
        student_logits_CV: the student's logits.
        teacher_logits_CV: the teacher's logits for the same positions.
        response_C: the token that was sampled at each position.
        loss: direction, support, tail and temperature.
    """
    student_CV = _log_probs(student_logits_CV, loss.temperature)
    teacher_CV = _log_probs(teacher_logits_CV, loss.temperature).detach()
    ids_CK = None
    if isinstance(loss.support, TopK):
        ids_CK = support_ids(student_CV.detach(), teacher_CV, loss.support)
    with torch.no_grad():
        ones_C = torch.ones_like(response_C, dtype=student_CV.dtype)
        probs_CV = student_CV.exp()
        diagnostics = (
            (probs_CV * (student_CV - teacher_CV)).sum(-1),
            -(probs_CV * student_CV).sum(-1),
            ones_C if ids_CK is None else _gather(student_CV, ids_CK).exp().sum(-1),
            ones_C if ids_CK is None else _gather(teacher_CV, ids_CK).exp().sum(-1),
            log_prob_of(student_logits_CV, response_C),
        )
    return TokenStats(_loss(student_CV, teacher_CV, response_C, ids_CK, loss), *diagnostics)


def listed_token_stats(
    student_logits_CV: Tensor, teacher: Listed, response_C: Tensor, loss: Loss
) -> TokenStats:
    """The same against a teacher of which only a list of tokens is known.

    The list is the support; where the loss would have the whole vocabulary, the rest of it is one
    class (a bucket), so that the value is a lower bound.

    Args:
        student_logits_CV: the student's logits.
        teacher: what is known of the same positions.
        response_C: the token that was sampled at each position.
        loss: direction and tail; its temperature is 1.
    """
    assert loss.temperature == 1.0, "log-probabilities from afar are those of temperature 1"
    student_CV, ids_CK = _log_probs(student_logits_CV, 1.0), teacher.ids_TK
    listed_CK = teacher.log_probs_TK.to(student_CV)
    bucketed = restrict(student_CV, ids_CK, "bucket"), restrict_listed(listed_CK, "bucket")
    student_C = _taken(student_CV, response_C)
    if isinstance(loss.support, Sampled):
        loss_C = _advantage(student_C, teacher.sampled_T.to(student_CV))
    else:
        tail = loss.support.tail if isinstance(loss.support, TopK) else "bucket"
        restricted = restrict(student_CV, ids_CK, tail), restrict_listed(listed_CK, tail)
        loss_C = divergence(*restricted, loss.direction, loss.jsd_beta)
    with torch.no_grad():
        diagnostics = (
            _kl(*bucketed),
            -(student_CV.exp() * student_CV).sum(-1),
            _gather(student_CV, ids_CK).exp().sum(-1),
            listed_CK.exp().sum(-1),
            student_C.detach(),
        )
    return TokenStats(loss_C, *diagnostics)


def log_prob_of(logits_CV: Tensor, tokens_C: Tensor) -> Tensor:
    """Each token's log-probability at temperature 1."""
    return _taken(_log_probs(logits_CV, 1.0), tokens_C)


def stats_and_gradient(
    student_logits_CV: Tensor, teacher_logits_CV: Tensor, response_C: Tensor, loss: Loss
) -> tuple[TokenStats, Tensor]:
    """The same without a graph, and the gradient of each token's divergence, `_CV`.

    Both KL over the whole vocabulary have one in closed form, which needs a third of autograd's
    passes over `[C, V]`:

        reverse_kl  p (log p - log q - KL)        forward_kl  p - q
    """
    if not isinstance(loss.support, ExactSupport) or loss.direction == "jsd":
        return stats_by_autograd(
            lambda leaf_CV: token_stats(leaf_CV, teacher_logits_CV, response_C, loss),
            student_logits_CV,
        )
    student_CV = _log_probs(student_logits_CV.detach(), loss.temperature)
    teacher_CV = _log_probs(teacher_logits_CV.detach(), loss.temperature)
    if loss.temperature == 1.0:
        log_prob_C = _taken(student_CV, response_C)
    else:
        log_prob_C = log_prob_of(student_logits_CV.detach(), response_C)
    probs_CV = student_CV.exp()
    entropy_C = -_dot(probs_CV, student_CV)
    log_ratio_CV = student_CV.sub_(teacher_CV)
    kl_C = _dot(probs_CV, log_ratio_CV)
    if loss.direction == "reverse_kl":
        value_C = kl_C
        gradient_CV = log_ratio_CV.sub_(kl_C.unsqueeze(-1)).mul_(probs_CV)
    else:
        teacher_probs_CV = teacher_CV.exp_()
        value_C = -_dot(teacher_probs_CV, log_ratio_CV)
        gradient_CV = probs_CV.sub_(teacher_probs_CV)
    if loss.temperature != 1.0:
        gradient_CV /= loss.temperature
    ones_C = torch.ones_like(kl_C)
    return TokenStats(value_C, kl_C, entropy_C, ones_C, ones_C, log_prob_C), gradient_CV


def stats_by_autograd(
    score: Callable[[Tensor], TokenStats], student_logits_CV: Tensor
) -> tuple[TokenStats, Tensor]:
    """What `score` makes of logits, without a graph, and the gradient of each divergence, `_CV`."""
    with torch.enable_grad():
        leaf_CV = student_logits_CV.detach().requires_grad_()
        stats = score(leaf_CV)
        (gradient_CV,) = torch.autograd.grad(stats.divergence_T.sum(), leaf_CV)
    return TokenStats(*(column.detach() for column in stats)), gradient_CV


def divergence(
    student_CK: Tensor, teacher_CK: Tensor, direction: Direction, jsd_beta: float = 0.5
) -> Tensor:
    """The divergence of two sets of log-probabilities over the same K classes, `_C`, in nats."""
    match direction:
        case "reverse_kl":
            return _kl(student_CK, teacher_CK)
        case "forward_kl":
            return _kl(teacher_CK, student_CK)
        case "jsd":
            log_beta, log_rest = math.log(jsd_beta), math.log1p(-jsd_beta)
            mixture_CK = torch.logaddexp(teacher_CK + log_beta, student_CK + log_rest)
            teacher_C, student_C = _kl(teacher_CK, mixture_CK), _kl(student_CK, mixture_CK)
            return jsd_beta * teacher_C + (1.0 - jsd_beta) * student_C


def support_ids(student_CV: Tensor, teacher_CV: Tensor, support: TopK) -> Tensor:
    """The token ids of a top-k support, `_CK`; -1 where a union has an id already.

    Raises:
        ValueError: k is larger than the vocabulary.
    """
    vocabulary = student_CV.shape[-1]
    if support.k > vocabulary:
        raise ValueError(
            f"loss.support.k = {support.k} is larger than the vocabulary of {vocabulary} tokens; "
            'lower it, or write loss.support = {type = "exact"}'
        )
    student_ids_CK = student_CV.topk(support.k).indices
    if support.of == "student":
        return student_ids_CK
    teacher_ids_CK = teacher_CV.topk(support.k).indices
    if support.of == "teacher":
        return teacher_ids_CK
    inside_CV = torch.zeros_like(student_CV, dtype=torch.bool).scatter_(-1, student_ids_CK, True)
    repeated_CK = inside_CV.gather(-1, teacher_ids_CK)
    return torch.cat([student_ids_CK, teacher_ids_CK.masked_fill(repeated_CK, -1)], dim=-1)


def restrict(log_probs_CV: Tensor, ids_CK: Tensor, tail: str) -> Tensor:
    """Log-probabilities over a support, and what its tail policy makes of the rest.

    `bucket` appends one class with the rest of the mass, which by the log-sum inequality can
    only lower a KL; `renormalise` divides by the mass inside; `drop` leaves sums below 1, so
    that what comes of it is no divergence.
    """
    inside_CK = _gather(log_probs_CV, ids_CK)
    if tail == "renormalise":
        return inside_CK - inside_CK.logsumexp(-1, keepdim=True)
    if tail == "drop":
        return inside_CK
    # From the complement itself: 1 - sum(p) would lose a small tail to rounding.
    outside_CV = _remove(log_probs_CV, ids_CK)
    return torch.cat([inside_CK, outside_CV.logsumexp(-1, keepdim=True)], dim=-1)


def restrict_listed(log_probs_CK: Tensor, tail: str) -> Tensor:
    """The same of log-probabilities of which the rest is not known, but from what they leave."""
    if tail == "renormalise":
        return log_probs_CK - log_probs_CK.logsumexp(-1, keepdim=True)
    if tail == "drop":
        return log_probs_CK
    precise = torch.float32 if log_probs_CK.device.type == "mps" else torch.float64
    inside_C1 = log_probs_CK.to(precise).exp().sum(-1, keepdim=True)
    # Sums of float32 probabilities miss 1 by as much, so no rest is known to be smaller.
    rest_C1 = (1.0 - inside_C1).clamp(min=MIN_REST).log()
    return torch.cat([log_probs_CK, rest_C1.to(log_probs_CK)], dim=-1)


def score_function(student_CV: Tensor, teacher_CV: Tensor, response_C: Tensor) -> Tensor:
    """Reverse KL estimated from the sampled token: value log p/q, gradient (log p/q) grad log p.

    The bare log-ratio must not be differentiated: its expected gradient is zero, since
    E_p[grad log p] = 0.
    """
    return _advantage(_taken(student_CV, response_C), _taken(teacher_CV, response_C))


def _advantage(student_C: Tensor, teacher_C: Tensor) -> Tensor:
    advantage_C = student_C.detach() - teacher_C
    return advantage_C * (1.0 + student_C - student_C.detach())


def _loss(
    student_CV: Tensor, teacher_CV: Tensor, response_C: Tensor, ids_CK: Tensor | None, loss: Loss
) -> Tensor:
    match loss.support:
        case ExactSupport():
            return divergence(student_CV, teacher_CV, loss.direction, loss.jsd_beta)
        case Sampled():
            return score_function(student_CV, teacher_CV, response_C)
        case TopK(tail=tail):
            assert ids_CK is not None, "a top-k support has ids"
            student_CK = restrict(student_CV, ids_CK, tail)
            teacher_CK = restrict(teacher_CV, ids_CK, tail)
            return divergence(student_CK, teacher_CK, loss.direction, loss.jsd_beta)


def _log_probs(logits_CV: Tensor, temperature: float) -> Tensor:
    if logits_CV.dtype != torch.float64:
        logits_CV = logits_CV.float()
    return log_softmax(logits_CV if temperature == 1.0 else logits_CV / temperature, dim=-1)


def _taken(log_probs_CV: Tensor, tokens_C: Tensor) -> Tensor:
    return log_probs_CV.gather(-1, tokens_C.unsqueeze(-1)).squeeze(-1)


def _dot(left_CV: Tensor, right_CV: Tensor) -> Tensor:
    # Not by torch.linalg.vecdot, which autocast would round to bfloat16.
    return (left_CV * right_CV).sum(-1)


def _kl(p_CK: Tensor, q_CK: Tensor) -> Tensor:
    return (p_CK.exp() * (p_CK - q_CK)).sum(-1)


def _gather(log_probs_CV: Tensor, ids_CK: Tensor) -> Tensor:
    return log_probs_CV.gather(-1, ids_CK.clamp(min=0)).masked_fill(ids_CK < 0, ABSENT)


def _remove(log_probs_CV: Tensor, ids_CK: Tensor) -> Tensor:
    # A repeated id of a union removes the row's first id once more, which changes nothing.
    real_CK = torch.where(ids_CK < 0, ids_CK[..., :1], ids_CK)
    return log_probs_CV.scatter(-1, real_CK, ABSENT)
