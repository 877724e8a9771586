"""Checkpoints that can be trusted: written to a temporary folder, sealed by a manifest, then renamed.

A checkpoint is written into `WRITING`, and its files are flushed to the disk (fsync). `MANIFEST` lists each file with
its size and checksum, and the step and the number of processes. The manifest's checksum goes into `RECORD`, in the
run's folder beside the checkpoints. Only then is the folder renamed to ``checkpoint-N``. A checkpoint is complete if
all of this agrees. Someone who can write into a checkpoint's folder, but not into the run's, can neither change what is
resumed from nor have anything executed: a checkpoint is only read by readers that execute nothing (see `weights_only`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tinyllava_switchkd.cli import first_line
from tinyllava_switchkd.io import JsonObject, digest, read_json, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""File in a checkpoint: step, number of processes, and size and SHA-256 of every other file."""

RECORD = "checkpoints.json"
"""File in the run's folder: SHA-256 of the manifest of each checkpoint that the run has written."""

WRITING = ".writing"
"""Subfolder of the run's folder that holds a checkpoint while it is written."""

CONVERTED = ".universal"
"""Subfolder of the run's folder that holds a checkpoint converted for another number of processes, see `universal`."""

NO_ROOM = 4
"""Exit code of a run that could not write a checkpoint."""

ASKED = "resume_from_checkpoint"
"""Key in `RECORD`: the checkpoint that the user chose to resume from."""

JOB = "slurm_job"
"""Key in `RECORD`: the Slurm job that began the run by overwriting an earlier one."""

ASIDE = "aside-"
"""Prefix of checkpoints that are later than the one the user chose."""

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_size = functools.partial(tqdm.format_sizeof, suffix="B")
_FULL = re.compile(
    r"no space left|disk quota|file too large|os error (28|27|122)|inline_container|PytorchStreamWriter|"
    r"write failed|failed to write",
    re.IGNORECASE,
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written; the message has the folder and the space needed."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, latest step first."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    return sorted((p for p in output_dir.iterdir() if _CHECKPOINT.match(p.name) and p.is_dir()), key=step_of)[::-1]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


# Writing


def seal(folder: Path, step: int, world_size: int) -> str:
    """Flush all files of a folder to the disk and write its manifest; returns the manifest's SHA-256."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_to_disk, files))
    listed = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": value}
        for path, value in zip(files, digests, strict=True)
    }
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        _sync_folder(inner)
    write_json(folder / MANIFEST, {"format": 1, "step": step, "world_size": world_size, "files": listed})
    _sync_folder(folder)
    return digest(folder / MANIFEST)


def publish(folder: Path, final: Path, manifest_digest: str) -> None:
    """Add a sealed folder to the run's record and give it its final name, replacing any folder of that name.

    The record is written first, so that it has every named checkpoint, whenever the process ends.
    """
    record = read_record(final.parent)
    write_json(final.parent / RECORD, {**record, final.name: manifest_digest})
    old = final.with_name(f".old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    folder.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(output_dir: str | Path, newest: int, limit: int | None, best: str | Path | None = None) -> None:
    """Keep the latest `limit` checkpoints up to step `newest`, by their steps; the newest always stays.

    The `best` one on held-out data also stays. With a limit of two or more it replaces the oldest of them. Damaged
    checkpoints do not count and are removed. Checkpoints of later steps are not from this run and stay.
    """
    if not limit or limit < 1:
        return
    earlier = [folder for folder in checkpoints(output_dir) if step_of(folder) <= newest]
    whole = [folder for folder in earlier if step_of(folder) == newest or _sizes_agree(folder)]
    kept = whole[:limit]
    best_folder = next((folder for folder in whole if best is not None and folder.name == Path(best).name), None)
    if best_folder is not None and best_folder not in kept:
        kept = [*whole[: max(limit - 1, 1)], best_folder]
    for folder in (folder for folder in earlier if folder not in kept):
        renamed = folder.with_name(f".old-{folder.name}")
        with contextlib.suppress(OSError):
            folder.rename(renamed)  # so that no named checkpoint is ever half removed
            shutil.rmtree(renamed, ignore_errors=True)
    record = read_record(output_dir)
    there = {
        name: value for name, value in record.items() if name in (ASKED, JOB) or (Path(output_dir) / name).is_dir()
    }
    if there != record:
        write_json(Path(output_dir) / RECORD, there)


def clean(output_dir: str | Path) -> None:
    """Remove what an interrupted save left, and restore a checkpoint that `publish` had moved but not replaced."""
    output_dir = Path(output_dir)
    for name in (WRITING, CONVERTED):
        if (output_dir / name).is_symlink():  # never write through a link
            (output_dir / name).unlink()
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for old in output_dir.glob(".old-checkpoint-*"):
        final = output_dir / old.name.removeprefix(".old-")
        if final.exists() or damage(old, name=final.name):
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def is_chosen(output_dir: str | Path, asked: str | Path) -> bool:
    """Whether the run has already begun from this checkpoint, which may have been removed since."""
    return read_record(output_dir).get(ASKED) == str(Path(asked).resolve())


def choose(output_dir: str | Path, asked: str | Path) -> bool:
    """Record the checkpoint that the user chose; returns whether it is a new choice.

    Repeating the same command continues the same run from its latest checkpoint. After a new choice, the run's later
    checkpoints no longer belong to it, and are renamed.
    """
    if is_chosen(output_dir, asked):
        return False
    output_dir, asked = Path(output_dir), Path(asked).resolve()
    record = read_record(output_dir)
    if asked.parent == output_dir.resolve() and _CHECKPOINT.match(asked.name):
        for folder in checkpoints(output_dir):
            if step_of(folder) > step_of(asked):
                aside = folder.with_name(f"{ASIDE}{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                logger.warning("%s is later than the chosen checkpoint and was renamed to %s.", folder, aside.name)
    write_json(output_dir / RECORD, {**record, ASKED: str(asked)})
    return True


def check_space(folder: str | Path, needed: int, step: int) -> None:
    """Check the free space before a checkpoint is written.

    Raises:
        CheckpointError: there is too little; with the folder and both sizes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"The checkpoint at step {step} needs about {_size(needed)} in {folder} and {_size(free)} are free; make "
            f"room and run the same command again (without --overwrite_output_dir), which continues from "
            f"{latest_name(folder)}."
        )


