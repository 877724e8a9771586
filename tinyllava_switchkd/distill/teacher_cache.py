"""A cache on disk of the teacher's hidden states, so that the teacher processes each sample only once.

It stores the last hidden states at a sample's supervised positions. The key of a sample is a digest of the teacher's
input (`sample_digest`), and the folder's name depends on the teacher and its precision, so outdated entries are never
found.

Every writer has its own files (safetensors, memory-mapped), which get their names when they are complete. So any number
of ranks and runs may share a folder without locks. A sample that is computed twice is stored twice, identically.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import shutil
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tinyllava_switchkd.constants import IGNORE_INDEX
from tinyllava_switchkd.data.collator import sample_digest
from tinyllava_switchkd.distill.methods.base import Method
from tinyllava_switchkd.distill.teacher import FrozenTeacher
from tinyllava_switchkd.distill.trace import BLIND, batch_images, look, placeholders, splice_batch, supervised_positions
from tinyllava_switchkd.io import write_bytes

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import Batch, DataCollatorForSupervisedDataset, Pictures
    from tinyllava_switchkd.data.dataset import Samples

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**27
"""Bytes that a writer collects before it writes a file; a killed run loses at most these."""

FORMAT = 2
"""Version of the files' layout and of what they hold; part of the folder's name.

In 1, a student with the teacher's frozen tower could store what the teacher sees in the student's pixels.
"""


class TeacherCache:
    """Digest of a sample -> the teacher's hidden states [supervised tokens, width].

    Args:
        folder: common folder of all teachers; created if it does not exist.
        teacher: identifies the teacher and how it computes.
        dtype: of the stored hidden states; that of the teacher's head is lossless.

    Attributes:
        unwritten: the error after which nothing more is written, if there was one.

    Raises:
        OSError: the folder cannot be created.
    """

    def __init__(self, folder: str | Path, teacher: str, dtype: torch.dtype) -> None:
        name = hashlib.sha256(f"{FORMAT} {teacher} {dtype}".encode()).hexdigest()[:16]
        self.folder = Path(folder) / name
        self.dtype = dtype
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[Path] = []
        self._where: dict[str, tuple[int, int, int, int]] = {}  # file, first row, rows, checksum
        self._known: set[str] = set()
        self._open = functools.lru_cache(maxsize=64)(_open)
        self.unwritten: OSError | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"--teacher_cache {folder} cannot be created: {error.strerror}; name another folder."
            ) from None
        self.sync()

    def __len__(self) -> int:
        """Number of cached samples."""
        return len(self._where.keys() | self._pending.keys())

    def __contains__(self, digest: str) -> bool:
        return digest in self._where or digest in self._pending

    def get(self, digest: str) -> Tensor | None:
        """Hidden states of a sample, on the CPU; None if they are missing or damaged."""
        if digest in self._pending:
            return self._pending[digest]
        if digest not in self._where:
            return None
        number, start, rows, checksum = self._where[digest]
        path = self._files[number]
        try:
            hidden = self._open(path).get_slice("hidden")[start : start + rows]
            good = _checksum(hidden) == checksum
        except (OSError, SafetensorError):  # the file is gone or truncated
            good = False
        if good:
            return hidden
        del self._where[digest]
        logger.warning("%s is damaged; its content is computed again.", path)
        return None

    def add(self, digest: str, hidden: Tensor) -> None:
        """Add a sample's hidden states [supervised tokens, width]; written to disk by the next `sync` at the latest."""
        if digest in self or self.unwritten is not None:
            return
        hidden = hidden.detach().to("cpu", self.dtype, copy=True)
        self._pending[digest] = hidden
        self._pending_bytes += hidden.nbytes
        if self._pending_bytes >= SHARD_BYTES:
            self.sync()

    def sync(self) -> None:
        """Write new samples, and find those that others have written."""
        if self._pending:
            self._write()
        found = [path for path in self.folder.glob("*.safetensors") if path.name not in self._known]
        for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            self._known.add(path.name)
            self._read(path)

    def bytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def _write(self) -> None:
        hidden = list(self._pending.values())
        tensors = {
            "digests": torch.tensor([list(bytes.fromhex(digest)) for digest in self._pending], dtype=torch.uint8),
            "rows": torch.tensor([len(one) for one in hidden]),
            "checksums": torch.tensor([_checksum(one) for one in hidden]),
            "hidden": torch.cat(hidden),
        }
        try:
            write_bytes(self.folder / f"{uuid.uuid4().hex}.safetensors", save(tensors))
        except OSError as error:  # the training goes on without writing
            self.unwritten = error
            logger.warning("Nothing more is written to the teacher cache: %s.", error)
        self._pending, self._pending_bytes = {}, 0

    def _read(self, path: Path) -> None:
        """Index a file's samples; a later file replaces earlier entries, which may have been damaged."""
        try:
            file = self._open(path)
            digests, rows, checksums = (file.get_tensor(name).tolist() for name in ("digests", "rows", "checksums"))
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged and is ignored (%s); its content is computed again.", path, error)
            return
        start = 0
        for digest, count, checksum in zip(digests, rows, checksums, strict=True):
            self._where[bytes(digest).hex()] = (len(self._files), start, count, checksum)
            start += count
        self._files.append(path)


