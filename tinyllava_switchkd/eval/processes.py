"""The processes of one evaluation, started by torchrun, `accelerate launch` or `spawn`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MESSAGES = "TINYLLAVA_EVAL_MESSAGES"
"""Environment variable: the folder for messages that a process of `spawn` has its parent print at the end."""


class OtherProcessFailed(RuntimeError):
    """Another process failed and has reported its error."""


@dataclass(frozen=True)
class Processes:
    """This process's place among those that share the work.

    They synchronise twice before the generation and never during it, so that none waits for a slow or dead process.

    Attributes:
        rank: 0 to world - 1.
        world: the number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """Read torchrun's environment variables; without them there is one process.

        Raises:
            ValueError: there are several processes, but the rank or the master's address is not set.
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
        """Whether this is process 0, which manages the files."""
        return self.rank == 0

    def join(self) -> None:
        """Open the connection to the others."""
        if self.world > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo")

    def leave(self) -> None:
        """Close the connection."""
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    def meet(self, failed: bool = False) -> None:
        """Wait for all processes, and check that none has failed.

        Args:
            failed: whether this process has failed. It reports its error itself.

        Raises:
            OtherProcessFailed: another process has failed or died.
        """
        if self.world == 1:
            return
        import torch.distributed as dist

        verdicts = [failed] * self.world
        try:
            dist.all_gather_object(verdicts, failed)
        except RuntimeError as error:
            if failed:
                return
            raise OtherProcessFailed(f"Another process has ended before the generation began ({error}).") from None
        if any(verdicts) and not failed:
            raise OtherProcessFailed


def tell(message: str, rank: int) -> None:
    """Print an error now, or have the parent of `spawn` print it when all processes have ended."""
    folder = os.environ.get(MESSAGES)
    if folder is None:
        print(message, file=sys.stderr)
    else:
        with open(Path(folder) / f"{rank}.txt", "a", encoding="utf-8") as file:
            file.write(f"{message}\n")


def spawn(module: str, argv: Sequence[str], count: int) -> int:
    """Run a module in `count` processes on this machine and wait for all of them; returns the exit status.

    If a process fails, the others continue and their answers are kept. Errors are printed last, below the output of
    libraries. In any but the main thread, the processes get only the terminal's signals.
    """
    main = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), MESSAGES: folder}
        children = [
            subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=main,  # signals reach them only through `forward`
            )
            for rank in range(count)
        ]
        ended_by: list[int] = []

        def forward(number: int, _: object) -> None:
            ended_by.append(number)
            for child in children:
                child.send_signal(signal.SIGTERM)

        forwarded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
        own = {number: signal.signal(number, forward) for number in forwarded}
        try:
            for child in children:
                child.wait()
        finally:
            for number, handler in own.items():
                signal.signal(number, handler)
        sys.stdout.flush()
        for rank, child in reversed(list(enumerate(children))):
            if child.returncode < 0 and not ended_by:
                name = signal.Signals(-child.returncode).name
                print(
                    f"[process {rank}] error: it was ended from outside ({name}; after SIGKILL, the machine's memory "
                    f"may be too small: use fewer processes or a smaller --batch_size).",
                    file=sys.stderr,
                )
        for rank in reversed(range(count)):
            messages = Path(folder) / f"{rank}.txt"
            if messages.is_file():
                print(messages.read_text(encoding="utf-8"), end="", file=sys.stderr)
        if ended_by:
            return 130
        return 1 if any(child.returncode for child in children) else 0
