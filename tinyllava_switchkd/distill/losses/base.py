"""The base class of the distillation losses, and their registry.

This file needs torch, `knee.py` for the type of an order, and the project's `Registry` (two lines to replace in another
project).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyllava_switchkd.registry import Registry

from .knee import Order

LossFactory: Registry[type[LogitLoss]] = Registry("distillation loss")
"""`LossFactory(name)(temperature=3.0, ...)(student_logits, teacher_logits) -> [tokens]`."""

register_loss = LossFactory.register


class LogitLoss(nn.Module):
    """Base class of losses between two sides' logits.

    A subclass defines `forward`. A loss that ranks logits also defines `order`, so that the teacher's logits are ranked
    only once if several students are compared with them, as in Switch-KD.

    The settings of a loss are the keyword arguments of its `__init__`, each with a type and a default. Its docstring
    describes each in one sentence under `Args:`. Command-line flags and the docs are made from these.

    Args:
        temperature: Tau, by which logits or their differences are divided; a positive number.

    Raises:
        ValueError: the temperature is not a positive number.
    """

    def __init__(self, temperature: float = 3.0) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"The distillation temperature must be a positive, finite number, not {temperature}.")
        self.temperature = float(temperature)

    def order(self, logits: Tensor) -> Order | None:
        """The logits that the loss compares when this side leads, in order.

        Args:
            logits: [tokens, vocab], the leader's.

        Returns:
            the order; None if the loss has no leader.
        """
        return None

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        student_order: Order | None = None,
        teacher_order: Order | None = None,
    ) -> Tensor:
        """Loss of every token.

        Args:
            student_logits: [tokens, vocab]; only these get gradients.
            teacher_logits: [tokens, vocab], the same vocabulary.
            student_order: `order(student_logits)`, if already known.
            teacher_order: `order(teacher_logits)`, if already known.

        Returns:
            [tokens], float32 (float64 for float64 logits), never negative except by rounding.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward.")

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"


def both_sides(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher logits in a common dtype, at least float32; the teacher's are detached.

    Raises:
        ValueError: the two are not matrices of the same shape.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise ValueError(
            f"Student and teacher logits must both be [tokens, vocab], not {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; slice unequal vocabularies to the shared one first."
        )
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    return student_logits.to(dtype), teacher_logits.detach().to(dtype)
