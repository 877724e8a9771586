"""Resident memory of this process, now and at its peak (Linux)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str = "VmRSS") -> int:
    """Bytes; `VmHWM` is the peak since the process began or `peak_resident` last reset it."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {field}; resident memory is measured on Linux only.")
    return int(found[1]) * 1024


def peak_resident(function: Callable[[], None]) -> tuple[int, int]:
    """Peak bytes while `function` ran, and bytes before it."""
    CLEAR.write_text("5")  # resets the peak (man 5 proc)
    before = resident()
    function()
    return resident("VmHWM"), before
