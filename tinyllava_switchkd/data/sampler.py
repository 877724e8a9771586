"""The order of the samples: batches of like lengths and of one modality (v1, ``train/tinyllava_trainer.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Random order in which every optimiser step gets samples of about one length, and of one modality if asked.

    A megabatch is what one optimiser step takes over all ranks, ``world_size * gradient_accumulation_steps`` batches.
    Samples are shuffled, cut into pools, sorted by length inside a pool and cut into megabatches; inside a megabatch
    they are dealt out so that every batch is about equally long; then the megabatches are shuffled. With
    `group_by_modality` samples with and without images never share a megabatch, except in what is left over at the
    end. ``pool=1`` is v1's order, which balances the ranks but pads as much as a random one.

    The order depends on nothing but the lengths, the seed and the epoch, so that a resumed run goes on where it was.

    Args:
        batch_size: samples a rank takes at a time.
        world_size: number of ranks.
        lengths: length of every sample; with `group_by_modality` negative for one without images.
        group_by_modality: keep samples with and without images apart.
        gradient_accumulation_steps: batches a rank takes for one optimiser step.
        seed: with the epoch, what the order is drawn from.
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
            raise ValueError("Lengths are positive, or negative for samples without images if grouped by modality.")
        self.group_by_modality = group_by_modality
        self.chunks = world_size * gradient_accumulation_steps
        self.megabatch = batch_size * self.chunks
        self.pool = pool
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is drawn next."""
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
        """Whole megabatches of samples of like length, and the samples that make no whole one."""
        group = group[torch.randperm(len(group), generator=generator)]
        whole = len(group) - len(group) % self.megabatch
        megabatches = []
        for pool in group[:whole].split(self.megabatch * self.pool):
            longest_first = pool[self.lengths[pool].abs().argsort(descending=True, stable=True)]
            megabatches += [megabatch.tolist() for megabatch in longest_first.split(self.megabatch)]
        rest = group[whole:]
        return megabatches, rest[self.lengths[rest].abs().argsort(descending=True, stable=True)].tolist()

    def _deal(self, megabatch: list[int]) -> list[int]:
        """Deal a megabatch, longest first, into equally many samples per batch and about equal lengths in all."""
        size = len(megabatch) // self.chunks
        batches: list[list[int]] = [[] for _ in range(self.chunks)]
        totals = [0] * self.chunks
        for index in megabatch:
            chunk = min((c for c in range(self.chunks) if len(batches[c]) < size), key=totals.__getitem__)
            batches[chunk].append(index)
            totals[chunk] += abs(int(self.lengths[index]))
        return [index for batch in batches for index in batch]
