"""Sampling order: batches of similar lengths and one modality (v1, ``train/tinyllava_trainer.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Random order in which the samples of an optimiser step have similar lengths and, if asked for, one modality.

    A megabatch is one optimiser step over all ranks, ``world_size * gradient_accumulation_steps`` batches. Samples are
    shuffled and divided into pools. Each pool is sorted by length and divided into megabatches, whose samples are
    distributed so that all batches have about the same total length. Then the megabatches are shuffled. With
    `group_by_modality` samples with and without images never share a megabatch, except among those left over at the
    end. ``pool=1`` is v1's order, which balances the ranks but pads as much as a random order.

    The order depends only on the lengths, the seed and the epoch, so a resumed run continues where it stopped.

    Args:
        batch_size: samples per batch of a rank.
        world_size: number of ranks.
        lengths: length of every sample; with `group_by_modality` negative for a sample without images.
        group_by_modality: keep samples with and without images apart.
        gradient_accumulation_steps: batches per rank and optimiser step.
        seed: determines the order, together with the epoch.
        pool: megabatches that are sorted together.

    Raises:
        ValueError: a length that is zero or (without `group_by_modality`) negative.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: Sequence[int],
        group_by_modality: bool = False,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        pool: int = 50,
    ) -> None:
        self.lengths = torch.as_tensor(lengths, dtype=torch.long)
        if (self.lengths == 0).any() or (not group_by_modality and (self.lengths < 0).any()):
            raise ValueError("Lengths must be positive (with group_by_modality, negative for samples without images).")
        self.group_by_modality = group_by_modality
        self.chunks = world_size * gradient_accumulation_steps
        self.megabatch = batch_size * self.chunks
        self.pool = pool
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A plain sum would give seed 1 in epoch 0 the order of seed 0 in epoch 1.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = [torch.arange(len(self.lengths))]
        if self.group_by_modality:
            groups = [group for sign in (1, -1) if len(group := (self.lengths.sign() == sign).nonzero().flatten())]
        megabatches, leftover = [], []
        for group in groups:
            whole, rest = self._megabatches(group, generator)
            megabatches += whole
            leftover += rest
        order = torch.randperm(len(megabatches), generator=generator).tolist()
        for index in order:
            yield from self._deal(megabatches[index])
        yield from leftover

    def _megabatches(self, group: torch.Tensor, generator: torch.Generator) -> tuple[list[list[int]], list[int]]:
        """Complete megabatches of samples with similar lengths, and the remaining samples."""
        group = group[torch.randperm(len(group), generator=generator)]
        whole = len(group) - len(group) % self.megabatch
        megabatches = []
        for pool in group[:whole].split(self.megabatch * self.pool):
            longest_first = pool[self.lengths[pool].abs().argsort(descending=True, stable=True)]
            megabatches += [megabatch.tolist() for megabatch in longest_first.split(self.megabatch)]
        rest = group[whole:]
        return megabatches, rest[self.lengths[rest].abs().argsort(descending=True, stable=True)].tolist()

    def _deal(self, megabatch: list[int]) -> list[int]:
        """Distribute a megabatch, sorted longest first, to batches of equal size and about equal total length."""
        size = len(megabatch) // self.chunks
        batches: list[list[int]] = [[] for _ in range(self.chunks)]
        totals = [0] * self.chunks
        for index in megabatch:
            chunk = min((c for c in range(self.chunks) if len(batches[c]) < size), key=totals.__getitem__)
            batches[chunk].append(index)
            totals[chunk] += abs(int(self.lengths[index]))
        return [index for batch in batches for index in batch]
