"""A lock that allows one run per output folder. It names its owner and never has to be removed by hand."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.train.reliability.signals import started_at

logger = logging.getLogger(__name__)

LOCK = "run.lock"
"""File in the output folder while a run writes there: host, process, start."""

STALE_SECONDS = 180.0
"""A lock from another machine that was not renewed for this long is taken over."""

_RENEW_SECONDS = 20.0


class LockedError(RuntimeError):
    """Another process writes to the folder."""


class OutputLock:
    """Held by the main process of a run from the checks to the end.

    On one machine, and on network file systems with shared locks, the kernel's record lock decides. It ends with the
    process that holds it, however that process ends, and children do not inherit it. Without such locks, the process
    number and start time decide for owners on this machine, and the age of the file for owners on other machines.

    Args:
        folder: the output folder; it must exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOCK
        self._file: int | None = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock. A lock left by a run that no longer lives is taken over with a warning.

        Raises:
            LockedError: another run holds it (the message has host, process and age), or the path is no regular file.
        """
        descriptor = _open(self.path)
        try:
            held = _held(descriptor)
            if not held and not _is_file(descriptor, self.path):  # its owner has just removed it
                os.close(descriptor)
                return self.acquire()
            owner, age = _owner(descriptor), _age(self.path)
            if held or (owner and _may_live(owner, age, locks_work=held is not None)):
                raise LockedError(
                    f"--output_dir {self.path.parent} is being written to by process {owner.get('process', '?')} on "
                    f"{owner.get('host', '?')} (since {owner.get('since', '?')}, last sign of life {_span(age)} ago); "
                    f"wait for it to end, or choose another folder."
                )
            if owner:
                logger.warning(
                    "The run that held %s (process %s on %s, %s ago) ended without releasing it; taking it over.",
                    *(self.path.parent, owner.get("process"), owner.get("host"), _span(age)),
                )
            self._file = descriptor
            self._write(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        threading.Thread(target=self._renew, daemon=True, name="lock-renewal").start()

    def release(self) -> None:
        """Release the lock if it is held."""
        self._ended.set()
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._file)
        self._file = None

    @staticmethod
    def _write(descriptor: int) -> None:
        owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": started_at(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        data = json.dumps(owner).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        os.fsync(descriptor)

    def _renew(self) -> None:
        while not self._ended.wait(_RENEW_SECONDS):
            descriptor = self._file
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.utime(descriptor)


def _open(path: Path) -> int:
    """Open the lock file, creating it if necessary. Links are not followed."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise LockedError(f"{path} is a link or a folder, which no run has made; remove it.") from None


def _is_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _held(descriptor: int) -> bool | None:
    """Try to take the record lock. True if another process holds it; None if there are no such locks."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return None
    except OSError as error:
        return True if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return False


def _owner(descriptor: int) -> JsonObject:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _may_live(owner: JsonObject, age: float, locks_work: bool) -> bool:
    """Whether the owner named in a lock file may still live, although the kernel reports no lock."""
    if owner.get("host") != socket.gethostname():
        return age < STALE_SECONDS
    if locks_work or not str(owner.get("process", "")).isdigit():
        return False
    return started_at(int(owner["process"])) == owner.get("started")


def _age(path: Path) -> float:
    """Seconds since the lock was renewed, by its file system's clock."""
    probe = path.with_name(f".{LOCK}.{os.getpid()}")
    try:
        probe.touch()
        return max(probe.stat().st_mtime - path.stat().st_mtime, 0.0)
    except OSError:
        return 0.0
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
