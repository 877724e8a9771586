"""Adapters: modules that a method trains beside the student, such as a bridge.

A checkpoint holds them in a separate folder, never in the student.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyllava_switchkd.data.collator import on_device
from tinyllava_switchkd.distill import Distiller, Task

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import DataCollatorForSupervisedDataset
    from tinyllava_switchkd.data.dataset import Samples

logger = logging.getLogger(__name__)

BRIDGE_SAMPLES = 64
"""Number of samples with images that a bridge is initialised from."""

FILE = Path("distill", "adapters.safetensors")
"""Path of the adapters in a checkpoint's folder."""

_PREFIX = "adapters."


def whole(parameters: Iterable[nn.Parameter], writer: int | None = None) -> AbstractContextManager:
    """Inside, every rank has all of the parameters that ZeRO-3 has split.

    Args:
        parameters: split ones or others.
        writer: the rank whose changes all ranks keep; by default changes are lost.
    """
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(split, modifier_rank=writer)


def write_adapters(task: nn.Module, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a task's adapters, if it has any.

    Args:
        task: the task that is trained.
        folder: the checkpoint's folder.
        state_dict: the task's complete weights, if the task does not hold all of them (ZeRO-3).
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


def begin_adapters(
    task: Task, earlier: str | None, dataset: Samples, collate: DataCollatorForSupervisedDataset
) -> None:
    """Initialise a run's adapters: from the stage before if it has those, otherwise a bridge by least squares.

    Args:
        task: the task that is trained.
        earlier: the folder that the student starts from, if any.
        dataset: the training data, on which a bridge is fitted.
        collate: makes batches from it.

    Raises:
        ValueError: the earlier stage's adapters do not fit.
    """
    if not isinstance(task, Distiller) or not hasattr(task, "adapters"):
        return
    file = None if earlier is None else Path(earlier, FILE)
    theirs = {name.split(".")[0] for name in load_file(file)} if file is not None and file.is_file() else set()
    if earlier is not None and not theirs.isdisjoint(task.adapters.keys()):
        read_adapters(task, earlier)
        logger.info("The adapters of the method continue from %s.", file)
        return
    if theirs:
        logger.info("%s holds adapters of another method (%s), which are not used.", file, ", ".join(sorted(theirs)))
    if task.bridge is not None:
        lengths = dataset.modality_lengths
        with_images = [index for index in range(len(dataset)) if lengths[index] > 0]
        chosen = with_images[:: max(1, len(with_images) // BRIDGE_SAMPLES)][:BRIDGE_SAMPLES]
        device = next(task.teacher.parameters()).device  # where ZeRO-3 gathers the student's tower, too
        batches = (on_device(collate([dataset[index]]), device) for index in chosen)
        with whole(task.student.vision_tower.parameters()):
            explained = task.fit_bridge(batches)
        logger.info(
            "The student's vision features differ in shape from the teacher's: a bridge starts as the least-squares "
            "map from %d samples, which explains %.0f %% of the teacher's variance.",
            *(len(chosen), 100 * explained),
        )


def read_adapters(task: nn.Module, folder: str | Path) -> None:
    """Load a task's adapters, if it has any.

    Raises:
        ValueError: the folder has no adapters although the task needs them, or they do not fit.
    """
    adapters = getattr(task, "adapters", None)
    if adapters is None:
        return
    file = Path(folder, FILE)
    if not file.is_file():
        raise ValueError(f"{file} is missing: the checkpoint was written by a method without adapters.")
    try:
        adapters.load_state_dict(load_file(file))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file} holds the adapters of another method or pair of models ({reason}); use the same method and "
            f"teacher as that run, or remove the file to begin with new ones."
        ) from None
