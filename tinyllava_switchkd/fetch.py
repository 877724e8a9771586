"""Files from elsewhere: downloads that resume, archives, data sets on the Hugging Face hub, and atomic writes.

Evaluation data (`eval.prepare`) and training data (`data.download`) come through here. Nothing below knows what a file
is about. Two rules hold throughout: a file under its final name is complete (everything is written beside it first and
then moved), and work that was interrupted continues where it stopped.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
IDLE_ATTEMPTS = 3
"""Attempts in a row that bring no new byte before a download is given up."""


class SourceError(OSError):
    """A primary source can't be reached or doesn't have what is asked of it; another source may."""


# ---------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only if the block ends without an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file in one step."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = None) -> None:
    """Write one JSON document (UTF-8, text left readable)."""
    write_bytes(path, (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode())


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    with atomic_file(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def image_problem(image: bytes | Path) -> str | None:
    """Why an image, or the bytes of one, doesn't decode; None if it does."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return _first_line(error)
    return None


# ------------------------------------------------------------------------------------------------------ downloads


def download(url: str, path: str | os.PathLike) -> Path:
    """Download `url` to `path`, continuing an earlier attempt; a file that is there already is kept.

    The unfinished file is `<path>.part`, with the server's validator (ETag or date) in `<path>.part.tag`: only bytes of
    the same version are joined.

    Raises:
        SourceError: the server refuses the file, or can't be reached.
    """
    path = Path(path)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    idle = 0
    while True:
        before = _size(part)
        try:
            if _download_once(url, part):
                break
            reason: object = "the connection closed early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part doesn't fit what the server has now
                part.unlink(missing_ok=True)
            elif error.code not in (408, 429) and error.code < 500:
                raise SourceError(f"{url} answers {error.code} {error.reason}.") from error
            reason = f"{error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
        idle = 0 if _size(part) > before else idle + 1
        if idle >= IDLE_ATTEMPTS:
            raise SourceError(f"{url} can't be downloaded ({reason}); run again to continue from {part.name}.")
        logger.info("%s: %s; trying again.", url, reason)
        time.sleep(2.0 ** (idle - 1))
    _tag_file(part).unlink(missing_ok=True)
    os.replace(part, path)
    return path


def _download_once(url: str, part: Path) -> bool:
    """One request; returns whether the file is complete."""
    have, tag = _size(part), _read_tag(part)
    headers = {"User-Agent": "tinyllava-switchkd", "Accept-Encoding": "identity"}
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:
            have = 0
            etag = response.headers.get("ETag", "")
            # A weak ETag promises the same meaning, not the same bytes.
            tag = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
            _tag_file(part).write_text(tag)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(
                total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem, leave=False
            ) as bar,
        ):
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or _size(part) == total


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _read_tag(part: Path) -> str:
    return _tag_file(part).read_text() if _tag_file(part).is_file() else ""


# ------------------------------------------------------------------------------------------------------- archives


def extract(archive: str | os.PathLike, wanted: Mapping[str, Path]) -> list[str]:
    """Write the wanted members of a zip or tar archive to their places; files that are there already are kept.

    Args:
        wanted: path inside the archive -> file to write. The path may leave out leading folders of the archive:
            ``"a/b.jpg"`` matches the member ``"images/a/b.jpg"``.

    Returns:
        The wanted names that the archive doesn't hold.

    Raises:
        ValueError: the archive is damaged.
    """
    missing = {name for name, target in wanted.items() if not target.is_file()}
    if not missing:
        return []
    archive = Path(archive)
    with _Archive(archive) as opened:
        bar = tqdm(total=len(missing), unit=" files", desc=archive.name, leave=False)
        for name, member in opened.members():
            match = _match(name, missing)
            if match is None:
                continue
            with opened.open(member) as source, atomic_file(wanted[match]) as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            missing.discard(match)
            bar.update()
            if not missing:
                break
        bar.close()
    return sorted(missing)


def _match(name: str, wanted: Collection[str]) -> str | None:
    """The longest tail of `name` that is wanted."""
    parts = name.removeprefix("./").split("/")
    return next((tail for start in range(len(parts)) if (tail := "/".join(parts[start:])) in wanted), None)


class _Archive:
    """A zip or tar archive, opened for reading; every sign of damage is one ValueError."""

    DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error)

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Archive:
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no archive {self.path}.")
        if not (zipfile.is_zipfile(self.path) or tarfile.is_tarfile(self.path)):
            raise ValueError(f"{self.path} is neither a zip nor a tar archive; delete it and run again.")
        self._zip = zipfile.ZipFile(self.path) if zipfile.is_zipfile(self.path) else None
        self._tar = None if self._zip else tarfile.open(self.path)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        (self._zip or self._tar).close()
        if isinstance(error, self.DAMAGE):
            raise ValueError(f"{self.path} is damaged ({error}); delete it and run again.") from error

    def members(self) -> Iterator[tuple[str, Any]]:
        if self._zip:
            yield from ((info.filename, info) for info in self._zip.infolist() if not info.is_dir())
        else:
            yield from ((info.name, info) for info in self._tar if info.isfile())

    def open(self, member: Any) -> BinaryIO:
        return self._zip.open(member) if self._zip else self._tar.extractfile(member)


