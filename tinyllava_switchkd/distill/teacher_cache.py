"""What the teacher says of each sample, kept on the disk, so that its own pass is paid once.

Kept are the last hidden states of a sample's supervised positions. A sample is known by what the teacher reads of it
(`sample_digest`), a folder by the teacher and its precision, so nothing that has changed is ever found again.

Every writer has files of its own (safetensors, read memory-mapped), which take their names once they are whole: any
number of ranks and runs may share a folder without a lock. What was computed twice is stored twice, and is the same.
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
from tinyllava_switchkd.io import write_bytes

from .methods.base import Method
from .teacher import FrozenTeacher
from .trace import BLIND, batch_images, look, placeholders, splice_batch, supervised_positions

if TYPE_CHECKING:
    from tinyllava_switchkd.data.collator import Batch, DataCollatorForSupervisedDataset, Pictures
    from tinyllava_switchkd.data.dataset import Samples

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**27
"""Hidden states that a writer collects before it writes a file; a run that is killed loses no more than these."""

FORMAT = 1
"""Part of a folder's name; another layout of the files gets another."""


class TeacherCache:
    """Digest of a sample -> the teacher's hidden states [supervised tokens, width].

    Args:
        folder: of all teachers; made if it is not there.
        teacher: tells one teacher and its way of computing from another.
        dtype: in which hidden states are kept; that of the teacher's head loses nothing.

    Attributes:
        unwritten: why nothing more is written, if it is not.

    Raises:
        OSError: the folder cannot be made.
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
            raise OSError(f"--teacher_cache {folder} cannot be made: {error.strerror}; name another folder.") from None
        self.sync()

    def __len__(self) -> int:
        """Samples that are known."""
        return len(self._where.keys() | self._pending.keys())

    def __contains__(self, digest: str) -> bool:
        return digest in self._where or digest in self._pending

    def get(self, digest: str) -> Tensor | None:
        """Hidden states of a sample, on the CPU; None if they are not there, or not as they were written."""
        if digest in self._pending:
            return self._pending[digest]
        if digest not in self._where:
            return None
        number, start, rows, checksum = self._where[digest]
        path = self._files[number]
        try:
            hidden = self._open(path).get_slice("hidden")[start : start + rows]
            good = _checksum(hidden) == checksum
        except (OSError, SafetensorError):  # the file has gone, or was cut
            good = False
        if good:
            return hidden
        del self._where[digest]
        logger.warning("%s is damaged; what it held is computed again.", path)
        return None

    def add(self, digest: str, hidden: Tensor) -> None:
        """Keep a sample's hidden states [supervised tokens, width]; on the disk after the next `sync`, or sooner."""
        if digest in self or self.unwritten is not None:
            return
        hidden = hidden.detach().to("cpu", self.dtype, copy=True)
        self._pending[digest] = hidden
        self._pending_bytes += hidden.nbytes
        if self._pending_bytes >= SHARD_BYTES:
            self.sync()

    def sync(self) -> None:
        """Write what is new here, and find what others have written since."""
        if self._pending:
            self._write()
        found = [path for path in self.folder.glob("*.safetensors") if path.name not in self._known]
        for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            self._known.add(path.name)
            self._read(path)

    def bytes(self) -> int:
        """What lies on the disk."""
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
        except OSError as error:  # no reason to lose a training
            self.unwritten = error
            logger.warning("The teacher cache is no longer written to: %s.", error)
        self._pending, self._pending_bytes = {}, 0

    def _read(self, path: Path) -> None:
        """Take a file's samples up; one of a later file takes the place of an earlier, which may have been damaged."""
        try:
            file = self._open(path)
            digests, rows, checksums = (file.get_tensor(name).tolist() for name in ("digests", "rows", "checksums"))
        except (OSError, SafetensorError) as error:
            logger.warning("%s is damaged and is passed over (%s); what it held is computed again.", path, error)
            return
        start = 0
        for digest, count, checksum in zip(digests, rows, checksums, strict=True):
            self._where[bytes(digest).hex()] = (len(self._files), start, count, checksum)
            start += count
        self._files.append(path)


def check_method(method: Method) -> None:
    """Refuse a method that wants more of the teacher than is kept.

    Raises:
        ValueError: naming what it wants.
    """
    wanted = [name for name, value in method.teacher_sight._asdict().items() if value]
    if method.teacher_sight != BLIND:
        raise ValueError(
            f"--teacher_cache keeps the teacher's hidden states of supervised tokens, and {method.name} also reads its "
            f"{', '.join(wanted)}; leave --teacher_cache out, or take --distill_method switch_kd or logit_kd."
        )


def tell_size(
    cache: TeacherCache,
    dataset: Samples,
    collator: DataCollatorForSupervisedDataset,
    width: int,
    probed: int = 256,
) -> str:
    """How large the cache of a data set becomes, in a sentence, from some of its samples, evenly spread.

    Args:
        cache: to be filled.
        dataset: has `encode`.
        collator: has `truncate`.
        width: of the teacher's hidden states.
        probed: how many samples are looked at.

    Raises:
        ValueError: the disk has no room for what is missing.
    """
    chosen = range(0, len(dataset), max(1, len(dataset) // probed))
    tokens = sum(int((collator.truncate(dataset.encode(index))["labels"] != -100).sum()) for index in chosen)
    collator.counts.zero_()
    size = tokens / len(chosen) * len(dataset) * width * cache.dtype.itemsize
    there, free = cache.bytes(), shutil.disk_usage(cache.folder).free
    if size - there > free:
        raise ValueError(
            f"--teacher_cache {cache.folder.parent} needs about {_readable(size)} for {len(dataset)} samples, "
            f"{_readable(there)} of which are there, and the disk has {_readable(free)} left; choose another folder, "
            f"or halve it with --teacher_cache_dtype bf16 where it is fp32."
        )
    return (
        f"The teacher cache {cache.folder} takes about {_readable(size)} for {len(dataset)} samples; it holds "
        f"{len(cache)} samples ({_readable(there)}), and the disk has {_readable(free)} left."
    )


@torch.no_grad()
def fill(cache: TeacherCache, guide: FrozenTeacher, batch: Batch, packing: bool = False) -> None:
    """Keep what the teacher says of a batch's samples, unless all of them are known.

    Args:
        cache: to be filled.
        guide: holds the teacher.
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
    """Hidden states of a batch by the digests of its samples; `rows` says which sample each is of."""
    samples, counts = torch.unique_consecutive(rows, return_counts=True)
    return {digests[row]: part for row, part in zip(samples.tolist(), hidden.split(counts.tolist()), strict=True)}


def _open(path: Path) -> safe_open:
    return safe_open(path, "pt")


def _checksum(hidden: Tensor) -> int:
    return zlib.crc32(hidden.contiguous().view(torch.uint8).numpy().data)


def _readable(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
