"""Answers that another run has generated already: one file that output folders share, read before anything is asked.

An answer depends on the checkpoint, the way it is asked, the prompt and the pictures, and is found by a digest of
them: two folders with copies of a picture, or two benchmarks with the same question, share it. SQLite keeps the file
whole when a process dies and lets several processes of one machine write to it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from tinyllava_switchkd.io import JsonObject, digest

from .batches import Task

logger = logging.getLogger(__name__)

FILE = "responses.sqlite"
SETTINGS = ("checkpoint_digest", "conversation_template", "image_aspect_ratio", "decoding")
"""What of the `run` object an answer depends on, beside prompt and pictures."""


class ResponseCache:
    """Answers by checkpoint, prompt and pictures.

    Args:
        folder: made if it does not exist; several output folders name the same one.
        run: the `run` object.

    Raises:
        ValueError: the file there is none of these, or cannot be made.
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
        except sqlite3.OperationalError as error:  # no room, or no right to write
            raise ValueError(
                f"The response cache {self.path} cannot be written ({error}); name another folder."
            ) from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no response cache ({error}); delete it or name another folder.") from None

    def get(self, tasks: Iterable[Task]) -> dict[int, str]:
        """Texts of the tasks that have been answered, by their place in `tasks`."""
        found = {}
        for place, task in enumerate(tasks):
            key = self._key(task)
            row = key and self._file.execute("SELECT text FROM responses WHERE key = ?", (key,)).fetchone()
            if row:
                found[place] = row[0]
        return found

    def put(self, answered: Iterable[tuple[Task, str]]) -> None:
        """Keep the answers of a batch; where that fails, a warning says so and no more are kept."""
        if not self._writes:
            return
        rows = [(key, text) for task, text in answered if (key := self._key(task))]
        try:
            with self._file:  # one transaction
                self._file.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:  # no reason to lose an evaluation
            self._writes = False
            logger.warning("The response cache %s is no longer written to: %s.", self.path, error)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _key(self, task: Task) -> str | None:
        """None where a picture cannot be read: such a question has no answer."""
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