# ------------------------------------------------------------------------------------------------ hub data sets


@dataclass(frozen=True)
class HubDataset:
    """A data set repository at one commit, or a local folder with the same files."""

    repo_id: str
    revision: str
    """Commit of the repository; "local" for a folder."""
    files: tuple[str, ...]
    folder: Path | None = None

    def parquet(self, split: str, config: str | None = None) -> list[str]:
        """The parquet files of a split, in order.

        Both layouts of the hub are read: ``<folder>/<split>-00000-of-00001.parquet`` and the automatic conversion's
        ``<config>/<split>/0000.parquet``. Without a config, files lie in ``data/``, ``default/`` or the root; with "*"
        in any folder.

        Raises:
            SourceError: the data set has none.
        """
        folder = "(?:(?:data|default)/)?" if config is None else f"{re.escape(config)}/"
        folder = "(?:[^/]+/)?" if config == "*" else folder
        pattern = re.compile(rf"{folder}{re.escape(split)}(?:-[^/]*|/[^/]*)?\.parquet")
        names = sorted(name for name in self.files if pattern.fullmatch(name))
        if not names:
            where = f"configuration {config!r}, " if config else ""
            raise SourceError(f"{self.repo_id} has no parquet files for {where}split {split!r}.")
        return names

    def fetch(self, name: str, folder: Path | None = None) -> Path:
        """A file of the data set on the local disk; hub files are downloaded, or an earlier download is continued.

        Args:
            folder: where to, in place of the hub's cache.

        Raises:
            SourceError: the hub can't be reached or doesn't have the file.
        """
        if self.folder is not None:
            return self.folder / name
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HTTPError

        try:
            return Path(
                hf_hub_download(
                    self.repo_id,
                    name,
                    repo_type="dataset",
                    revision=self.revision,
                    local_dir=folder,
                    endpoint=_hub_endpoint(),
                )
            )
        except (HTTPError, EntryNotFoundError, ConnectionError) as error:
            raise SourceError(f"{name} of {self.repo_id} can't be downloaded: {_first_line(error)}") from error


def open_hub_dataset(candidates: Sequence[str], revision: str | None = None) -> HubDataset:
    """The first of several names under which a data set is found: a local folder, or a repository of the hub.

    Without a connection, a copy in the hub's cache is used.

    Raises:
        SourceError: none of them can be had.
    """
    problems = []
    for repo_id in candidates:
        folder = Path(repo_id).expanduser()
        if folder.is_dir():
            files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            return HubDataset(repo_id, "local", tuple(files), folder)
        try:
            return _hub_dataset(repo_id, revision)
        except SourceError as error:
            problems.append(f"{repo_id}: {error}")
    raise SourceError("; ".join(problems))


def _hub_dataset(repo_id: str, revision: str | None) -> HubDataset:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        info = HfApi(endpoint=_hub_endpoint()).dataset_info(repo_id, revision=revision, timeout=TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise SourceError(f"neither a folder nor the name of a data set ({_first_line(error)})") from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise SourceError(f"not on the hub, or not for your account ({status})") from error
        raise SourceError(_first_line(error)) from error
    except (HTTPError, OSError) as error:
        try:
            folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise SourceError(f"the hub can't be reached ({_first_line(error)})") from error
        logger.warning("The hub can't be reached; %s is read from the cache.", repo_id)
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        return HubDataset(repo_id, folder.name, tuple(files), folder)
    return HubDataset(repo_id, info.sha, tuple(sibling.rfilename for sibling in info.siblings or ()))


def _hub_endpoint() -> str | None:
    """Read at the time of the call: huggingface_hub itself reads HF_ENDPOINT only once, when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parquet_rows(paths: Iterable[Path], columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of parquet files as dictionaries, a few in memory at a time.

    An image column arrives as the hub stores it, ``{"bytes": …, "path": …}``: the file's own bytes, never re-encoded.

    Args:
        columns: read only these, as far as the file has them.

    Raises:
        ValueError: a file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = [name for name in file.schema_arrow.names if columns is None or name in columns]
                for batch in file.iter_batches(batch_size=64, columns=names):
                    yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a readable parquet file ({_first_line(error)}); delete it.") from error
