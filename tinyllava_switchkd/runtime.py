"""This process: its rank, its device and the versions of its packages. Importing this does not import torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """This process's rank in the run; works before a process group exists."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


def is_main_process() -> bool:
    """Whether this is the process that writes files and logs."""
    return rank() <= 0


def world_size() -> int:
    """Number of processes in the run, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, this package and those of the named packages that are installed."""
    from tinyllava_switchkd import __version__  # works without installation, unlike importlib.metadata

    found = {"python": platform.python_version(), "tinyllava_switchkd": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def default_device() -> str:
    """This process's GPU (by the local rank that launchers set), or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def check_device(device: str | torch.device) -> torch.device:
    """The torch device of this name.

    Raises:
        ValueError: torch does not know the device, or this machine has no such GPU.
    """
    import torch

    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"torch does not know the device {device!r}; use cpu, cuda or cuda:1.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"The device is {str(device)!r}, but torch sees {count} GPU(s) here; use another or cpu.")
    return device
