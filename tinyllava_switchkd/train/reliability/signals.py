"""Signals that end a run at the next step, and a watch that ends ranks with the launcher that started them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

INTERRUPTED = 75
"""Exit code of a run that a signal ended after a checkpoint (EX_TEMPFAIL of sysexits.h); the same command continues."""

SIGNALS = ("SIGTERM", "SIGUSR1")
"""Signals that clusters send before they take a machine away."""

LAUNCHER = "TINYLLAVA_LAUNCHER"
"""Environment variable with ``host:pid`` of the outermost script, which a rank must not outlive."""

_PR_SET_PDEATHSIG = 1
_MODULES = ("deepspeed.launcher", "torch.distributed.run", "torch.distributed.launch", "accelerate.commands")
_PROGRAMS = ("deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate", "accelerate-launch")
"""Launchers' names on a command line, as modules and as programs."""

_received: list[int] = []
_owner = 0


class InterruptedRunError(RuntimeError):
    """A signal ended the run after a step and a checkpoint."""


def install() -> None:
    """From now on `SIGNALS` are only recorded for `received`. Outside the main thread this does nothing."""
    global _owner
    _received.clear()
    _owner = os.getpid()
    if threading.current_thread() is not threading.main_thread():
        return
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _note)


def uninstall() -> None:
    """Restore the default actions. If a signal was received, ignore further ones, since the process is about to end."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in SIGNALS:
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is _note:
            signal.signal(getattr(signal, name), signal.SIG_IGN if _received else signal.SIG_DFL)


def received() -> str | None:
    """The name of the first signal received, or None."""
    return signal.Signals(_received[0]).name if _received else None


def _note(number: int, frame: object) -> None:
    _received.append(number)
    if len(_received) == 1 and os.getpid() == _owner:  # not in a data loader's worker
        os.write(2, f"{signal.Signals(number).name} received: a checkpoint follows at the next step.\n".encode())


def follow_launcher(interval: float = 1.0) -> None:
    """Kill this process soon after one of its launchers has ended.

    Watched are the parents that are launchers (deepspeed, torchrun, accelerate) and, if a script of scripts/train
    started the run, that script. An interactive shell is not watched: a run in the background outlives it. A process is
    identified by number and start time, since numbers are reused.
    """
    if not sys.platform.startswith("linux"):
        return
    watched = launchers()
    if not watched:
        return
    if watched[0][0] == os.getppid():
        # for the direct parent the kernel sends the signal itself, without delay
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_watch, args=(watched, interval), daemon=True, name="launcher-watch").start()


def launchers() -> list[tuple[int, str]]:
    """The ancestors that this process must not outlive, nearest first: number and start time."""
    host, _, outermost = os.environ.get(LAUNCHER, "").rpartition(":")
    found, above, process = [], [], os.getppid()
    while process > 1:
        started = started_at(process)
        if started is None:
            break
        above.append((process, started))
        if str(process) == outermost and host == socket.gethostname():
            found = list(above)
            break
        if _is_launcher(process):
            found = list(above)
        parent = _stat(process)
        process = int(parent[1]) if parent else 0
    return found


def started_at(process: int) -> str | None:
    """When a process of this machine started (in the kernel's ticks); None if there is no such process."""
    fields = _stat(process)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def _stat(process: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name in parentheses may contain spaces


def _is_launcher(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(word.startswith(_MODULES) or word.rpartition("/")[2] in _PROGRAMS for word in words[:6])


def _watch(watched: list[tuple[int, str]], interval: float) -> None:
    while True:
        time.sleep(interval)
        for process, started in watched:
            if started_at(process) != started:
                os.write(2, f"The launcher (process {process}) has gone, and this rank ends with it.\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
