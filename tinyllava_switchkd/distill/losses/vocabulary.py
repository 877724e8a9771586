"""Losses between the softmaxes of two sides over the whole vocabulary."""

from __future__ import annotations

from torch import Tensor

from .base import LogitLoss, both_sides, register_loss
from .knee import Order, finite


class FullVocabularyKL(LogitLoss):
    """KL between the two softmaxes at tau over the whole vocabulary, without the customary tau^2 factor."""

    reverse: bool

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        student_order: Order | None = None,
        teacher_order: Order | None = None,
    ) -> Tensor:
        student, teacher = (finite(side) for side in both_sides(student_logits, teacher_logits))
        student = (student / self.temperature).log_softmax(-1)
        teacher = (teacher / self.temperature).log_softmax(-1)
        q, p = (student, teacher) if self.reverse else (teacher, student)
        return (q.exp() * (q - p)).sum(-1)


@register_loss("fkl")
class ForwardKL(FullVocabularyKL):
    """KL(teacher || student) over the vocabulary (Table 4, FKL)."""

    reverse = False


@register_loss("rkl")
class ReverseKL(FullVocabularyKL):
    """KL(student || teacher) over the vocabulary (Table 4, RKL)."""

    reverse = True
