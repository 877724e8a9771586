"""Memory of this process: resident, now and at its peak (Linux), and what torch allocates on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

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


def allocated(function: Callable[[], None]) -> int:
    """Bytes that torch's CPU allocator gives out at most while `function` runs, beyond what was there before.

    The same on every machine and from run to run, which resident memory is not: that has the process's code and the
    allocator's unused pages in it.
    """
    now = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
