"""Measures the peak memory of a training: ``python -m tinyllava_switchkd.ablations.memory FLAGS``.

It runs in a separate process, because an allocator keeps the memory of earlier trainings in the same process.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
MARK = "peak_mib"


def resident(field: str) -> float | None:
    """A field of /proc/self/status in MiB; None on systems without it."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 2**10
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the peak memory in MiB: of the GPU, or of this process beyond that of the loaded libraries."""
    from tinyllava_switchkd.train import train

    before = resident("VmRSS")
    code = train.main(list(sys.argv[1:] if argv is None else argv))
    peak = resident("VmHWM")
    if torch.cuda.is_available():
        print(MARK, torch.cuda.max_memory_allocated() / 2**20)
    elif peak is not None and before is not None:
        print(MARK, peak - before)
    return code


if __name__ == "__main__":
    sys.exit(main())
