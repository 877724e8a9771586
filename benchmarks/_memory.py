"""Memory of this process: current and peak resident memory (Linux), and torch's allocations on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str = "VmRSS") -> int:
    """Resident bytes; `VmHWM` is the peak since the process started or `peak_resident` reset it."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {field}; resident memory is measured on Linux only.")
    return int(found[1]) * 1024


def peak_resident(function: Callable[[], None]) -> tuple[int, int]:
    """Peak resident bytes while `function` runs, and the bytes before it."""
    CLEAR.write_text("5")  # resets the peak (man 5 proc)
    before = resident()
    function()
    return resident("VmHWM"), before


def allocated(function: Callable[[], None]) -> int:
    """Peak bytes that torch's CPU allocator hands out while `function` runs, beyond those before.

    They are the same on every machine and in every run, unlike resident memory, which includes the process's code and
    the allocator's unused pages.
    """
    now = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
