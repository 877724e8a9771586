"""Runs of the command in separate processes, which can be killed at a chosen moment.

The processes are forked from a server that has imported everything once and computed nothing, which is quick and safe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.eval.forked", "tinyllava_switchkd.eval.job"]
CONTEXT.set_forkserver_preload([*PRELOADED, "tests.frozen"])

HALF_A_LINE = '{"question_id": 7, "prompt": "half a li'


def run_command(argv: Sequence[str], environment: Mapping[str, str], log: str, sabotage: str, after: int) -> None:
    """The child: `main(argv)`, which ends in the way `sabotage` names after `after` batches."""
    os.environ.update(environment)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        import torch

        from tinyllava_switchkd.eval import answers
        from tinyllava_switchkd.eval.run import main

        torch.set_num_threads(1)
        written = 0
        write = answers.AnswerWriter.write

        def counted(self: answers.AnswerWriter, rows: Sequence[dict]) -> None:
            nonlocal written
            rows = list(rows)
            if rows and written == after and sabotage:
                if sabotage == "kill in a line":
                    self._file.write(HALF_A_LINE)
                    self._file.flush()
                if sabotage == "exit as if all were well":
                    os._exit(0)
                os.kill(os.getpid(), signal.SIGTERM if sabotage == "terminate" else signal.SIGKILL)
            write(self, rows)
            written += bool(rows)

        answers.AnswerWriter.write = counted
        status = main(argv)
        file.flush()
        os._exit(status)


def start(
    argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, sabotage: str = "", after: int = 0
):
    """A running process; its output goes to `log`."""
    process = CONTEXT.Process(target=run_command, args=(list(argv), dict(environment or {}), str(log), sabotage, after))
    process.start()
    return process


def end(process, timeout: float = 60) -> int:
    """Its exit status; it is killed if it takes too long."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError("the process did not end")
    return process.exitcode


def wait_until_gone(process, timeout: float = 60) -> None:
    """Wait until the process is dead, even if its children still live (`join` would wait for these, too)."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            os.kill(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise TimeoutError("the process did not end")


def ranks(world: int) -> list[dict[str, str]]:
    """The environment that torchrun would give each process, with one core each."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
