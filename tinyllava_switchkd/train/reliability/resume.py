"""Where a run stands: finished, to be resumed from a checkpoint, or to be begun."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from tinyllava_switchkd.cli import first_line
from tinyllava_switchkd.constants import SPLIT_FOLDERS
from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.model.layouts import read_config
from tinyllava_switchkd.model.weights import shard_names

from . import checkpoints, fingerprint

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig

    from ..command_line.arguments import TrainingArguments

logger = logging.getLogger(__name__)


_SHAPING = (
    *("connector_type", "hidden_size", "vocab_size", "vision_hidden_size", "vision_feature_layer"),
    *("vision_feature_select_strategy", "tune_type_llm", "tune_type_connector", "tune_type_vision_tower"),
)
"""Fields of a model's configuration without which its weights or the optimiser's state have no place."""


class ResumeError(ValueError):
    """A checkpoint is not one of the run that would go on from it."""


REMEDY = "use the arguments that the run was begun with, or begin anew with --overwrite_output_dir True"


def check_fits(checkpoint: str | Path, config: TinyLlavaConfig, training: TrainingArguments) -> None:
    """Refuse to go on from a checkpoint of another model, or of the same with other parts trained.

    Whatever is allowed to change, and whatever the checkpoint says that it was written with: nothing could be read.

    Args:
        checkpoint: a complete one.
        config: configuration of the model that the command line asks for.
        training: the training arguments, which say what is to be trained.

    Raises:
        ResumeError: with the first difference, on both sides.
    """
    stored = read_config(Path(checkpoint))
    for name in _SHAPING:
        theirs = getattr(stored, name)
        ours = getattr(training if name.startswith("tune_type") else config, name)
        if theirs != ours:
            raise ResumeError(
                f"The run cannot go on from {checkpoint}, which was written with {name} {theirs!r}, and {name} is "
                f"{ours!r} now; {REMEDY}."
            )


@contextlib.contextmanager
def reading(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Read a checkpoint without executing anything that it holds.

    Raises:
        ResumeError: a file of it holds other things than tensors and plain values, or cannot be read.
    """
    if checkpoint is None:
        yield
        return
    try:
        with checkpoints.weights_only():
            yield
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), first_line(error))
        raise ResumeError(
            f"A file of {checkpoint} holds something that is no tensor and no plain value, and was not opened "
            f"({reason.strip()[:200]}); take another checkpoint, or begin anew with --overwrite_output_dir True."
        ) from error


def is_finished(output_dir: str | Path) -> bool:
    """Whether a run in this folder has ended: its state is written last, after the final weights."""
    state = _read_state(Path(output_dir))
    return state is not None and state.get("global_step", 0) >= state.get("max_steps", 1)


def find_checkpoint(output_dir: str | Path, world_size: int = 1) -> str | None:
    """The latest complete checkpoint of a run, or None; others are passed over with a sentence that names the file.

    Args:
        output_dir: the run's folder.
        world_size: processes of the run.
    """
    for folder in checkpoints.checkpoints(output_dir):
        missing = what_is_missing(folder, world_size)
        if missing is None:
            return str(folder)
        logger.warning("The checkpoint %s is incomplete (%s) and is skipped.", folder, missing)
    return None


def what_is_missing(folder: str | Path, world_size: int = 1) -> str | None:
    """What keeps a checkpoint from being resumed from, in words; None if nothing does.

    Complete means that all its files are those of its manifest, and the manifest the one of the run's record. The
    rest of what is looked at only somebody else's can lack, which the record does not know.
    """
    folder = Path(folder)
    damage = checkpoints.damage(folder)
    if damage is not None:
        return damage
    state = _read_state(folder)
    if state is None:
        return "trainer_state.json is missing, cut off or says no step"
    unknown = sorted(state.keys() - {field.name for field in dataclasses.fields(TrainerState)})
    if unknown:
        return f"trainer_state.json has {unknown[0]!r}, which this version of transformers does not know"
    if not _weights_complete(folder):
        return "its weights are missing or cut off"
    sharded = (folder / "latest").is_file()  # DeepSpeed's optimiser and scheduler
    if sharded:
        tag = folder / (folder / "latest").read_text().strip()
        if tag.parent != folder:
            return "latest names a folder elsewhere"
        pickles = list(tag.glob("*_optim_states.pt"))
        if not pickles:
            return f"{tag.name} holds no optimiser state"
    else:
        pickles = [folder / "optimizer.pt", folder / "scheduler.pt"]
        if not all(file.is_file() for file in pickles):
            return "optimizer.pt or scheduler.pt is missing"
    random_states = list(folder.glob("rng_state*.pth"))
    written = len(random_states)
    if not written:
        return "the state of the random numbers is missing"
    for file in (*pickles, *random_states):
        if not zipfile.is_zipfile(file):  # torch's pickles end in a zip's directory
            return f"{file.name} is cut off"
    if written != world_size:
        logger.info("%s was written by %d processes; the run goes on with %d.", folder, written, world_size)
    return None


def needs_conversion(checkpoint: str | Path, world_size: int) -> bool:
    """Whether a checkpoint is in DeepSpeed's shards for another number of processes; see `universal`."""
    checkpoint = Path(checkpoint)
    return (checkpoint / "latest").is_file() and len(list(checkpoint.glob("rng_state*.pth"))) != world_size


def remove_checkpoints(output_dir: str | Path) -> None:
    """Remove the checkpoints and the state of an earlier run, so that none of them is taken for the new one's."""
    checkpoints.clean(output_dir)
    for folder in checkpoints.checkpoints(output_dir):
        shutil.rmtree(folder)
    for name in ("trainer_state.json", checkpoints.RECORD, fingerprint.FILE):
        (Path(output_dir) / name).unlink(missing_ok=True)


def _read_state(folder: Path) -> dict | None:
    try:
        state = read_json(folder / "trainer_state.json")
    except (OSError, ValueError):
        return None
    steps = [state.get("global_step", 0), state.get("max_steps", 1)]
    return state if all(type(step) is int and abs(step) < 2**53 for step in steps) else None


def _weights_complete(folder: Path) -> bool:
    """Whether all weights are there, in files as long as their headers say."""
    names = ["model.safetensors"]
    try:
        if (folder / "model.safetensors.index.json").is_file():
            names = shard_names(folder / "model.safetensors.index.json")
        elif (folder / "adapter_model.safetensors").is_file():  # LoRA: the adapter and the parts it belongs to
            names = ["adapter_model.safetensors"]
            if not all((folder / part / "pytorch_model.bin").is_file() for part in SPLIT_FOLDERS):
                return False
        for name in names:
            with safe_open(folder / name, "pt"):  # reads the header alone
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True
