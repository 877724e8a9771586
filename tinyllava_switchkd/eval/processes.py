"""The processes of one evaluation, as torchrun or `accelerate launch` has started them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist


class OtherProcessFailed(RuntimeError):
    """Another process has an error and has reported it."""


@dataclass(frozen=True)
class Processes:
    """This process's place among those that share the work.

    They meet twice before the generation and never during it: a slow or a dead process holds up nobody.

    Attributes:
        rank: 0 to world - 1.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """Read torchrun's variables; one process without them.

        Raises:
            ValueError: they say that there are several processes, but not where these meet.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if absent:
            raise ValueError(
                f"WORLD_SIZE is {world}, but {' and '.join(absent)} is not set: start the processes with torchrun or "
                f"accelerate launch."
            )
        return cls(int(os.environ["RANK"]), world)

    @property
    def first(self) -> bool:
        """Whether this is process 0, which looks after the files."""
        return self.rank == 0

    def join(self) -> None:
        """Open the connection to the others."""
        if self.world > 1:
            dist.init_process_group("gloo")

    def leave(self) -> None:
        """Close it."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def agree(self, failed: bool) -> None:
        """Wait for process 0 and hear whether it goes on.

        Args:
            failed: of process 0: it does not.

        Raises:
            OtherProcessFailed: process 0 does not go on, and says itself why.
        """
        verdict = [failed]
        if self.world > 1:
            with _deaths_reported():
                dist.broadcast_object_list(verdict, src=0)
        if verdict[0] and not self.first:
            raise OtherProcessFailed

    def meet(self) -> None:
        """Wait until everybody is here.

        Raises:
            OtherProcessFailed: somebody has died on the way.
        """
        if self.world > 1:
            with _deaths_reported():
                dist.barrier()


@contextlib.contextmanager
def _deaths_reported() -> Iterator[None]:
    """Say in one sentence what torch says when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessFailed(f"Another process has ended before the generation began ({error}).") from None
