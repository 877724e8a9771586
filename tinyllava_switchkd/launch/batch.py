"""Batch arithmetic: the samples of an optimiser step, from micro-batches and processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """Samples per device and micro-batch, micro-batches per step, and processes."""

    per_device: int
    accumulate: int
    processes: int

    @property
    def total(self) -> int:
        """Samples per optimiser step."""
        return self.per_device * self.accumulate * self.processes

    def __str__(self) -> str:
        return (
            f"Batch: {self.per_device} per device x {self.accumulate} accumulated x {self.processes} processes = "
            f"{self.total} per step"
        )


def batch_of(
    total: int, at_most: int, processes: int, per_device: int | None = None, accumulate: int | None = None
) -> Batch:
    """The batch with `total` samples per step, or as close to it as possible.

    Args:
        total: wanted samples per step.
        at_most: samples that a device is expected to hold; limits `per_device` if that is not given.
        processes: processes of the run.
        per_device: samples per device and micro-batch.
        accumulate: micro-batches per step. If neither is given, `per_device` is the largest number that divides
            the step's samples evenly.
    """
    if per_device is None:
        if accumulate is not None:
            per_device = total // (accumulate * processes)
        else:
            even = [size for size in range(at_most, 0, -1) if total % (size * processes) == 0]
            per_device = even[0] if even else min(at_most, total // processes)
        per_device = max(1, per_device)
    if accumulate is None:  # rounded to the nearest
        accumulate = max(1, (total + per_device * processes // 2) // (per_device * processes))
    return Batch(per_device, accumulate, processes)
