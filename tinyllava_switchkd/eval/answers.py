"""The answers of a run on disk: appended as they are made, kept after a kill, merged only when none is missing.

A folder holds one run of one benchmark:

    answers.jsonl           the answers in the question file's order; exists only once the run is complete
    answers.part-0.jsonl    the answers of process 0 so far (one file per process, removed by the merge)
    run.json                how the answers are made
    .lock                   process r locks its byte r while it lives
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from tinyllava_switchkd.eval.benchmarks import Question, answer_key
from tinyllava_switchkd.eval.benchmarks.files import require
from tinyllava_switchkd.io import JsonObject, read_json, read_jsonl, write_json, write_jsonl

logger = logging.getLogger(__name__)

Key = tuple[str, str]

SETTINGS = (
    "benchmark",
    "split",
    "checkpoint_digest",
    "options",
    "prompt_protocol",
    "conversation_template",
    "image_aspect_ratio",
    "decoding",
)
"""Settings that all answers in one folder must share."""

SYNC_SECONDS = 5
"""Seconds between two fsyncs, which are slow. Every batch is passed to the operating system at once."""


def check_keys(questions: Sequence[Question], source: str | Path) -> None:
    """Check that an answers file can tell all questions apart.

    Raises:
        ValueError: two different questions have the same id and prompt.
    """
    seen: dict[Key, tuple[str | None, str]] = {}
    for question in questions:
        pair = question.image_key, question.prompt
        if seen.setdefault(question.key, pair) != pair:
            raise ValueError(
                f"Two questions in {source} have the id {question.question_id!r} and the same text, but different "
                f"images, so their answers could not be told apart. Give them different ids."
            )


class AnswerFolder:
    """The files of one run, see the module's docstring.

    Args:
        folder: created if it does not exist.

    Raises:
        ValueError: it is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"The output folder {self.folder} is a file; name a folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.merged = self.folder / "answers.jsonl"
        self.run_file = self.folder / "run.json"
        self._lock: int | None = None

    def part(self, process: int) -> Path:
        """The file that a process appends to."""
        return self.folder / f"answers.part-{process}.jsonl"

    @property
    def part_files(self) -> list[Path]:
        """The files of all processes, of this run and of interrupted ones."""
        return sorted(self.folder.glob("answers.part-*.jsonl"))

    # -------------------------------------------------------------------------------------------- one run at a time

    def lock(self, process: int) -> None:
        """Lock this process's byte of the lock file until the process ends, however it ends.

        The kernel releases it when the process dies; forked processes do not inherit it.

        Raises:
            ValueError: another run writes to the folder.
            OSError: the file system has no locks.
        """
        if self._lock is None:
            self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, process)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"Another run is writing to {self.folder}; wait for its end, or choose another folder."
                ) from None
            raise OSError(
                error.errno, f"{self.folder} cannot be locked ({error.strerror}); choose a folder on a local disk"
            ) from None

    def unlock(self) -> None:
        """Release the lock before the process ends."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def wait_for(self, process: int) -> None:
        """Wait until another process of this run has ended, however it ended. The caller must hold its own byte."""
        assert self._lock is not None, "the caller holds a byte of its own"
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, process)
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, process)

    # -------------------------------------------------------------------------------------------- what the run is

    def claim(self, run: JsonObject) -> None:
        """Write `run.json`. What `finish` last wrote of a part of the split stays until it writes again.

        Raises:
            ValueError: the folder holds answers that were made with other settings.
        """
        if self.merged.is_file() or any(part.stat().st_size for part in self.part_files):
            if not self.run_file.is_file():
                raise ValueError(
                    f"{self.folder} holds answers, but no run.json that says how they were made; move them away, or "
                    f"choose another folder."
                )
            known = read_json(self.run_file)
            for name in SETTINGS:
                if (known.get(name) or {}) != (run.get(name) or {}):
                    raise ValueError(
                        f"The answers in {self.folder} were made with {name} = {known.get(name)!r}, and now it is "
                        f"{run.get(name)!r}; move them away, or choose another folder."
                    )
            run = known | run
        write_json(self.run_file, run)

    # ---------------------------------------------------------------------------------------------------- the rows

    def repair(self) -> None:
        """Cut off an incomplete last line, left by a killed process or an interrupted copy."""
        for path in (self.merged, *self.part_files):
            if not path.is_file():
                continue
            with path.open("r+b") as file:
                data = file.read()
                end = data.rfind(b"\n") + 1
                if end == len(data):
                    continue
                try:
                    json.loads(data[end:])  # complete except for its line feed
                    file.write(b"\n")
                except ValueError:
                    logger.warning("%s ends in half a line (the process was killed); it is dropped.", path)
                    file.truncate(end)

    def read(self) -> dict[Key, list[JsonObject]]:
        """All answers so far, by `answer_key`.

        Raises:
            ValueError: a line is not an answer.
        """
        rows: dict[Key, list[JsonObject]] = {}
        for path in (self.merged, *self.part_files):
            if not path.is_file():
                continue
            try:
                for where, row in read_jsonl(path, what="answers file"):
                    require(row, ("question_id", "prompt", "text"), where)
                    rows.setdefault(answer_key(row), []).append(row)
            except ValueError as error:
                raise ValueError(
                    f"{error} An evaluation does not write such a line: delete the line (its question is asked "
                    f"again) or the file, and repeat the command."
                ) from None
        return rows

    @contextlib.contextmanager
    def writer(self, process: int) -> Iterator[AnswerWriter]:
        """Append to a process's part."""
        with self.part(process).open("a", encoding="utf-8") as file:
            yield AnswerWriter(file)

    def merge(self, rows: Sequence[JsonObject]) -> None:
        """Replace the part files by `answers.jsonl`. At every moment each answer is in one or the other."""
        write_jsonl(self.merged, rows)
        for part in self.part_files:
            part.unlink()


class AnswerWriter:
    """Appends rows to an open file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._synced = time.monotonic()

    def write(self, rows: Iterable[JsonObject]) -> None:
        """Append rows. They now survive a kill, and a power failure once they are synced (`SYNC_SECONDS`).

        Raises:
            OSError: for example, the disk is full.
        """
        try:
            self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()  # closing it later would fail again and hide the reason
            reason = f"{error.strerror}; the earlier answers are kept: solve this and repeat the command"
            raise OSError(error.errno, reason, self._file.name) from None
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def split_answered(
    questions: Sequence[Question], rows: Mapping[Key, Sequence[JsonObject]]
) -> tuple[list[Question], list[Question]]:
    """Questions that have an answer and those that have none; equal questions need one answer each."""
    left = Counter({key: len(found) for key, found in rows.items()})
    answered, pending = [], []
    for question in questions:
        if left[question.key] > 0:
            left[question.key] -= 1
            answered.append(question)
        else:
            pending.append(question)
    return answered, pending


def in_question_order(
    questions: Sequence[Question], rows: Mapping[Key, Sequence[JsonObject]], folder: Path
) -> list[JsonObject]:
    """One row for each answered question, in the question file's order.

    Raises:
        ValueError: a row answers none of the questions.
    """
    left = {key: list(found) for key, found in rows.items()}
    ordered = [left[question.key].pop(0) for question in questions if left.get(question.key)]
    known = {question.key for question in questions}
    for key in left:
        if key not in known:
            raise ValueError(
                f"{folder} holds an answer to the question {key[0]!r}, which is not in the data: they have changed "
                f"since. Move the answers away, or choose another folder."
            )
    return ordered
