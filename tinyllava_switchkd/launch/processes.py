"""Commands run one after another: a signal to the launcher reaches the command that is running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

_PASSED_ON = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Commands:
    """Runs commands; remembers whether it was told to stop.

    Attributes:
        interrupted: whether Ctrl-C or a signal has come. The command that ran then has ended by itself.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._child: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator[Commands]:
        """Signals are passed on within the block. Ctrl-C reaches the whole terminal, so it is only noted."""
        before = {}
        for name in ("SIGINT", *_PASSED_ON):
            number = getattr(signal, name, None)
            if number is not None:
                before[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if number in (signal.SIGINT, signal.SIGTERM):
            self.interrupted = True
        if number != signal.SIGINT and self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run one command to its end; its exit code, 128 + N if signal N ended it."""
        flush()
        try:
            self._child = subprocess.Popen(command, env={**os.environ, **environment})
        except OSError as error:
            raise ValueError(f"{command[0]} cannot be run: {error.strerror}; set PYTHON to an interpreter.") from None
        code = self._child.wait()
        self._child = None
        return 128 - code if code < 0 else code


def become(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Put a command in the place of this process, so that signals and the exit code are its own.

    Raises:
        ValueError: it cannot be run.
    """
    flush()
    try:
        os.execvpe(command[0], list(command), {**os.environ, **environment})
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be run: {error.strerror}; set PYTHON to an interpreter.") from None


def flush() -> None:
    """Let what was printed stand in front of what a command prints."""
    sys.stdout.flush()
    sys.stderr.flush()
