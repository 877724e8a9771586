"""Runs stages: scripts in parallel lanes, one progress bar with the time left, and nothing twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from .plan import Stage, fingerprint

STARTUP_COST = 350
"""What starting a script costs (imports, mostly), in steps of plain fine-tuning."""

_PROGRESS = re.compile(rb"(\d+)/(\d+) \[")  # tqdm's "120/800 [00:05<..."
_TAIL = 4096


class StageError(RuntimeError):
    """A script failed; the message says which and where its log is."""


class Interrupted(RuntimeError):
    """Another lane failed, so this one was stopped."""


def stamp_of(path: Path) -> Path:
    """Where it is noted what a folder or file was made from."""
    return path / ".quickstart.json" if path.suffix != ".json" else path.with_suffix(".stamp.json")


def read_stamp(path: Path) -> dict | None:
    """The note on a finished folder or file; None if it is not finished."""
    try:
        note = json.loads(stamp_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if path.exists() else None


def write_stamp(path: Path, mark: str, **note: object) -> None:
    """Note that a folder or file is finished."""
    stamp_of(path).write_text(json.dumps({"fingerprint": mark, **note}) + "\n", encoding="utf-8")


def is_made(path: Path, mark: str) -> bool:
    """Whether a folder or file is there, finished, and made from what it would be made from now."""
    note = read_stamp(path)
    return note is not None and note["fingerprint"] == mark


def stage_mark(stage: Stage) -> str:
    """Fingerprint of a stage: its call and all that it reads.

    Raises:
        StageError: something that it reads is not there.
    """
    marks = []
    for need in stage.needs:
        note = read_stamp(need)
        if note is None:
            raise StageError(f"{stage.title} needs {need}, which is not there.")
        marks.append(note["fingerprint"])
    return fingerprint(stage.script, stage.arguments, sorted(stage.environment.items()), marks)


class Runner:
    """Runs stages in lanes and shows how far they are.

    Args:
        logs: folder for what the scripts print.
        python: interpreter that the scripts use.
        lanes: how many scripts may run at once.
        quiet: no progress bar.
    """

    def __init__(self, logs: Path, python: str = sys.executable, lanes: int = 2, quiet: bool = False) -> None:
        self.logs, self.python, self.lanes = logs, python, max(1, lanes)
        self._bar = tqdm(total=1, disable=quiet, unit="", dynamic_ncols=True, bar_format=_BAR, mininterval=0.5)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._active: dict[str, str] = {}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def expect(self, cost: float) -> None:
        """Add to what is still to be done, for the estimate of the time left."""
        with self._lock:
            self._bar.total = (self._bar.total if self._bar.n or self._bar.total > 1 else 0) + cost
            self._bar.refresh()

    def advance(self, cost: float, doing: tuple[str, str] | None = None) -> None:
        """Note what is done, and what a lane is doing now."""
        with self._lock:
            if doing is not None:
                self._active[doing[0]] = doing[1]
            self._bar.set_description_str(", ".join(text for text in self._active.values() if text), refresh=False)
            self._bar.update(min(cost, self._bar.total - self._bar.n))

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        with self._lock:
            if not self._bar.disable:
                self._bar.write(line, file=sys.stdout)

    def run(self, lanes: Sequence[Sequence[Callable[[Runner], object]]]) -> None:
        """Run the jobs of each lane one after another, several lanes at once.

        Raises:
            StageError: a script failed; the others have been stopped.
        """
        with ThreadPoolExecutor(self.lanes) as pool:
            futures = [pool.submit(self._lane, jobs) for jobs in lanes]
            try:
                errors = [future.exception() for future in futures]
            except BaseException:
                self._stop.set()  # Ctrl-C: the lanes stop their scripts
                raise
        failures = [error for error in errors if error is not None]
        if failures:
            raise next((error for error in failures if not isinstance(error, Interrupted)), failures[0])

    def _lane(self, jobs: Sequence[Callable[[Runner], object]]) -> None:
        try:
            for job in jobs:
                if self._stop.is_set():
                    raise Interrupted("stopped")
                job(self)
        except BaseException:
            self._stop.set()
            raise

    def stage(self, stage: Stage) -> float:
        """Run a stage unless its output is there already.

        Returns:
            the seconds it trained.

        Raises:
            StageError: the script failed.
        """
        cost = stage.steps * stage.cost + STARTUP_COST
        mark = stage_mark(stage)
        if is_made(stage.output, mark):
            self.advance(cost)
            return read_stamp(stage.output)["seconds"]
        shutil.rmtree(stage.output, ignore_errors=True)
        log = self.logs / f"{stage.output.name}.log"
        started = time.monotonic()
        self.script(stage.title, stage.command, stage.environment, log, cost, stage.steps)
        seconds = training_seconds(stage.output)
        write_stamp(stage.output, mark, seconds=seconds, steps=stage.steps)
        wall = time.monotonic() - started
        self.say(f"  {stage.title:<40} {stage.steps:>5} steps  {seconds:6.1f} s  ({wall:.0f} s with start-up)")
        return seconds

    def script(
        self,
        title: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        cost: float,
        steps: int | None = None,
    ) -> None:
        """Run a script to its end, its words going to a log.

        Args:
            title: for people.
            command: what to run.
            environment: what to set besides what is set here.
            log: file.
            cost: of all of it, in steps of plain fine-tuning.
            steps: length of the progress bar in the log that tells how far it is; None if there is none.

        Raises:
            StageError: it failed.
            Interrupted: another lane did.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        done = 0.0
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, "PYTHON": self.python},
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    if self._stop.wait(0.5):
                        raise Interrupted(f"{title} was stopped.")
                    share, text = _progress(log, steps) if steps else (0.0, "")
                    now = max(done, share * (cost - STARTUP_COST) + (STARTUP_COST if share else 0.0))
                    self.advance(now - done, (title, f"{title} {text}".strip()))
                    done = now
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
                self.advance(0.0, (title, ""))
        if process.returncode != 0:
            last = "\n".join("    " + line for line in _last_lines(log))
            raise StageError(f"{title} failed (exit code {process.returncode}); its log is {log}:\n{last}")
        self.advance(cost - done)


def training_seconds(output: Path) -> float:
    """Seconds that a run trained, by its own clock (imports and saving not counted).

    Raises:
        StageError: the run left no state.
    """
    try:
        history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return float(next(row["train_runtime"] for row in reversed(history) if "train_runtime" in row))
    except (OSError, ValueError, KeyError, StopIteration):
        raise StageError(f"{output} holds no finished training run.") from None


_BAR = "{percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left  {desc}"


def _progress(log: Path, steps: int) -> tuple[float, str]:
    """How far a script is, from the last progress bar in its log whose length is the run's."""
    with open(log, "rb") as stream:
        stream.seek(max(0, os.path.getsize(log) - _TAIL))
        found = [(int(done), int(total)) for done, total in _PROGRESS.findall(stream.read())]
    counts = [done for done, total in found if total == steps]
    return (counts[-1] / steps, f"{counts[-1]}/{steps}") if counts else (0.0, "starting")


def _last_lines(log: Path, count: int = 12) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-count:]
