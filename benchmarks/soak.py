"""A long run of a tiny model: memory, open files, threads and the output folder must not grow.

    python -m benchmarks.soak --minutes 5

A tiny student learns from a tiny teacher, with a checkpoint every few steps, until the time is over; then SIGTERM ends
it, as a cluster would. Prints the process's resources after a tenth of the time and at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._table import markdown
from benchmarks.kills import CONTEXT, child, run

GROWTH = 1.1
"""Largest ratio of the memory at the end to that after a tenth of the time that counts as constant."""


def held(process: int, folder: Path) -> dict[str, float]:
    """A process's current resources: steps done, resident MiB, open files, threads, MiB of its folder."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":\t" in line
    )
    steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size
        except OSError:  # a checkpoint that is being removed
            continue
    return {
        "steps": max(steps, default=0),
        "memory, MiB": int(status["VmRSS"].split()[0]) / 1024,
        "open files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(status["Threads"]),
        "folder, MiB": size / 2**20,
    }


def measure(minutes: float, folder: Path) -> tuple[dict[str, float], dict[str, float], int]:
    """The resources after a tenth of the time and at the end, and the exit code."""
    from tests.train.world import command_line, write_world

    world = write_world(folder / "world")
    teacher = folder / "teacher"
    assert run(command_line(world, teacher, model_name_or_path=world["teacher_llm"]), folder / "log") == 0
    settings = {"max_steps": 10**6, "save_steps": 20, "save_total_limit": 2, "teacher_path": teacher}
    line = command_line(world, folder / "run", **settings, learning_rate=1e-4, logging_steps=10)
    process = CONTEXT.Process(target=child, args=(line, str(folder / "log")))
    process.start()
    while not list((folder / "run").glob("checkpoint-*")):
        time.sleep(0.2)
        if not process.is_alive():
            raise RuntimeError((folder / "log").read_text()[-2000:])
    time.sleep(6 * minutes)
    early = held(process.pid, folder / "run")
    time.sleep(54 * minutes)
    late = held(process.pid, folder / "run")
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    return early, late, process.exitcode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="duration of the run")
    arguments = parser.parse_args(argv)
    CONTEXT.set_forkserver_preload(["tinyllava_switchkd.train.train"])
    with tempfile.TemporaryDirectory() as folder:
        early, late, code = measure(arguments.minutes, Path(folder))
    rows = [[name, f"{early[name]:.0f}", f"{late[name]:.0f}"] for name in early]
    print(markdown(["", "after a tenth of the time", "at the end"], rows))
    print(f"\nSIGTERM then ended it with exit code {code}.")
    return 0 if code == 75 and late["memory, MiB"] < GROWTH * early["memory, MiB"] else 1


if __name__ == "__main__":
    sys.exit(main())
