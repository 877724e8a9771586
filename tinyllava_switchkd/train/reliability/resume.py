"""Whether a run is finished, which checkpoint it resumes from, and whether that checkpoint is usable."""

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
from tinyllava_switchkd.io import read_json, write_json
from tinyllava_switchkd.model.layouts import read_config
from tinyllava_switchkd.model.weights import shard_names
from tinyllava_switchkd.train.reliability import checkpoints, fingerprint

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig
    from tinyllava_switchkd.train.command_line.arguments import TrainingArguments

logger = logging.getLogger(__name__)


_SHAPING = (
    *("connector_type", "hidden_size", "vocab_size", "vision_hidden_size", "vision_feature_layer"),
    *("vision_feature_select_strategy", "tune_type_llm", "tune_type_connector", "tune_type_vision_tower"),
)
"""Settings that must be equal for a checkpoint's weights and optimiser state to fit."""


class ResumeError(ValueError):
    """The run cannot resume from this checkpoint."""


REMEDY = "use the arguments that the run was started with, or start a new run with --overwrite_output_dir True"


def check_fits(checkpoint: str | Path, config: TinyLlavaConfig, training: TrainingArguments) -> None:
    """Refuse to resume from a checkpoint of another model, or of the same model with other parts trained.

    `--allow_changed` does not lift this check, because such a checkpoint could not be read.

    Args:
        checkpoint: a complete checkpoint.
        config: configuration of the model on the command line.
        training: the training arguments, with the tune types.

    Raises:
        ResumeError: with the first difference and both values.
    """
    stored = read_config(Path(checkpoint))
    for name in _SHAPING:
        theirs = getattr(stored, name)
        ours = getattr(training if name.startswith("tune_type") else config, name)
        if theirs != ours:
            raise ResumeError(
                f"The run cannot continue from {checkpoint}, which was written with {name} {theirs!r} (now {ours!r}); "
                f"{REMEDY}."
            )


@contextlib.contextmanager
def reading(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Read a checkpoint without executing anything in it.

    Raises:
        ResumeError: a file holds something other than tensors and plain values, or cannot be read.
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
            f"A file of {checkpoint} holds something other than tensors and plain values and was not opened "
            f"({reason.strip()[:200]}); use another checkpoint, or start a new run with --overwrite_output_dir True."
        ) from error


def is_finished(output_dir: str | Path) -> bool:
    """Whether the run in this folder is finished: its state is written last, after the final weights."""
    state = _read_state(Path(output_dir))
    return state is not None and state.get("global_step", 0) >= state.get("max_steps", 1)


def find_checkpoint(output_dir: str | Path, world_size: int = 1) -> str | None:
    """The latest complete checkpoint of a run, or None; incomplete ones are skipped with a warning.

    Args:
        output_dir: the run's folder.
        world_size: the run's number of processes.
    """
    for folder in checkpoints.checkpoints(output_dir):
        missing = what_is_missing(folder, world_size)
        if missing is None:
            return str(folder)
        logger.warning("The checkpoint %s is incomplete (%s) and is skipped.", folder, missing)
    return None


def what_is_missing(folder: str | Path, world_size: int = 1) -> str | None:
    """Why a checkpoint cannot be resumed from, as a phrase; None if it can.

    A checkpoint is complete if its files match its manifest, and its manifest matches the run's record. The other
    checks can only fail for a checkpoint of another origin, which is not in the record.
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
        if not zipfile.is_zipfile(file):  # a torch file is a zip, whose directory is at the end
            return f"{file.name} is cut off"
    if written != world_size:
        logger.info("%s was written by %d processes; the run continues with %d.", folder, written, world_size)
    return None


def needs_conversion(checkpoint: str | Path, world_size: int) -> bool:
    """Whether a checkpoint has DeepSpeed's shards for another number of processes; see `universal`."""
    checkpoint = Path(checkpoint)
    return (checkpoint / "latest").is_file() and len(list(checkpoint.glob("rng_state*.pth"))) != world_size


def remove_checkpoints(output_dir: str | Path) -> None:
    """Remove an earlier run's checkpoints and state, so that they are not mistaken for the new run's."""
    checkpoints.clean(output_dir)
    for folder in checkpoints.checkpoints(output_dir):
        shutil.rmtree(folder)
    for name in ("trainer_state.json", checkpoints.RECORD, fingerprint.FILE):
        (Path(output_dir) / name).unlink(missing_ok=True)
    if "SLURM_JOB_ID" in os.environ:
        write_json(Path(output_dir) / checkpoints.RECORD, {checkpoints.JOB: os.environ["SLURM_JOB_ID"]})


def begun_by_this_job(output_dir: str | Path) -> bool:
    """Whether this Slurm job has been requeued and has already overwritten this folder's earlier run."""
    job = checkpoints.read_record(output_dir).get(checkpoints.JOB)
    return job == os.environ.get("SLURM_JOB_ID", "") and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _read_state(folder: Path) -> dict | None:
    try:
        state = read_json(folder / "trainer_state.json")
    except (OSError, ValueError):
        return None
    steps = [state.get("global_step", 0), state.get("max_steps", 1)]
    return state if all(type(step) is int and abs(step) < 2**53 for step in steps) else None


def _weights_complete(folder: Path) -> bool:
    """Whether all weight files exist and are as long as their headers say."""
    names = ["model.safetensors"]
    try:
        if (folder / "model.safetensors.index.json").is_file():
            names = shard_names(folder / "model.safetensors.index.json")
        elif (folder / "adapter_model.safetensors").is_file():  # LoRA: the adapter and the parts' weights
            names = ["adapter_model.safetensors"]
            if not all((folder / part / "pytorch_model.bin").is_file() for part in SPLIT_FOLDERS):
                return False
        for name in names:
            with safe_open(folder / name, "pt"):  # reads only the header
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True