def check_method(method: Method) -> None:
    """Refuse a method that needs more of the teacher than the cache stores.

    Raises:
        ValueError: names what it needs.
    """
    wanted = [name for name, value in method.teacher_sight._asdict().items() if value]
    if method.teacher_sight != BLIND:
        raise ValueError(
            f"--teacher_cache stores only the teacher's hidden states of supervised tokens, but {method.name} also "
            f"needs its {', '.join(wanted)}; leave out --teacher_cache, or use --distill_method switch_kd or logit_kd."
        )


def tell_size(
    cache: TeacherCache,
    dataset: Samples,
    collator: DataCollatorForSupervisedDataset,
    width: int,
    probed: int = 256,
) -> str:
    """A sentence with the expected size of a data set's cache, estimated from evenly spread samples.

    Args:
        cache: the cache to fill.
        dataset: the data set.
        collator: truncates its samples.
        width: of the teacher's hidden states.
        probed: number of samples for the estimate.

    Raises:
        ValueError: the disk is too full for the missing samples.
    """
    chosen = range(0, len(dataset), max(1, len(dataset) // probed))
    tokens = {
        index: int((collator.truncate(dataset.encode(index))["labels"] != IGNORE_INDEX).sum()) for index in chosen
    }
    scale = len(dataset) / len(chosen) * width * cache.dtype.itemsize
    size, free = sum(tokens.values()) * scale, shutil.disk_usage(cache.folder).free
    there = 0.0
    if size > free and len(cache):  # other samples of the cache may be another data set's
        known = (index for index in chosen if sample_digest(collator.truncate(dataset[index])) in cache)
        there = sum(tokens[index] for index in known) * scale
    collator.counts.zero_()
    if size - there > free:
        raise ValueError(
            f"--teacher_cache {cache.folder.parent} needs about {_readable(size)} for {len(dataset)} samples, "
            f"{_readable(there)} of which exist, but the disk has {_readable(free)} left; choose another folder, or "
            f"use --teacher_cache_dtype bf16, which is half as large as fp32."
        )
    return (
        f"The teacher cache {cache.folder} needs about {_readable(size)} for {len(dataset)} samples; it has "
        f"{len(cache)} samples ({_readable(cache.bytes())}), and the disk has {_readable(free)} left."
    )


@torch.no_grad()
def fill(cache: TeacherCache, guide: FrozenTeacher, batch: Batch, packing: bool = False) -> None:
    """Add a batch's samples to the cache, unless it has all of them.

    Args:
        cache: the cache to fill.
        guide: the teacher.
        batch: as for a distiller, with `digests`.
        packing: as in the training.
    """
    supervised = (batch["labels"] != IGNORE_INDEX).any(1).tolist()
    wanted = [digest for digest, learned in zip(batch["digests"], supervised, strict=True) if learned]
    if all(digest in cache for digest in wanted):
        return
    teacher, visual = guide.module, None
    if placeholders(batch).any():
        key: Pictures = "images" if batch.get("teacher_images") is None else "teacher_images"
        visual = guide.connect(teacher.vision_features(batch_images(batch, teacher, key)))
    spliced = splice_batch(teacher, batch, visual)
    positions = supervised_positions(batch["input_ids"], spliced)
    view = look(teacher, spliced, positions, packing=packing)
    for digest, hidden in split(view.hidden, positions.rows, batch["digests"]).items():
        cache.add(digest, hidden)


def split(hidden: Tensor, rows: Tensor, digests: Sequence[str]) -> dict[str, Tensor]:
    """Digest -> hidden states of each sample in a batch; `rows` has the sample's index of each hidden state."""
    samples, counts = torch.unique_consecutive(rows, return_counts=True)
    return {digests[row]: part for row, part in zip(samples.tolist(), hidden.split(counts.tolist()), strict=True)}


def _open(path: Path) -> safe_open:
    return safe_open(path, "pt")


def _checksum(hidden: Tensor) -> int:
    return zlib.crc32(hidden.contiguous().view(torch.uint8).numpy().data)


def _readable(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
