"""The batch of an optimiser step, made of what one device takes at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """Samples of one device at a time, such micro-batches of a step, and processes."""

    per_device: int
    accumulate: int
    processes: int

    @property
    def total(self) -> int:
        """Samples of an optimiser step."""
        return self.per_device * self.accumulate * self.processes

    def __str__(self) -> str:
        return (
            f"Batch: {self.per_device} a device x {self.accumulate} accumulated x {self.processes} processes = "
            f"{self.total} a step"
        )


def batch_of(
    total: int, at_most: int, processes: int, per_device: int | None = None, accumulate: int | None = None
) -> Batch:
    """The batch that keeps `total` samples a step on any number of processes, or comes nearest to it.

    Args:
        total: samples of a step that are wanted.
        at_most: samples that a device is expected to hold, where `per_device` does not say.
        processes: of the run.
        per_device: samples of a device at a time, if they are given.
        accumulate: micro-batches of a step, if they are given. With neither, the largest `per_device` is taken that
            divides the step's samples evenly.
    """
    if per_device is None:
        if accumulate is not None:
            per_device = total // (accumulate * processes)
        else:
            even = [size for size in range(at_most, 0, -1) if total % (size * processes) == 0]
            per_device = even[0] if even else min(at_most, total // processes)
        per_device = max(1, per_device)
    if accumulate is None:  # the nearest
        accumulate = max(1, (total + per_device * processes // 2) // (per_device * processes))
    return Batch(per_device, accumulate, processes)
