"""Resume DeepSpeed's shards on another number of processes, through DeepSpeed's universal checkpoint.

A shard holds one process's part of every flat tensor of the optimiser, so shards fit only one number of processes. The
universal form holds each parameter and its two moments by name. `convert` writes it into `checkpoints.CONVERTED`,
beside the checkpoints, with links to the rest of the checkpoint. The next checkpoint of the run removes it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.train.reliability import checkpoints
from tinyllava_switchkd.train.reliability.resume import ResumeError, reading

if TYPE_CHECKING:
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

_STATES = {"exp_avg", "exp_avg_sq"}


def is_universal(checkpoint: str | Path | None) -> bool:
    """Whether `convert` made this checkpoint."""
    return checkpoint is not None and Path(checkpoint).parent.name == checkpoints.CONVERTED


def convert(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """Convert a sharded checkpoint so that any number of processes can resume from it.

    Args:
        checkpoint: a complete checkpoint of ZeRO-1, 2 or 3.
        output_dir: the run's folder.

    Returns:
        the folder to resume from.

    Raises:
        ResumeError: the optimiser is not of Adam's kind, or the files hold an object or a name that no parameter has.
        CheckpointError: there is no room.
    """
    from deepspeed.checkpoint import ds_to_universal

    checkpoint = Path(checkpoint)
    shards = checkpoint / (checkpoint / "latest").read_text().strip()
    needed = 2 * checkpoints.size_of(shards)  # the extracted pieces, and the result
    checkpoints.check_space(output_dir, needed, checkpoints.step_of(checkpoint))
    view = Path(output_dir) / checkpoints.CONVERTED / checkpoint.name
    shutil.rmtree(view.parent, ignore_errors=True)
    view.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file != shards:
            (view / file.name).symlink_to(file.resolve())
    arguments = Namespace(
        input_folder=str(shards),
        output_folder=str(view / shards.name),
        num_extract_workers=1,  # worker processes would not use the weights-only reader
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with checkpoints.writing(output_dir, checkpoints.step_of(checkpoint), needed), reading(checkpoint):
        _check(shards)
        logger.info("Converting %s for another number of processes, by reading and writing all of it.", checkpoint)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(arguments)
    return view


def correct(optimizer: Optimizer, before: list[dict[str, object]], rates: list[float]) -> None:
    """Correct two errors of DeepSpeed's reader of the universal form under ZeRO-3.

    It gives all parameter groups the settings of the first one, and one shared step counter, which then counts each
    group's update as a step.

    Args:
        optimizer: the optimiser, after it has read the universal form.
        before: the settings of each group before that.
        rates: the schedule's current learning rate of each group.
    """
    for group, own, rate in zip(optimizer.param_groups, before, rates, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"}, lr=rate)
    for state in optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()


def _check(shards: Path) -> None:
    """Refuse shards that cannot be converted, and parameter names that would be paths."""
    import torch

    for file in sorted(shards.glob("*_optim_states.pt")):
        state = torch.load(file, map_location="cpu", mmap=True)["optimizer_state_dict"]
        inner = state.get("optimizer_state_dict") or state.get("base_optimizer_state") or {}
        states = inner.get("state") or []
        kinds = [set(each) for each in (states.values() if isinstance(states, dict) else states)]
        if not kinds or not all(kind >= _STATES for kind in kinds):
            raise ResumeError(
                f"The checkpoint {shards.parent} was written by another number of processes with an optimiser that "
                "DeepSpeed cannot re-shard (only Adam's); use as many processes as before, or start a new run with "
                "--overwrite_output_dir True."
            )
        _check_names(shards, (name for group in state.get("param_slice_mappings") or () for name in group))
    for file in sorted(shards.glob("*_model_states.pt")):
        state = torch.load(file, map_location="cpu", mmap=True)
        _check_names(shards, (name for group in state.get("param_shapes") or () for name in group))
        _check_names(shards, state.get("module") or ())


def _check_names(shards: Path, names: Iterable[object]) -> None:
    for name in names:
        if not isinstance(name, str) or not all(
            part.replace("-", "_").isidentifier() or part.isdigit() for part in name.split(".")
        ):
            raise ResumeError(f"{shards} has a parameter {name!r}, which no model has; use another checkpoint.")
