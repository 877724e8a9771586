"""Which process this is, which device it computes on, with which packages. Importing it does not import torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """This process's number among all of the run, also before there is a process group."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() <= 0


def world_size() -> int:
    """Processes of the run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of this package, of Python and of those of the named packages that are installed."""
    from tinyllava_switchkd import __version__  # also where it is run from the sources and not installed

    found = {"python": platform.python_version(), "tinyllava_switchkd": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def default_device() -> str:
    """This process's GPU (launchers number the processes of a machine), else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def check_device(device: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        ValueError: torch knows no such device, or this machine has no such GPU.
    """
    import torch

    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"The device {device!r} is none that torch knows; say cpu, cuda or cuda:1.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"The device is {str(device)!r}, but torch sees {count} GPU(s) here; say another, or cpu.")
    return device
