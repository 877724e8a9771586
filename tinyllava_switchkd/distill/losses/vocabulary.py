"""Losses between the softmaxes of both sides over the whole vocabulary.

p is the teacher's softmax and q the student's, both at tau and without the customary factor tau^2. All sums are in
float32 at least. Logarithms are computed directly and not from probabilities, which may underflow. Gradients are
autograd's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import LogitLoss, both_sides, register_loss
from .knee import Order, finite


class VocabularyLoss(LogitLoss):
    """Base class of losses between log-softmaxes; a subclass defines `between`."""

    def between(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """The loss [tokens] of the student's and the teacher's log-probabilities [tokens, vocab]."""
        raise NotImplementedError(f"{type(self).__name__} must define between.")

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        student_order: Order | None = None,
        teacher_order: Order | None = None,
    ) -> Tensor:
        sides = (finite(side) for side in both_sides(student_logits, teacher_logits))
        return self.between(*((side / self.temperature).log_softmax(-1) for side in sides))


@register_loss("fkl")
class ForwardKL(VocabularyLoss):
    """KL(p || q) over the vocabulary (Switch-KD Table 4, FKL).

    Args:
        temperature: Tau, by which logits are divided; a positive number.
    """

    def between(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return _kl(log_p, log_q)


@register_loss("rkl")
class ReverseKL(VocabularyLoss):
    """KL(q || p) over the vocabulary (Switch-KD Table 4, RKL).

    Args:
        temperature: Tau, by which logits are divided; a positive number.
    """

    def between(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return _kl(log_q, log_p)


@register_loss("jsd")
class GeneralizedJSD(VocabularyLoss):
    """Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q.

    Divided by beta it tends to KL(p || q) as beta goes to 0; divided by 1 - beta it tends to KL(q || p) as beta goes to
    1 (GKD, arXiv 2306.13649).

    Args:
        temperature: Tau, by which logits are divided; a positive number.
        beta: The teacher's share of the mixture with which both sides are compared, between 0 and 1.
    """

    def __init__(self, temperature: float = 3.0, beta: float = 0.5) -> None:
        super().__init__(temperature)
        if not 0 < beta < 1:
            raise ValueError(f"beta must be between 0 and 1 (at either end the loss is 0), not {beta}.")
        self.beta = float(beta)

    def between(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        log_m = _mixture(log_p, log_q, self.beta)
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta:g}"


class SkewKL(VocabularyLoss):
    """Base class of skew KLs, which mix some of the first distribution into the second (DistiLLM, arXiv 2402.03898).

    Args:
        temperature: Tau, by which logits are divided; a positive number.
        alpha: The share of the first distribution in the mixture, from 0 (plain KL) to below 1.
    """

    def __init__(self, temperature: float = 3.0, alpha: float = 0.1) -> None:
        super().__init__(temperature)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be at least 0 and below 1 (at 1 the loss is 0), not {alpha}.")
        self.alpha = float(alpha)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:g}"


@register_loss("skew_fkl")
class SkewForwardKL(SkewKL):
    """KL(p || alpha p + (1 - alpha) q): forward KL that stays finite if the student's probability is 0.

    Args:
        temperature: Tau, by which logits are divided; a positive number.
        alpha: The teacher's share of the mixture with which the teacher is compared, from 0 (fkl) to below 1.
    """

    def between(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return _kl(log_p, _mixture(log_p, log_q, self.alpha))


@register_loss("skew_rkl")
class SkewReverseKL(SkewKL):
    """KL(q || alpha q + (1 - alpha) p): reverse KL that stays finite if the teacher's probability is 0.

    Args:
        temperature: Tau, by which logits are divided; a positive number.
        alpha: The student's share of the mixture with which the student is compared, from 0 (rkl) to below 1.
    """

    def between(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return _kl(log_q, _mixture(log_q, log_p, self.alpha))


@register_loss("tvd")
class TotalVariation(VocabularyLoss):
    """Total variation distance: half the sum of |p - q|, between 0 and 1.

    Args:
        temperature: Tau, by which logits are divided; a positive number.
    """

    def between(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) [tokens] of log-probabilities [tokens, vocab]."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b) of log-probabilities."""
    if share == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
