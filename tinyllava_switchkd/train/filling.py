"""``--fill_teacher_cache``: all ranks run the teacher once over every sample before training starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tinyllava_switchkd.data.collator import DataCollatorForSupervisedDataset, on_device
from tinyllava_switchkd.distill import TeacherCache
from tinyllava_switchkd.distill.teacher import FrozenTeacher
from tinyllava_switchkd.distill.teacher_cache import fill
from tinyllava_switchkd.train.command_line.arguments import TrainingArguments
from tinyllava_switchkd.train.reliability import signals
from tinyllava_switchkd.train.reliability.checkpoints import CheckpointError
from tinyllava_switchkd.train.validation import Subset

if TYPE_CHECKING:
    from tinyllava_switchkd.data.dataset import Samples
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

REPORTS = 10
"""How many times the main process reports progress per data set."""


@dataclass
class Filling:
    """A teacher cache that is ready to be filled.

    Attributes:
        cache: the cache.
        teacher: the whole teacher, on each rank.
        data: the training and held-out data sets.
        collator: makes batches with digests.
        training: gives the batch size, the workers, the precision and packing.
    """

    cache: TeacherCache
    teacher: TinyLlava
    data: Sequence[Samples]
    collator: DataCollatorForSupervisedDataset
    training: TrainingArguments

    def __call__(self) -> None:
        """Fill the cache, each rank with its share of the samples; cached samples are not computed again.

        Raises:
            SampleError: a sample cannot be read.
            CheckpointError: the cache cannot be written; what was written before is kept.
            InterruptedRunError: a signal stopped the filling; what was computed is kept.
        """
        teacher = FrozenTeacher(self.teacher)
        for dataset in self.data:
            self._fill(teacher, dataset)
        self.cache.sync()
        self._check_written()
        if dist.is_initialized():
            dist.barrier()
            self.cache.sync()
        logger.info("The teacher cache %s holds %d samples.", self.cache.folder, len(self.cache))

    def release(self) -> None:
        """Does nothing: filling holds no output folder."""

    def resume_hint(self) -> str:
        """What the user can continue from if the filling ends now."""
        return f"the same command continues with what {self.cache.folder} holds"

    def _check_written(self) -> None:
        if self.cache.unwritten is not None:
            raise CheckpointError(
                f"The teacher cache could not be written ({self.cache.unwritten}); it holds {len(self.cache)} samples. "
                f"Make room and run the same command again; it continues from there."
            )

    def _fill(self, teacher: FrozenTeacher, dataset: Samples) -> None:
        training = self.training
        lengths = dataset.lengths  # batches of similar lengths have little padding
        longest_first = sorted(range(len(dataset)), key=lambda index: -lengths[index])
        share = longest_first[training.process_index :: training.world_size]
        loader = DataLoader(
            Subset(dataset, share),
            batch_size=training.per_device_train_batch_size,
            collate_fn=self.collator,
            num_workers=training.dataloader_num_workers,
        )
        device, dtype = training.device, training.compute_dtype
        half = dtype != torch.float32 and not training.deepspeed  # as the trainer computes
        for number, batch in enumerate(loader):
            if signals.received():
                self.cache.sync()
                raise signals.InterruptedRunError(
                    f"{signals.received()} stopped the filling of {self.cache.folder}; what was computed is kept, and "
                    f"the same command continues."
                )
            with torch.autocast(device.type, dtype) if half else nullcontext():
                fill(self.cache, teacher, on_device(batch, device), training.packing)
            self._check_written()
            if number * REPORTS // len(loader) != (number + 1) * REPORTS // len(loader):
                logger.info("The teacher has read %d of %d batches.", number + 1, len(loader))
