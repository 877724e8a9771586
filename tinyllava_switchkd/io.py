"""Files: JSON is read with clear errors, and every write is atomic. Needs only the standard library."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

StrPath = str | os.PathLike

JsonObject = dict[str, Any]
"""A JSON object as `json` reads it, with unchecked fields."""


@contextlib.contextmanager
def atomic_file(path: StrPath) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only if the block ends without an exception.

    The content is synced to disk before the file is renamed, so that a power cut leaves either the old or the new file.

    Raises:
        OSError: the file cannot be written; the error has its name.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.filename in (None, str(unfinished)):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_bytes(path: StrPath, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: StrPath, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: StrPath, value: object, *, indent: int | None = 2, sort_keys: bool = False) -> None:
    """Write one JSON document atomically (UTF-8, non-ASCII characters unescaped).

    Raises:
        ValueError: the value contains a NaN or an infinity, which JSON cannot represent.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys, allow_nan=False)
    write_text(path, text + "\n")


def write_jsonl(path: StrPath, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object per line, atomically."""
    with atomic_file(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_text(path: StrPath, *, what: str = "file") -> str:
    """A file's text, without the byte-order mark that some editors write.

    Args:
        path: the file.
        what: what to call it in errors.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: it is not UTF-8.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"The {what} {path} is a folder; name a file.")
    if not path.is_file():
        raise FileNotFoundError(f"The {what} {path} does not exist.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8 or fetch it again."
        ) from None


def read_json(path: StrPath, kind: type = dict, *, what: str = "file") -> Any:
    """The value in a JSON file, which must be of type `kind` (dict or list).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, is nested too deeply, or holds another type.
    """
    text = read_text(path, what=what)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg}); it may be cut off, fetch it again.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read; correct it or fetch it again.") from None
    if not isinstance(value, kind):
        found, expected = type(value).__name__, "a list" if kind is list else "an object of fields"
        raise ValueError(f"{path} holds a JSON {found} where {expected} is expected; correct it or fetch it again.")
    return value


def read_jsonl(path: StrPath, *, what: str = "file") -> Iterator[tuple[str, JsonObject]]:
    """Objects of a JSON-lines file, each with its position ("FILE, line N"); empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: a line is not a JSON object.
    """
    # Split at line feeds only: str.splitlines would also split at U+2028, which JSON strings may contain.
    for number, line in enumerate(read_text(path, what=what).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error.msg}).") from None
        except RecursionError:
            raise ValueError(f"{where}: nested too deeply to be read.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object.")
        yield where, row


def digest(path: StrPath) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def digest_of_files(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the relative paths and contents of several files of a folder."""
    total = hashlib.sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        total.update(f"{name} {digest(file)}\n".encode())
    return total.hexdigest()
