"""Checkpoints that can be trusted: written aside, sealed by a manifest, then given their name.

A checkpoint is written into `WRITING`; its files are brought to the disk; `MANIFEST` lists every one with its size and
checksum, the step and the number of processes; the checksum of the manifest goes into `RECORD`, in the run's folder
beside the checkpoints; and only then is the folder renamed to ``checkpoint-N``. Complete means that all of this
agrees. Whoever can write into a checkpoint's folder, but not into the run's, can neither change what is resumed from
nor have anything executed: nothing in a checkpoint is read by a reader that executes (see `weights_only`).
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
"""In a checkpoint: step, processes, and size and SHA-256 of every other file."""

RECORD = "checkpoints.json"
"""In the run's folder: SHA-256 of the manifest of each checkpoint that the run has written."""

WRITING = ".writing"
"""Folder in the run's in which a checkpoint is while it is being written."""

CONVERTED = ".universal"
"""Folder in the run's that holds a checkpoint in the form for another number of processes, see `universal`."""

NO_ROOM = 4
"""Exit code of a run that could not write a checkpoint."""

ASKED = "resume_from_checkpoint"
"""In `RECORD`: the checkpoint that the user chose to go on from, once the run has."""

ASIDE = "aside-"
"""In front of the name of a checkpoint that a run was told not to go on from."""

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_size = functools.partial(tqdm.format_sizeof, suffix="B")
_FULL = re.compile(
    r"no space left|disk quota|file too large|os error (28|27|122)|inline_container|PytorchStreamWriter|"
    r"write failed|failed to write",
    re.IGNORECASE,
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written; one sentence with the folder and what is needed."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints' folders in a run's, whole or not, latest step first."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    return sorted((p for p in output_dir.iterdir() if _CHECKPOINT.match(p.name) and p.is_dir()), key=step_of)[::-1]


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("checkpoint-"))


# Writing


def seal(folder: Path, step: int, world_size: int) -> str:
    """Bring all files of a folder to the disk and write its manifest; returns the manifest's SHA-256."""
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
    """Enter a sealed folder into the run's record and give it its name; one that had the name goes.

    The record comes first, so that every checkpoint with a name is in it, whenever the process ends.
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
    """Keep the latest `limit` checkpoints up to step `newest`, by their steps; the newest one always stays.

    The `best` one by held-out data stays as well and takes the place of the oldest, if there is room for two.

    Damaged ones do not count and go. Those of later steps are left alone: none of this run has been there.
    """
    if not limit or limit < 1:
        return
    earlier = [folder for folder in checkpoints(output_dir) if step_of(folder) <= newest]
    whole = [folder for folder in earlier if step_of(folder) == newest or _sizes_agree(folder)]
    kept = whole[:limit]
    favourite = next((folder for folder in whole if best is not None and folder.name == Path(best).name), None)
    if favourite is not None and favourite not in kept:
        kept = [*whole[: max(limit - 1, 1)], favourite]
    for folder in (folder for folder in earlier if folder not in kept):
        doomed = folder.with_name(f".old-{folder.name}")
        with contextlib.suppress(OSError):
            folder.rename(doomed)  # never seen half removed
            shutil.rmtree(doomed, ignore_errors=True)
    record = read_record(output_dir)
    there = {name: value for name, value in record.items() if name == ASKED or (Path(output_dir) / name).is_dir()}
    if there != record:
        write_json(Path(output_dir) / RECORD, there)


def clean(output_dir: str | Path) -> None:
    """Remove what an interrupted save has left, and give a folder back the name that it had just lost."""
    output_dir = Path(output_dir)
    for name in (WRITING, CONVERTED):
        if (output_dir / name).is_symlink():  # nobody writes where it leads
            (output_dir / name).unlink()
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for old in output_dir.glob(".old-checkpoint-*"):
        final = output_dir / old.name.removeprefix(".old-")
        if final.exists() or damage(old, name=final.name):
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def choose(output_dir: str | Path, asked: str | Path) -> bool:
    """Note the checkpoint that the user has chosen; whether it is a new choice.

    The same command again means the same run, which goes on from its latest checkpoint. With a new choice, those of
    the run beyond it are of another future; they keep their content and lose their name.
    """
    output_dir, asked = Path(output_dir), Path(asked).resolve()
    record = read_record(output_dir)
    if record.get(ASKED) == str(asked):
        return False
    if asked.parent == output_dir.resolve() and _CHECKPOINT.match(asked.name):
        for folder in checkpoints(output_dir):
            if step_of(folder) > step_of(asked):
                aside = folder.with_name(f"{ASIDE}{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                logger.warning("%s is beyond the checkpoint that was asked for; it is now %s.", folder, aside.name)
    write_json(output_dir / RECORD, {**record, ASKED: str(asked)})
    return True


def check_space(folder: str | Path, needed: int, step: int) -> None:
    """Refuse to begin a checkpoint that will not fit.

    Raises:
        CheckpointError: with the folder, what is needed and what there is.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"The checkpoint at step {step} needs about {_size(needed)} in {folder} and {_size(free)} are free; make "
            f"room and run the same command again, which goes on from {latest_name(folder)}."
        )


@contextlib.contextmanager
def writing(folder: str | Path, step: int, needed: int) -> Iterator[None]:
    """Turn a full disk, in whichever library it is noticed, into one sentence.

    Raises:
        CheckpointError: see above.
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
            free = "the disk takes no more files, whatever their size (0 inodes are free)"
        reason = first_line(error)
        raise CheckpointError(
            f"The checkpoint at step {step} could not be written into {folder} ({reason[:200]}): it needs about "
            f"{_size(needed)} and {free}; make room and run the same command again, which goes on from "
            f"{latest_name(folder)}."
        ) from error


def latest_name(output_dir: str | Path) -> str:
    """Name of the latest checkpoint whose sizes agree, or "the beginning"."""
    return next((folder.name for folder in checkpoints(output_dir) if _sizes_agree(folder)), "the beginning")


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Reading


def damage(folder: str | Path, name: str | None = None) -> str | None:
    """What of a checkpoint does not agree with its manifest and the run's record, in words; None if all agrees.

    Args:
        folder: the checkpoint.
        name: the one that it had when it was written, if it has another.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or cut off"
    recorded = read_record(folder.parent).get(name or folder.name)
    if recorded is None:
        logger.warning("The run's record %s does not know %s.", folder.parent / RECORD, folder)
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
    """A checkpoint's manifest, if it is one."""
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
    """Inside, `torch.load` reads tensors and plain values alone, also where a library asks for everything.

    DeepSpeed's optimiser states hold three small classes of its own beside tensors; those may be made, nothing else.
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
    with contextlib.suppress(OSError):  # not every system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
