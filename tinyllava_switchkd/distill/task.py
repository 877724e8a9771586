"""The training task: a module that is called with a batch and returns named losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tinyllava_switchkd.constants import IGNORE_INDEX
from tinyllava_switchkd.distill.objective import CE
from tinyllava_switchkd.distill.trace import Positions, batch_images, placeholders, splice_batch, supervised_positions
from tinyllava_switchkd.model.splice import Spliced

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import Batch
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava


class Measure(NamedTuple):
    """Description of one number that a task reports.

    Attributes:
        title: for curves and documentation.
        of_batch: whether the number is a mean over the supervised tokens of its own batch, by which averages over a
            window weight it. Otherwise it is already divided by the step's count, and micro-batches and ranks are
            summed.
        weight: factor in the loss; None if it is not a term of the loss.
        per: unit of the mean, see `Task.counts`.
    """

    title: str
    of_batch: bool = False
    weight: float | None = None
    per: str = "supervised"


class Task(nn.Module):
    """Base class of training tasks.

    Called with a batch it returns named losses; "loss" is minimised and the others are logged.

    Args:
        student: the model to train.
        chunk_size: number of tokens whose logits exist at a time; None chooses it by the vocabulary.
        packing: concatenate the samples of a batch for the language models, so that no padding is computed. Useful with
            flash attention; other kernels compute (and mask) attention between samples.

    Raises:
        ValueError: the chunk size is below 1.
    """

    def __init__(self, student: TinyLlava, chunk_size: int | None = None, packing: bool = False) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, not {chunk_size}.")
        self.student = student
        self.chunk_size = chunk_size
        self.packing = packing
        self.recompute: bool | None = None  # of `TokenObjective`

    @property
    def config(self) -> TinyLlavaConfig:
        """The student's configuration (DeepSpeed's "auto" values read its hidden size)."""
        return self.student.config

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def models(self) -> tuple[TinyLlava, ...]:
        """All models that run in a step, the student first."""
        return (self.student,)

    @property
    def measures(self) -> dict[str, Measure]:
        """The numbers that the task reports, besides "loss" and "supervised_tokens"."""
        return {CE: Measure("cross-entropy", weight=1.0)}

    @property
    def units(self) -> tuple[str, ...]:
        """The `counts` that the task divides by."""
        return ("supervised",)

    def gradient_checkpointing_enable(self, **kwargs: object) -> None:
        self.student.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.student.gradient_checkpointing_disable()

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Counts by which sums are divided; a trainer adds them up over micro-batches and ranks.

        Returns:
            "supervised": tokens that are predicted and learned. "visual": visual tokens. "samples": samples with
            images. "images": images.
        """
        found = placeholders(batch)
        images = found.sum()
        return {
            # the first position of a sequence is never predicted, even if it is an image
            "supervised": (batch["labels"][:, 1:] != IGNORE_INDEX).sum(),
            "visual": images * self.student.num_image_tokens,
            "samples": found.any(1).sum(),
            "images": images,
        }

    def student_inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Spliced, Positions]:
        """The student's vision features, visual tokens, spliced batch and supervised positions."""
        features = self.student.vision_features(batch_images(batch, self.student))  # [images, patches, vision width]
        visual = self.student.connector(features)  # [images, visual tokens, width]
        spliced = splice_batch(self.student, batch, visual)
        return features, visual, spliced, supervised_positions(batch["input_ids"], spliced)