@contextlib.contextmanager
def writing(folder: str | Path, step: int, needed: int) -> Iterator[None]:
    """Turn the errors by which libraries report a full disk into one sentence.

    Raises:
        CheckpointError: the disk is full.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not _FULL.search(f"{error} {error.__cause__ or ''} {error.__context__ or ''}"):
            raise
        free = f"{_size(shutil.disk_usage(folder).free)} are free"
        if hasattr(os, "statvfs") and (table := os.statvfs(folder)).f_files and not table.f_favail:
            free = "the disk takes no more files of any size (0 inodes are free)"
        reason = first_line(error)
        raise CheckpointError(
            f"The checkpoint at step {step} could not be written into {folder} ({reason[:200]}): it needs about "
            f"{_size(needed)} and {free}; make room and run the same command again (without "
            f"--overwrite_output_dir), which continues from {latest_name(folder)}."
        ) from error


def latest_name(output_dir: str | Path) -> str:
    """Name of the latest checkpoint whose file sizes match its manifest, or "the beginning"."""
    return next((folder.name for folder in checkpoints(output_dir) if _sizes_agree(folder)), "the beginning")


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Reading


def damage(folder: str | Path, name: str | None = None) -> str | None:
    """How a checkpoint differs from its manifest or the run's record, as a phrase; None if it does not.

    Args:
        folder: the checkpoint.
        name: its original name, if it was renamed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or cut off"
    recorded = read_record(folder.parent).get(name or folder.name)
    if recorded is None:
        logger.warning("The run's record %s does not list %s.", folder.parent / RECORD, folder)
    elif recorded != digest(folder / MANIFEST):
        return f"{MANIFEST} is not the one that this run wrote"
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} - {MANIFEST}
    listed = manifest["files"]
    for file in sorted(present - listed.keys()):
        return f"{file} was not written by this run"
    for file, entry in listed.items():
        path = folder / file
        if file not in present or path.is_symlink():
            return f"{file} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{file} is cut off: {path.stat().st_size} bytes of {entry['size']}"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, value in zip(listed, pool.map(lambda file: digest(folder / file), listed), strict=True):
            if value != listed[file]["sha256"]:
                return f"{file} is damaged: its content is not what was written"
    return None


def read_manifest(folder: str | Path) -> JsonObject | None:
    """A checkpoint's manifest; None if it is missing or invalid."""
    try:
        manifest = read_json(Path(folder) / MANIFEST)
        good = all(
            isinstance(e["size"], int) and isinstance(e["sha256"], str) and ".." not in Path(name).parts
            for name, e in manifest["files"].items()
        )
        return manifest if good and isinstance(manifest["world_size"], int) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_record(output_dir: str | Path) -> dict[str, str]:
    """The run's record; empty if there is none."""
    try:
        return read_json(Path(output_dir) / RECORD)
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, `torch.load` reads only tensors and plain values, even if a library asks for everything.

    Of other objects it creates only the small classes of DeepSpeed that DeepSpeed's optimiser states hold.
    """
    import torch

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _deepspeed_classes() -> list[Callable[..., object] | tuple[Callable[..., object], str]]:
    import sys

    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _sizes_agree(folder: Path) -> bool:
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    try:
        return all((folder / file).stat().st_size == entry["size"] for file, entry in manifest["files"].items())
    except OSError:
        return False


def _to_disk(path: Path) -> str:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return digest(path)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
