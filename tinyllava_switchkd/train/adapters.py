"""What a method trains beside the student: in a checkpoint, but in a folder of its own and never in the student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = Path("distill", "adapters.safetensors")
"""Where it lies in a checkpoint's folder."""

_PREFIX = "adapters."


def write_adapters(task: nn.Module, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a task's adapters, if it has any.

    Args:
        task: what is trained.
        folder: the checkpoint's.
        state_dict: the task's complete weights, where they do not all lie in it (ZeRO-3).
    """
    if not hasattr(task, "adapters"):
        return
    state = task.state_dict() if state_dict is None else state_dict
    tensors = {
        name[len(_PREFIX) :]: value.detach().cpu().clone().contiguous()
        for name, value in state.items()
        if name.startswith(_PREFIX)
    }
    file = Path(folder, FILE)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)


def read_adapters(task: nn.Module, folder: str | Path) -> bool:
    """Read a task's adapters back; whether there were any.

    Raises:
        ValueError: the folder has none although the task wants some, or they do not fit.
    """
    if not hasattr(task, "adapters"):
        return False
    file = Path(folder, FILE)
    if not file.is_file():
        raise ValueError(f"{file} is missing: the checkpoint was written by a method that trains nothing of its own.")
    try:
        task.adapters.load_state_dict(load_file(file))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} holds the trained parts of another method or pair of models ({reason}).") from None
    return True
