"""The devices of this machine that a command may use."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import which


@dataclass(frozen=True)
class Devices:
    """The devices of a run on this machine.

    Attributes:
        gpus: entries of ``CUDA_VISIBLE_DEVICES``, one per GPU; empty on a CPU.
        processes: processes on this machine.
    """

    gpus: tuple[str, ...]
    processes: int

    @property
    def kind(self) -> str:
        """ "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"

    @property
    def numbered(self) -> bool:
        """Whether all GPUs are given by number, not as GPU-<uuid> or MIG-<uuid>."""
        return all(gpu.isdigit() for gpu in self.gpus)


def visible_gpus(environment: Mapping[str, str], python: str) -> tuple[str, ...]:
    """The usable GPUs: ``CUDA_VISIBLE_DEVICES`` if it is set, else those that the driver lists."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        listed = environment["CUDA_VISIBLE_DEVICES"]
    elif which("nvidia-smi", path=environment.get("PATH")):
        listed = _output(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], environment)
    elif Path("/dev/kfd").exists():  # AMD GPUs: torch knows their number
        code = "import torch; print(*range(torch.cuda.device_count()))"
        listed = _output([python, "-c", code], environment)
    else:
        listed = ""
    gpus = []
    for entry in re.split(r"[,\s]+", listed.strip()):
        if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", entry):  # as in CUDA: entries after an invalid one are not visible
            break
        gpus.append(entry)
    return tuple(gpus)


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def find_devices(environment: Mapping[str, str], python: str) -> Devices:
    """The devices given by ``DEVICE`` and ``GPUS``; by default all visible GPUs, or one process on the CPU.

    ``GPUS`` is the number of GPUs (``4``) or a list (``0,2``; ``2,`` for a single one). On a CPU it is the number of
    processes.

    Raises:
        ValueError: the machine does not have these devices, or ``GPUS`` is invalid.
    """
    device, asked = environment.get("DEVICE", ""), environment.get("GPUS", "").strip()
    found = () if device == "cpu" else visible_gpus(environment, python)
    if device == "cuda" and not found:
        raise ValueError("DEVICE is cuda, but this machine shows no GPU; set DEVICE=cpu.")
    if not found:
        if asked and not re.fullmatch(r"0*[1-9]\d*", asked):
            raise ValueError(f"GPUS is {asked!r}; on a CPU it is the number of processes.")
        cores = os.cpu_count() or 1
        most = max(8, 4 * cores)  # more processes would only compete for memory
        if len(asked) > 9 or int(asked or 1) > most:
            raise ValueError(
                f"GPUS is {asked!r}; on a CPU it is the number of processes, at most {most} on {cores} cores."
            )
        return Devices((), int(asked or 1))
    if not asked:
        return Devices(found, len(found))
    if re.fullmatch(r"\d+", asked):
        count = int(asked)
        if count < 1:
            raise ValueError(
                f"GPUS is {asked!r}; give a number of GPUs (1) or a list with a comma ('0,' for the first)."
            )
        if count > len(found):
            raise ValueError(f"GPUS is {count}, but only {','.join(found)} are visible.")
        return Devices(found[:count], count)
    chosen = tuple(entry.strip() for entry in asked.removesuffix(",").split(","))
    wrong = [entry for entry in chosen if entry not in found]
    if wrong:
        raise ValueError(f"GPUS is {asked!r}, but only {','.join(found)} are visible.")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"GPUS is {asked!r}, which names a GPU twice.")
    return Devices(chosen, len(chosen))
