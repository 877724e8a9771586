"""Helpers for benchmarks that build their folder: hub data sets, official archives, images."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyllava_switchkd.data.image_files import image_problem
from tinyllava_switchkd.fetch import SourceError, download_into, extract, hub_folder, parquet_rows, split_files
from tinyllava_switchkd.io import JsonObject, write_bytes

logger = logging.getLogger("tinyllava_switchkd.eval.prepare")


@dataclass
class Build:
    """The build of one benchmark's folder for one split from one source.

    Attributes:
        root: the benchmark's folder.
        split: one of its `prepared_splits`.
        source: "hf" or "official".
        repos: names of the data set on the hub.
        downloads: folder for archives and files of official sites.
        undecodable: image that could not be decoded -> reason.
        provenance: the data's origin, for `PROVENANCE_FILE`.
    """

    root: Path
    split: str
    source: str
    repos: tuple[str, ...]
    downloads: Path
    revision: str | None = None
    undecodable: dict[str, str] = field(default_factory=dict)
    provenance: JsonObject = field(default_factory=dict)

    def rows(
        self, split: str, config: str | None = None, columns: Collection[str] = (), optional: Collection[str] = ()
    ) -> Iterator[dict[str, Any]]:
        """Rows of one split of the hub's data set, with `columns` and those of `optional` that exist.

        Raises:
            SourceError: the data set is not available.
            ValueError: it lacks one of `columns`.
        """
        patterns = split_files(split, config)
        name, folder = hub_folder(self.repos, patterns, self.revision)
        commit = "local" if Path(name).expanduser() == folder else folder.name
        self.provenance |= {"repo_id": name, "revision": commit}
        paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
        which = f"{config}, {split}" if config else split
        if not paths:
            raise SourceError(f"{name} has no parquet files ({which}).")
        logger.info("Reading %s (%s).", name, which)
        for number, row in enumerate(parquet_rows(paths, {*columns, *optional})):
            lacking = [column for column in columns if column not in row]
            if lacking:
                raise ValueError(
                    f"{name}, split {split!r}, row {number} has no column {', '.join(lacking)}; it has "
                    f"{', '.join(row)}. Pass another data set with --repo_id."
                )
            yield row

    def official(self, url: str) -> Path:
        """A file of an official site, downloaded once.

        Raises:
            SourceError: the site refuses it or cannot be reached.
        """
        self.provenance.setdefault("urls", []).append(url)
        return download_into(self.downloads, url)

    def extract(self, url: str, members: Mapping[str, Path]) -> None:
        """Write members of an official archive to their paths; nothing is downloaded if all exist already.

        Raises:
            SourceError: the site refuses the archive or cannot be reached.
            ValueError: it is damaged, or lacks a member.
        """
        if all(self.inside(path, self.downloads).is_file() for path in members.values()):
            return
        archive = self.official(url)
        lacking = extract(archive, members)
        if lacking:
            raise ValueError(f"{archive} lacks {lacking[0]} ({len(lacking)} files in all); delete it and run again.")

    def inside(self, path: str | Path, *other: Path) -> Path:
        """A path inside the benchmark's folder or one of `other`: the data must not name files elsewhere.

        Raises:
            ValueError: it leads out of them.
        """
        target = Path(os.path.normpath(self.root / path))  # the user's own links are followed
        if not any(target.is_relative_to(os.path.normpath(folder)) for folder in (self.root, *other)):
            raise ValueError(f"The data name the file {str(path)!r}, outside {self.root}; it is not written.")
        return target

    def write_image(self, path: str, cell: Mapping[str, Any] | None) -> None:
        """Write a hub image (``{"bytes", "path"}``) into the benchmark's folder, byte for byte, unless it exists.

        An image that does not decode is recorded and left out.
        """
        target = self.inside(path)
        if path not in self.undecodable and not target.is_file() and (data := self.check_image(path, cell)):
            write_bytes(target, data)

    def check_image(self, name: str, cell: Mapping[str, Any] | None) -> bytes | None:
        """The content of a hub image; None if it does not decode, which is recorded under `name`."""
        data = (cell or {}).get("bytes")
        problem = image_problem(data) if data else "no image data"
        if problem:
            self.undecodable[name] = problem
            return None
        return data
