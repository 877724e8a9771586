"""Supervised training: cross-entropy through the same interface as distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinyllava_switchkd.distill.objective import CE, TokenObjective, Tokens
from tinyllava_switchkd.distill.task import Task
from tinyllava_switchkd.distill.trace import look

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import Batch


class SupervisedTask(Task):
    """Pre-training or supervised fine-tuning of a TinyLLaVA. The arguments are those of `Task`."""

    def forward(
        self,
        batch: Batch,
        num_items_in_batch: Tensor | int | None = None,
        step_counts: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch. The arguments are those of `Distiller.forward`; `step_counts` is not used.

        Returns:
            "loss" with gradient; "ce" and "supervised_tokens" without.
        """
        _, _, spliced, positions = self.student_inputs(batch)
        view = look(self.student, spliced, positions, packing=self.packing)
        head = self.student.language_model.get_output_embeddings()
        objective = TokenObjective(head, chunk_size=self.chunk_size, recompute=self.recompute)
        total, (ce,) = objective(Tokens(view.hidden, positions.labels))
        tokens = len(positions.labels)
        divisor = max(tokens, 1) if num_items_in_batch is None else num_items_in_batch
        return {
            "loss": total / divisor,
            CE: ce / divisor,
            "supervised_tokens": torch.tensor(tokens, device=total.device),
        }
