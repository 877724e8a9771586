"""Held-out data during training: which samples are held out, and the mean losses and measures over them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tinyllava_switchkd.data.collator import without_lesson
from tinyllava_switchkd.distill import Task

if TYPE_CHECKING:
    from transformers import Trainer

    from tinyllava_switchkd.data.collator import Sample
    from tinyllava_switchkd.data.dataset import LazySupervisedDataset, Samples


class _Wrapper(Dataset):
    """A data set that wraps another one and forwards other attributes to it."""

    def __init__(self, whole: Samples) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return len(self.whole)

    def __getattr__(self, name: str) -> Any:
        if name == "whole":  # not set yet while the object is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.whole, name)


class Subset(_Wrapper):
    """The samples of a data set at some indices, with their lengths."""

    def __init__(self, whole: Samples, indices: Sequence[int]) -> None:
        super().__init__(whole)
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Sample:
        return self.whole[self.indices[number]]

    def encode(self, number: int) -> Sample:
        return self.whole.encode(self.indices[number])

    @property
    def lengths(self) -> list[int]:
        lengths = self.whole.lengths
        return [lengths[index] for index in self.indices]

    @property
    def modality_lengths(self) -> list[int]:
        lengths = self.whole.modality_lengths
        return [lengths[index] for index in self.indices]


class WithFillers(_Wrapper):
    """A data set that, beyond its end, has samples to learn nothing from, to give all ranks equally many."""

    def __getitem__(self, index: int) -> Sample:
        sample = self.whole[index % len(self.whole)]
        return sample if index < len(self.whole) else without_lesson(sample)


def hold_out(dataset: LazySupervisedDataset, share: float, seed: int) -> tuple[Subset, Subset]:
    """Split a data set by sample id: the same id is always on the same side, in any order of the samples.

    Args:
        dataset: its `records` have `id_of`.
        share: share of the samples to hold out, between 0 and 1.
        seed: selects the split.

    Returns:
        the training data and the held-out data.

    Raises:
        ValueError: one side would be empty.
    """
    names = (f"{seed} {dataset.records.id_of(index)}".encode(errors="surrogatepass") for index in range(len(dataset)))
    chosen = [int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64 < share for name in names]
    held = [index for index, out in enumerate(chosen) if out]
    rest = [index for index, out in enumerate(chosen) if not out]
    if not held or not rest:
        raise ValueError(
            f"--eval_share {share} of {len(dataset)} samples gives {len(rest)} for training and {len(held)} held out; "
            f"choose another share, or give --eval_data_path."
        )
    return Subset(dataset, rest), Subset(dataset, held)


@torch.no_grad()
def held_out_means(trainer: Trainer, model: nn.Module, dataset: Samples, batch_size: int) -> dict[str, float]:
    """Mean of every loss and measure of a task over a data set, with each sample counted once, on all ranks.

    Args:
        trainer: gives the collator, the accelerator and the workers.
        model: the task, wrapped as for training.
        dataset: the held-out data.
        batch_size: samples per batch and rank.

    Returns:
        "loss" and the task's measures, averaged over the same units as in training.
    """
    task: Task = trainer.model
    ranks, rank = trainer.args.world_size, trainer.args.process_index
    loader = DataLoader(
        WithFillers(dataset),
        sampler=range(rank, -(-len(dataset) // ranks) * ranks, ranks),
        batch_size=batch_size,
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
    )
    units = {measure.per for measure in task.measures.values()} | {"supervised"}
    device = trainer.args.device
    sums = dict.fromkeys([*task.measures, *(f"count {unit}" for unit in sorted(units))], 0.0)
    one = torch.ones((), device=device)
    was_training = task.training
    model.eval()
    try:
        for batch in loader:
            counts = task.counts(batch)
            batch = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                losses = model(batch, num_items_in_batch=one, step_counts=dict.fromkeys(counts, one))
            tokens = int(counts["supervised"])
            for name, measure in task.measures.items():
                sums[name] += float(losses[name]) * (tokens if measure.of_batch else 1)
            for unit in units:
                sums[f"count {unit}"] += float(counts[unit])
    finally:
        model.train(was_training)
    own = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    totals = dict(zip(sums, trainer.accelerator.reduce(own, reduction="sum").tolist(), strict=True))
    means = {name: totals[name] / max(totals[f"count {measure.per}"], 1) for name, measure in task.measures.items()}
    loss = sum(measure.weight * means[name] for name, measure in task.measures.items() if measure.weight is not None)
    return {"loss": loss, **means}
