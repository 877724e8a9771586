"""Reads benchmark files; the error for a defect is one sentence that names the file and the line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tinyllava_switchkd.io import write_text


def find_file(data_dir: str | Path, names: Sequence[str]) -> Path | None:
    """The first of `names` (relative to `data_dir`) that is a file, or None."""
    return next((Path(data_dir) / name for name in names if (Path(data_dir) / name).is_file()), None)


def need_file(data_dir: str | Path, names: Sequence[str], what: str, benchmark: str) -> Path:
    """As `find_file`, but a missing file is an error; `what` is for the message.

    Raises:
        FileNotFoundError: there is none.
    """
    path = find_file(data_dir, names)
    if path is None:
        raise missing_file(data_dir, names, what, benchmark)
    return path


def missing_file(data_dir: str | Path, names: Sequence[str], what: str, benchmark: str) -> FileNotFoundError:
    """The error for a missing file: which file is expected where, and the remedy."""
    lacking = f"No {what} in {data_dir}: expected {' or '.join(names)}."
    if not Path(data_dir).is_dir():
        lacking = f"The data folder {data_dir} does not exist."
    return FileNotFoundError(f"{lacking} {prepare_hint(benchmark)}.")


def prepare_hint(benchmark: str) -> str:
    """The remedy for missing data."""
    return f"Build it with `python -m tinyllava_switchkd.eval.prepare {benchmark}`"


def sentence_of(error: Exception) -> str:
    """An error's text for the user; that of the operating system is given without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.strerror}." if error.filename is None else f"{error.filename}: {error.strerror}."


def read_tsv(path: str | Path, required: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Rows of a tab-separated table with a header, each with its position; cells are strings, quoted as by pandas.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a required column is missing, or a row has more or fewer cells than the header.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The table {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    csv.field_size_limit(2**31 - 1)  # a cell holds a whole image in base64
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        try:
            absent = [column for column in required if column not in (reader.fieldnames or ())]
            if absent:
                raise ValueError(f"{path}, line 1: no column {', '.join(absent)}; is it the benchmark's own table?")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    cells = sum(len(value) if key is None else value is not None for key, value in row.items())
                    raise ValueError(f"{where}: {cells} cells, but the header has {len(reader.fieldnames or ())}.")
                rows.append((where, row))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from None
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}.") from None
    return rows


def picture_path(folder: Path, name: str, where: str) -> Path:
    """Path of the picture that a question names. It must be in the folder, since question files are often from others.

    Raises:
        ValueError: the name leads out of the folder.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise ValueError(f"{where}: the picture {name!r} lies outside {folder}; pictures are only read from there.")
    return folder / name


_KINDS = {str: "a string", int: "an integer", list: "a list", dict: "an object"}

ID = (str, int)
"""The types of a question's id."""


def require(row: object, keys: Sequence[str] | Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Check that an object has the given keys, with values of the right type.

    Args:
        row: the object.
        keys: names, or names with the type (or types) of their values.
        where: file and position, for the message.

    Raises:
        ValueError: the row is not an object, a key is missing, or a value has another type.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object.")
    absent = [key for key in keys if key not in row]
    if absent:
        raise ValueError(f"{where}: no {' and no '.join(repr(key) for key in absent)}.")
    if isinstance(keys, Mapping):
        for key, kind in keys.items():
            value = row[key]
            if not isinstance(value, kind) or isinstance(value, bool):
                expected = " or ".join(_KINDS[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
                raise ValueError(f"{where}: {key!r} is {_shown(value)}, not {expected}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_upload(path: str | Path, data: object) -> None:
    """Write a server's JSON file, byte for byte as the official converters do."""
    write_text(path, json.dumps(data, allow_nan=False))
