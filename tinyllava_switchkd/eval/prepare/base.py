"""What preparing a benchmark means: build LLaVA's folder from a primary source, and say what a folder lacks.

A preparer knows the files of its benchmark, their official row counts, its sources and how to turn each into the
layout. Everything shared (hub or archive access, image writing, checking) is here.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...fetch import (
    HubDataset,
    SourceError,
    download,
    image_problem,
    open_hub_dataset,
    parquet_rows,
    write_bytes,
    write_json,
)
from ...registry import Registry
from ..benchmarks.base import LETTER_SUFFIX, SINGLE_WORD_SUFFIX
from ..benchmarks.files import read_json, read_jsonl, read_tsv

logger = logging.getLogger(__name__)

ONE_WORD, LETTER = SINGLE_WORD_SUFFIX, LETTER_SUFFIX

PreparerFactory = Registry("benchmark to prepare", resolve=lambda preparer: preparer())
register_preparer = PreparerFactory.register

PROVENANCE_FILE = "prepared.json"


@dataclass(frozen=True)
class ExpectedFile:
    """A file of a benchmark's folder with its official row counts (several: several releases; none: not counted)."""

    path: str
    rows: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    """Other names under which the same file goes round."""


@dataclass
class Job:
    """One benchmark, one split, one source: what a preparer works with while it builds.

    Attributes:
        root: the benchmark's folder.
        downloads: where archives and JSON files of official sites are kept.
        undecodable: images that could not be decoded -> why.
        provenance: where the data came from, for `PROVENANCE_FILE`.
    """

    root: Path
    split: str
    source: str
    repos: tuple[str, ...]
    downloads: Path
    revision: str | None = None
    undecodable: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    _dataset: HubDataset | None = None

    def rows(
        self, split: str, config: str | None = None, columns: Collection[str] = (), optional: Collection[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """Rows of one split of the benchmark's hub data set, with `columns` and what there is of `optional`.

        Raises:
            SourceError: the data set can't be had.
            ValueError: it has no column of one of these names.
        """
        if self._dataset is None:
            self._dataset = open_hub_dataset(self.repos, self.revision)
            self.provenance |= {"repo_id": self._dataset.repo_id, "revision": self._dataset.revision}
        dataset = self._dataset
        logger.info("Reading %s (%s).", dataset.repo_id, f"{config}, {split}" if config else split)
        paths = (dataset.fetch(name) for name in dataset.parquet(split, config))
        for number, row in enumerate(parquet_rows(paths, {*columns, *optional})):
            lacking = [column for column in columns if column not in row]
            if lacking:
                raise ValueError(
                    f"{dataset.repo_id}, split {split!r}, row {number} has no column {', '.join(lacking)}; it has "
                    f"{', '.join(row)}. Pass another data set with --repo-id."
                )
            yield row

    def official(self, url: str) -> Path:
        """A file of an official site, downloaded once.

        Raises:
            SourceError: the site refuses it or can't be reached.
        """
        self.provenance.setdefault("urls", []).append(url)
        return download(url, self.downloads / url.rsplit("/", 1)[-1])

    def write_image(self, path: str, cell: Mapping[str, Any] | None) -> None:
        """Write a hub image (``{"bytes", "path"}``) under the benchmark's folder, byte for byte, unless it is there.

        An image that doesn't decode is noted and left out.
        """
        target = self.root / path
        if path in self.undecodable or target.is_file():
            return
        data = (cell or {}).get("bytes")
        problem = "no image data" if not data else image_problem(data)
        if problem:
            self.undecodable[path] = problem
        else:
            write_bytes(target, data)


class Preparer(ABC):
    """How one benchmark's folder is built and checked."""

    name: ClassVar[str]
    """As on the command line."""
    title: ClassVar[str]
    folder: ClassVar[str]
    """Folder below the evaluation directory, as LLaVA spells it."""
    repos: ClassVar[tuple[str, ...]]
    """Names of the data set on the hub, the newest first: lmms-lab's image sets moved in 2026 (lmms-eval #1416)."""
    sources: ClassVar[tuple[str, ...]] = ("hf",)
    """Tried in this order."""
    splits: ClassVar[tuple[str, ...]] = ("val",)
    """The first one is scored locally and is the default."""
    by_hand: ClassVar[str]
    """Where a person gets the data without this program."""

    @abstractmethod
    def files(self, split: str) -> list[ExpectedFile]:
        """The question and ground-truth files of a split, the question file first."""

    @abstractmethod
    def images(self, root: Path, split: str) -> Iterable[str]:
        """Paths below `root` of the images that the split's questions name; the question files exist."""

    @abstractmethod
    def from_hf(self, job: Job) -> None:
        """Build the folder from the hub's data set."""

    def from_official(self, job: Job) -> None:
        """Build the folder from the authors' own files."""
        raise SourceError(f"{self.title} has no official download.")

    def source_order(self, split: str) -> tuple[str, ...]:
        """Sources in the order in which ``--source auto`` tries them."""
        return self.sources

    def build(self, job: Job) -> None:
        """Build the folder from `job.source` and record where it came from.

        Raises:
            SourceError: the source can't be had.
            ValueError: the source is not what it should be.
        """
        (self.from_hf if job.source == "hf" else self.from_official)(job)
        path = job.root / PROVENANCE_FILE
        known = read_json(path, dict) if path.is_file() else {}
        write_json(path, known | {job.split: {"source": job.source, **job.provenance}}, indent=1)


# ------------------------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's list: a file or an image folder, its state and what was counted."""

    path: str
    state: str
    """ok, missing, incomplete, unreadable or count (complete, but not with an official number of rows)."""
    detail: str

    @property
    def ok(self) -> bool:
        return self.state == "ok"


def check(preparer: Preparer, root: Path, split: str) -> list[Finding]:
    """Compare a benchmark's folder with what it should hold."""
    findings = [_check_file(root, expected) for expected in preparer.files(split)]
    if any(finding.state in ("missing", "unreadable") for finding in findings):
        return findings
    names = sorted(set(preparer.images(root, split)))
    absent = [name for name in names if not (root / name).is_file()]
    if names:
        where = sorted({name.rsplit("/", 1)[0] for name in names})
        folder = where[0] if len(where) == 1 else where[0].split("/", 1)[0]
        state = "ok" if not absent else "missing" if len(absent) == len(names) else "incomplete"
        detail = f"{len(names) - len(absent):,} of {len(names):,} files"
        if absent:
            detail += f" (lacks {', '.join(absent[:3])}{', …' if len(absent) > 3 else ''})"
        findings.append(Finding(f"{folder}/", state, detail))
    return findings


def _check_file(root: Path, expected: ExpectedFile) -> Finding:
    path = next((root / name for name in expected.aliases if (root / name).is_file()), root / expected.path)
    official = " or ".join(f"{rows:,}" for rows in expected.rows)
    if not path.is_file():
        return Finding(expected.path, "missing", f"expected {official} rows" if official else "")
    try:
        rows = count_rows(path)
    except ValueError as error:
        return Finding(expected.path, "unreadable", str(error))
    if expected.rows and rows not in expected.rows:
        return Finding(path.relative_to(root).as_posix(), "count", f"{rows:,} rows, officially {official}")
    return Finding(path.relative_to(root).as_posix(), "ok", f"{rows:,} rows")


def count_rows(path: Path) -> int:
    """Rows of a benchmark file: JSON lines, a JSON list or dictionary (also VQA's and TextVQA's), or a TSV.

    Raises:
        ValueError: the file can't be read.
    """
    if path.suffix == ".tsv":
        return len(read_tsv(path, ("index",)))
    if path.suffix == ".jsonl" or path.name.startswith("coco_pope_"):
        return sum(1 for _ in read_jsonl(path))
    value = read_json(path, object)
    if isinstance(value, dict):
        value = next((value[key] for key in ("data", "questions", "annotations", "test") if key in value), value)
    return len(value)


def question_images(root: Path, question_file: str, folder: str) -> Iterator[str]:
    """Image paths of a LLaVA question file (JSON lines with `image`)."""
    for _, row in read_jsonl(root / question_file):
        if row.get("image"):
            yield f"{folder}/{row['image']}"


def question(question_id: int | str, image: str, text: str, category: str = "default") -> dict[str, Any]:
    """One line of a LLaVA question file."""
    return {"question_id": question_id, "image": image, "text": text, "category": category}
