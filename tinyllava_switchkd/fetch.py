"""Fetching files: downloads that resume, archives, and data sets on the Hugging Face hub.

Used for evaluation data (`eval.prepare`) and training data (`data.download`). Two rules hold throughout: a file under
its final name is complete (it is written under another name first and then moved), and interrupted work continues where
it stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyllava_switchkd.cli import first_line
from tinyllava_switchkd.io import atomic_file

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
IDLE_ATTEMPTS = 3
"""A download fails after this many attempts in a row without a new byte."""


class SourceError(OSError):
    """A source can't be reached or doesn't have the file; another source may."""


# ------------------------------------------------------------------------------------------------------ downloads


def download(url: str, path: str | os.PathLike) -> Path:
    """Download `url` to `path`, continuing an earlier attempt; an existing file is kept.

    The unfinished file is `<path>.part`. `<path>.part.tag` holds the server's validator (ETag or date), so that only
    bytes of the same version are joined.

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


def download_into(folder: Path, url: str) -> Path:
    """As `download`, under the whole address as a name, because several archives are called images.zip or test.zip."""
    return download(url, folder / url.split("://", 1)[1].replace("/", "_"))


def _download_once(url: str, part: Path) -> bool:
    """Make one request; return whether the file is complete."""
    have, tag_file = _size(part), _tag_file(part)
    tag = tag_file.read_text() if tag_file.is_file() else ""
    headers = {"User-Agent": "tinyllava-switchkd", "Accept-Encoding": "identity"}
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:
            have = 0
            etag = response.headers.get("ETag", "")
            # A weak ETag does not promise the same bytes.
            tag = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
            tag_file.write_text(tag)
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


# ------------------------------------------------------------------------------------------------------- archives


def extract(archive: str | os.PathLike, wanted: Mapping[str, Path]) -> list[str]:
    """Extract the wanted members of a zip or tar archive; existing files are kept.

    Args:
        wanted: path inside the archive -> file to write. The path may leave out leading folders of the archive:
            ``"a/b.jpg"`` matches the member ``"images/a/b.jpg"``.

    Returns:
        The wanted names that the archive doesn't contain.

    Raises:
        ValueError: the archive is damaged.
    """
    missing = {name for name, target in wanted.items() if not target.is_file()}
    if not missing:
        return []
    archive = Path(archive)
    with _members(archive) as members, tqdm(total=len(missing), unit=" files", desc=archive.name, leave=False) as bar:
        for name, open_member in members:
            match = _match(name, missing)
            if match is None:
                continue
            with open_member() as source, atomic_file(wanted[match]) as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            missing.discard(match)
            bar.update()
            if not missing:
                break
    return sorted(missing)


def _match(name: str, wanted: Collection[str]) -> str | None:
    """The longest wanted path that `name` ends in."""
    parts = name.removeprefix("./").split("/")
    return next((tail for start in range(len(parts)) if (tail := "/".join(parts[start:])) in wanted), None)


@contextlib.contextmanager
def _members(path: Path) -> Iterator[Iterator[tuple[str, Callable[[], Any]]]]:
    """The name of every file in a zip or tar archive, with a function that opens it; damage is a ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no archive {path}.")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                yield ((info.filename, partial(file.open, info)) for info in file.infolist() if not info.is_dir())
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as tar:
                yield ((info.name, partial(tar.extractfile, info)) for info in tar if info.isfile())
        else:
            raise ValueError(f"{path} is neither a zip nor a tar archive; delete it and run again.")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again.") from error


# ------------------------------------------------------------------------------------------------ hub data sets


def hub_folder(
    candidates: Sequence[str], files: Sequence[str], revision: str | None = None, to: Path | None = None
) -> tuple[str, Path]:
    """A local folder with the files of a data set; an interrupted download is continued.

    Without a connection, the copy in the hub's cache is used.

    Args:
        candidates: local folders or hub repositories that hold the data set, tried in this order.
        files: which files of a repository, as patterns of `fnmatch`.
        revision: commit, tag or branch.
        to: folder to download to, instead of the hub's cache.

    Returns:
        the candidate's name and its folder; in the hub's cache the folder is named after the commit.

    Raises:
        SourceError: none of the candidates is available.
    """
    problems = []
    for name in candidates:
        if Path(name).expanduser().is_dir():
            return name, Path(name).expanduser()
        try:
            return name, _snapshot(name, files, revision, to)
        except SourceError as error:
            problems.append(f"{name}: {error}")
    raise SourceError("; ".join(problems))


def _snapshot(name: str, files: Sequence[str], revision: str | None, to: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[*files],
            local_dir=to,
            endpoint=os.environ.get("HF_ENDPOINT") or None,  # the library itself reads it only on import
        )
    except HFValidationError as error:
        raise SourceError(f"neither a folder nor the name of a data set ({first_line(error)})") from error
    except LocalEntryNotFoundError as error:
        raise SourceError(f"the hub can't be reached ({first_line(error.__cause__ or error)})") from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise SourceError(f"not on the hub, or not for your account ({status})") from error
        raise SourceError(first_line(error)) from error
    except (HTTPError, ConnectionError) as error:
        raise SourceError(f"the download broke off ({first_line(error)}); run again to continue") from error
    return Path(folder)


def split_files(split: str, config: str | None = None) -> list[str]:
    """Patterns of the parquet files of a split, in the hub's two layouts.

    These are ``<folder>/<split>-00000-of-00001.parquet`` and, from the automatic conversion,
    ``<config>/<split>/0000.parquet``. Without a config, ``data/``, ``default/`` and the root are searched; with the
    config "*", every folder.
    """
    folders = ("", "data/", "default/") if config is None else (f"{config}/",)
    return [folder + split + end for folder in folders for end in (".parquet", "-*.parquet", "/*.parquet")]


def parquet_rows(paths: Iterable[Path], columns: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of parquet files as dictionaries, with only a few in memory at a time.

    An image column is returned as the hub stores it, ``{"bytes": …, "path": …}``: the original bytes, never re-encoded.

    Args:
        columns: read only these; those that a file does not have are skipped.

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
            raise ValueError(f"{path} is not a readable parquet file ({first_line(error)}); delete it.") from error
