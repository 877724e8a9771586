"""Runs commands one after another and forwards signals to the running one.

If the command is torchrun or DeepSpeed, the signals go to the ranks themselves: these launchers end on SIGUSR1, and on
SIGTERM they leave their ranks too little time to write a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinyllava_switchkd.launch.launcher import MODULE
from tinyllava_switchkd.train.reliability.signals import INTERRUPTED, LAUNCHER

_PASSED_ON = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")

_AGAIN_SECONDS = 5.0
"""A signal is repeated at this interval, for ranks that had not installed their handlers yet."""


class Commands:
    """Runs commands and remembers whether it was told to stop.

    Attributes:
        interrupted: whether Ctrl-C or a signal was received. The running command still ends by itself.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._ends_ranks = False
        self._child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator[Commands]:
        """Forward signals within the block. Ctrl-C reaches all processes of the terminal, so it is only noted."""
        before = {}
        for name in ("SIGINT", *_PASSED_ON):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup's SIGHUP stays ignored
                before[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            self.interrupted = True
        if number == signal.SIGINT or self._child is None or self._child.poll() is not None:
            return
        if number in (signal.SIGTERM, signal.SIGUSR1) and ranks_below(self._child.pid):
            self._ends_ranks = True
            self._tell_ranks()
        else:
            self._child.send_signal(number)

    def _tell_ranks(self) -> None:
        for rank in ranks_below(self._child.pid) if self._child else ():
            with contextlib.suppress(OSError):
                os.kill(rank, signal.SIGUSR1)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run one command and return its exit code, or 128 + N if signal N ended it."""
        flush()
        own = {LAUNCHER: os.environ.get(LAUNCHER, f"{socket.gethostname()}:{os.getpid()}")}
        self._ends_ranks = False
        try:
            self._child = subprocess.Popen(command, env={**os.environ, **own, **environment})
        except OSError as error:
            raise ValueError(f"{command[0]} cannot be run: {error.strerror}; set PYTHON to an interpreter.") from None
        while True:
            try:
                code = self._child.wait(_AGAIN_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if self._ends_ranks:
                    self._tell_ranks()
        self._child = None
        if code and self._ends_ranks:
            self.interrupted = True
            return INTERRUPTED  # torchrun itself returns 1 whatever its ranks return
        return 128 - code if code < 0 else code


def ranks_below(process: int) -> list[int]:
    """Ids of the training processes below a launcher; empty without /proc, or if `process` is itself a training."""
    found, waiting = [], [process]
    while waiting:
        with contextlib.suppress(OSError, ValueError):
            waiting += [
                int(word) for word in Path(f"/proc/{waiting[0]}/task/{waiting[0]}/children").read_text().split()
            ]
            words = Path(f"/proc/{waiting[0]}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if waiting[0] != process and is_rank(words):
                found.append(waiting[0])
        waiting.pop(0)
    return found


def is_rank(command: Sequence[str]) -> bool:
    """Whether a command is a training itself and not a launcher, whose own module comes first."""
    first = list(command).index("-m") if "-m" in command else len(command)
    return list(command[first + 1 : first + 2]) == [MODULE]


def become(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Replace this process by a command, which then receives all signals and sets the exit code.

    Raises:
        ValueError: the command cannot be run.
    """
    flush()
    try:
        os.execvpe(command[0], list(command), {**os.environ, **environment})
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be run: {error.strerror}; set PYTHON to an interpreter.") from None


def flush() -> None:
    """Flush the output, so that it precedes the output of a command."""
    sys.stdout.flush()
    sys.stderr.flush()
