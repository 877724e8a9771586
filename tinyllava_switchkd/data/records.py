"""Read LLaVA's JSON with little memory: the file stays on disk, and records are parsed on access.

Mix-665k as a list of dicts takes several gigabytes of Python objects in every rank, and a forked worker copies these
when it touches their reference counts. Here the file is memory-mapped, so that all ranks and workers of a machine share
its pages, and one pass over it stores a few numbers per record.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyllava_switchkd.io import JsonObject

_WINDOW = 4 << 20  # bytes read at a time
_LONGEST_RECORD = 64 << 20  # bytes; a longer record counts as malformed
_SPACE = re.compile(r"[ \t\n\r]*")


class Records:
    """The records of a LLaVA data file, a JSON list or JSON lines (distinguished by the first character).

    Args:
        path: the file.
        visit: called with (index, record) for every record while the file is read.

    Attributes:
        words: [N] words in all turns of each record, as v1 counts them for grouping by length.
        num_images: [N] images of each record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or a record is not in LLaVA's format; names the record and the place.
    """

    def __init__(self, path: str | os.PathLike[str], visit: Callable[[int, JsonObject], None] | None = None):
        self.path = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no data file {self.path}; give the path of a LLaVA JSON (data_path).")
        offsets, words, num_images, repeated = [], [], [], []
        known: set[int] = set()  # hashes, which take a tenth of the memory of the strings
        for index, (start, end, record) in enumerate(scan(self.path)):
            where = f"Record {index} of {self.path}"
            offsets.append((start, end))
            identity = hash(_id_in(record, index))
            if identity in known:
                repeated.append(index)
            known.add(identity)
            num_images.append(len(images_of(record, where)))
            words.append(_count_words(record, where))
            if visit is not None:
                visit(index, record)
        if not offsets:
            raise ValueError(f"The data file {self.path} holds no record.")
        self._offsets = np.array(offsets, dtype=np.int64)
        self.words = np.array(words, dtype=np.int32)
        self.num_images = np.array(num_images, dtype=np.int32)
        self._repeated = frozenset(repeated)
        self._map = self._open()

    def _open(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> JsonObject:
        start, end = self._offsets[index]
        return json.loads(self._map[start:end])

    def id_of(self, index: int, record: JsonObject | None = None) -> str:
        """A unique name of a record: its "id" as a string, or its index if it has none.

        LLaVA's own files use some ids several times; from the second time on, ``#`` and the index are appended.
        """
        name = _id_in(self[index] if record is None else record, index)
        return f"{name}#{index}" if index in self._repeated else name

    def __iter__(self) -> Iterator[JsonObject]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}  # a spawned worker maps the file itself

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._map = self._open()


def _id_in(record: JsonObject, index: int) -> str:
    identity = record.get("id")
    return str(index if identity is None else identity)


def images_of(record: JsonObject, where: str) -> list[str]:
    """The image files of a record: "image" is a name or a list of names, or absent.

    Raises:
        ValueError: it is something else; `where` names the record.
    """
    images = record.get("image")
    if images is None:
        return []
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise ValueError(f"{where}: 'image' must be a file name or a list of file names, not {record['image']!r}.")
    return images


def _count_words(record: JsonObject, where: str) -> int:
    try:
        return sum([len(turn["value"].split()) for turn in record["conversations"]])
    except (TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{where}: 'conversations' must be a list of {{'from': 'human' or 'gpt', 'value': text}}, "
            f"not {str(record.get('conversations'))[:80]!r}."
        ) from None


def scan(path: str) -> Iterator[tuple[int, int, JsonObject]]:
    """Read a JSON list of objects, or JSON lines, object by object.

    The file is scanned as Latin-1, in which a character is a byte. JSON's syntax consists of ASCII characters only.

    Yields:
        the first and the last byte (exclusive) of an object, and the object.

    Raises:
        ValueError: not JSON, not UTF-8, or something other than objects, with the record and the byte.
    """
    decode_json = json.JSONDecoder().raw_decode
    with open(path, "rb") as file:
        text = _Window(path, file)
        is_list = text.skip_space() == "["
        if is_list:
            text.position += 1
        count = 0
        while True:
            character = text.skip_space()
            if character == ("]" if is_list else ""):
                break
            if is_list and count and character:
                if character != ",":
                    raise ValueError(
                        f"{path}: a comma or the end of the list should follow record {count - 1} at byte {text.byte}, "
                        f"not {character!r}."
                    )
                text.position += 1
                character = text.skip_space()
            if not character:
                raise ValueError(f"{path} ends in the middle of its list, after {count} records; it may be cut off.")
            start = text.byte
            where = f"{path}: record {count}, at byte {start},"
            if character != "{":
                raise ValueError(
                    f"{where} is not an object but begins with {character!r}; a LLaVA JSON is a list of objects."
                )
            while True:
                try:
                    record, end = decode_json(text.text, text.position)
                    found = text.text[text.position : end]
                    if not found.isascii():
                        record = json.loads(found.encode("latin-1").decode())
                    break
                except RecursionError:
                    raise ValueError(f"{where} is nested too deeply to be read.") from None
                except json.JSONDecodeError as error:
                    place = start + error.pos - text.position  # before `grow` moves the window
                    if not text.grow():
                        raise ValueError(f"{where} is not JSON: {error.msg} (at byte {place}).") from None
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not in UTF-8 ({error.reason}); save the file as UTF-8.") from None
                except ValueError as error:  # a number with thousands of digits
                    raise ValueError(f"{where} cannot be read: {error}.") from None
            text.position = end
            yield start, text.byte, record
            count += 1
        text.position += 1
        if is_list and text.skip_space():
            raise ValueError(f"{path} continues after the end of its list, at byte {text.byte}.")


class _Window:
    """A part of a file, one character per byte, that moves along with `position`."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._start = 0  # the window's first byte
        self.text = ""
        self.position = 0
        self.grow()
        if self.text.startswith("\xef\xbb\xbf"):  # a byte-order mark
            self.position = 3

    @property
    def byte(self) -> int:
        """Offset of the current character in the file."""
        return self._start + self.position

    def skip_space(self) -> str:
        """Move to the next character that is not whitespace and return it; '' at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.position)
            assert space is not None  # it may be empty
            self.position = space.end()
            if self.position < len(self.text):
                break
            if not self.grow():
                return ""
        character = self.text[self.position : self.position + 4].encode("latin-1").decode(errors="replace")[0]
        if character == "\ufffd":
            raise ValueError(f"{self._path} is not JSON in UTF-8 (byte {self.byte}); save it as UTF-8.")
        return character

    def grow(self) -> bool:
        """Drop the characters before the current one and read more; False if there is nothing more to read."""
        if len(self.text) - self.position > _LONGEST_RECORD:
            return False
        chunk = self._file.read(_WINDOW)
        self._start = self.byte
        self.text, self.position = self.text[self.position :] + chunk.decode("latin-1"), 0
        return bool(chunk)
