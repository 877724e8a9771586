"""Random SIGKILLs: runs of every scheme are killed again and again at random times and must end with the same weights.

    python -m benchmarks.kills --minutes 10

For each scheme a tiny run first finishes without kills. Then the same command is started, killed after a random time
and started again until it finishes, and the trained weights are compared bit by bit: this is one chain. Each scheme
runs as many chains as fit into its share of the time, and continues until at least one process has been killed. Prints
a table; the exit code is 1 if any chain ended otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._table import markdown
from tinyllava_switchkd.io import digest

CONTEXT = multiprocessing.get_context("forkserver")

ADAPTERS = {"training_recipe": "lora", "tune_type_llm": "lora", "lora_r": 2}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "pre-training": ("pretrain", {}),
    "fine-tuning": ("finetune", {"group_by_modality_length": True}),
    "distillation": ("finetune", {"teacher_path": "TEACHER"}),
    "distillation, accumulated": ("finetune", {"teacher_path": "TEACHER", "gradient_accumulation_steps": 2}),
    "distillation, packed": ("finetune", {"teacher_path": "TEACHER", "packing": True}),
    "distillation, LoRA": ("finetune", {"teacher_path": "TEACHER", **ADAPTERS}),
}
"""Name -> (data, arguments in addition to those of a short run)."""


def child(argv: list[str], log: str) -> None:
    """Run the entry point in a process that can be killed; its output goes to a file."""
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        import torch

        from tinyllava_switchkd.train.train import main

        torch.set_num_threads(1)
        code = main(argv)
        file.flush()
        os._exit(code)


def run(argv: list[str], log: Path, seconds: float | None = None) -> int:
    """Run to the end, or kill after some seconds; return the exit code (-9 if killed)."""
    process = CONTEXT.Process(target=child, args=(argv, str(log)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def weights(folder: Path) -> dict[str, str]:
    """Digest of each file of trained weights."""
    files = [path for pattern in ("*.safetensors", "*/pytorch_model.bin") for path in folder.glob(pattern)]
    return {
        path.relative_to(folder).as_posix(): digest(path) for path in files if "checkpoint-" not in str(path.parent)
    }


def chain(argv: list[str], log: Path, chance: random.Random, seconds: float, until: float) -> tuple[int, int]:
    """Start a run again and again, killing it at random times within `seconds`, until it ends; no kills after `until`.

    Returns:
        the number of kills, and the exit code of the run that ended.
    """
    kills = 0
    while True:
        patience = chance.uniform(0.1, 0.9) * seconds if kills == 0 or time.monotonic() < until else None
        code = run(argv, log, patience)
        if code != -signal.SIGKILL:
            return kills, code
        kills += 1


def measure(minutes: float, seed: int, folder: Path) -> tuple[list[list[object]], bool]:
    """Rows of the table, and whether all chains ended with the same weights."""
    from tests.train.world import command_line, write_world

    world = write_world(folder / "world")
    teacher = folder / "teacher"
    assert run(command_line(world, teacher, model_name_or_path=world["teacher_llm"]), folder / "log") == 0
    chance, end = random.Random(seed), time.monotonic() + 60 * minutes
    rows, good = [], True
    for index, (name, (data, settings)) in enumerate(SCHEMES.items()):
        settings = {key: teacher if value == "TEACHER" else value for key, value in settings.items()}
        settings |= {"max_steps": 6, "save_steps": 1, "save_total_limit": 1}
        through = folder / f"{index}-through"
        start = time.monotonic()
        assert run(command_line(world, through, data, **settings), folder / "log") == 0
        seconds = time.monotonic() - start
        share = (end - time.monotonic()) / (len(SCHEMES) - index)
        until, chains, kills, same = time.monotonic() + share, 0, 0, True
        while same and (chains == 0 or kills == 0 or time.monotonic() < until):
            killed = folder / f"{index}-killed-{chains}"
            died, code = chain(command_line(world, killed, data, **settings), folder / "log", chance, seconds, until)
            chains, kills = chains + 1, kills + died
            same = code == 0 and weights(killed) == weights(through) != {}
            shutil.rmtree(killed, ignore_errors=not same)
        good &= same
        rows.append([name, chains, kills, "yes" if same else f"NO (exit code {code})"])
        print(f"{name}: {chains} chains, {kills} kills, same weights: {same}", file=sys.stderr, flush=True)
    return rows, good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all schemes together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    arguments = parser.parse_args(argv)
    CONTEXT.set_forkserver_preload(["tinyllava_switchkd.train.train", "peft"])
    with tempfile.TemporaryDirectory() as folder:
        rows, good = measure(arguments.minutes, arguments.seed, Path(folder))
    print(markdown(["scheme", "chains", "SIGKILLs", "weights bitwise equal"], rows))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
