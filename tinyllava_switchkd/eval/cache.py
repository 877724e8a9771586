"""Answers that other runs have generated, in one file that output folders share and that is read before generating.

An answer is found by a digest of all it depends on: the checkpoint, the settings, the prompt and the pictures. So two
folders with copies of a picture, or two benchmarks with the same question, share it. SQLite keeps the file intact when
a process dies and lets several processes of one machine write to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from tinyllava_switchkd.eval.batches import Task
from tinyllava_switchkd.io import JsonObject, digest

logger = logging.getLogger(__name__)

FILE = "responses.sqlite"
SETTINGS = ("checkpoint_digest", "conversation_template", "image_aspect_ratio", "decoding")
"""Keys of the `run` object that an answer depends on, besides prompt and pictures."""


class ResponseCache:
    """Answers by checkpoint, prompt and pictures.

    Args:
        folder: created if it does not exist; runs with the same folder share answers.
        run: the `run` object.

    Raises:
        ValueError: the file is not a response cache, or cannot be created.
    """

    def __init__(self, folder: str | Path, run: JsonObject) -> None:
        self.path = Path(folder) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._settings = [run[name] for name in SETTINGS]
        self._pictures: dict[Path, str] = {}
        self._writes = True
        try:
            self._file = sqlite3.connect(self.path, timeout=60)
            self._file.execute("CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, text TEXT NOT NULL)")
        except sqlite3.OperationalError as error:  # no space, or no write permission
            raise ValueError(
                f"The response cache {self.path} cannot be written ({error}); name another folder."
            ) from None
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is not a response cache ({error}); delete it or name another folder."
            ) from None

    def get(self, tasks: Iterable[Task]) -> dict[int, str]:
        """The texts of the answered tasks, by index in `tasks`."""
        found = {}
        for place, task in enumerate(tasks):
            key = self._key(task)
            row = key and self._file.execute("SELECT text FROM responses WHERE key = ?", (key,)).fetchone()
            if row:
                found[place] = row[0]
        return found

    def put(self, answered: Iterable[tuple[Task, str]]) -> None:
        """Store the answers of a batch. After a failure, a warning is logged and no more answers are stored."""
        if not self._writes:
            return
        rows = [(key, text) for task, text in answered if (key := self._key(task))]
        try:
            with self._file:  # one transaction
                self._file.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:  # must not end the evaluation
            self._writes = False
            logger.warning("The response cache %s is no longer written to: %s.", self.path, error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _key(self, task: Task) -> str | None:
        """The digest of a task; None if a picture cannot be read, since such a question gets no answer."""
        try:
            pictures = [self._picture(image) for image in task.images]
        except OSError:
            return None
        return hashlib.sha256(json.dumps([*self._settings, task.prompt, pictures]).encode()).hexdigest()

    def _picture(self, image: Path | bytes) -> str:
        if isinstance(image, bytes):
            return hashlib.sha256(image).hexdigest()
        if image not in self._pictures:
            self._pictures[image] = digest(image)
        return self._pictures[image]
