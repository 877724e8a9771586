"""CPU time until a command answers: ``python -m benchmarks.startup [--repeat N]``.

Writes its section of docs/benchmarks.md. `python -X importtime -m MODULE --help` shows which imports take the time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks._table import machine, write_section

SAMPLE = [{"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "There"}]}]

COMMANDS = {
    "train, `DRY_RUN=1` of a recipe": ["launch", "train", "--recipe", "debug"],
    "train `--help`": ["train.train", "--help"],
    "train, a misspelt flag": ["train.train", "--data_path", "x", "--output_dir", "y", "--lerning_rate", "1"],
    "eval, `DRY_RUN=1` of a benchmark": ["launch", "eval", "pope", "some/model"],
    "eval.run `--help`": ["eval.run", "--help"],
    "eval.score `--help`": ["eval.score", "--help"],
    "eval.report `--help`": ["eval.report", "--help"],
    "train.check_data of a file": ["train.check_data", "SAMPLE"],
    "model.export `--help`": ["model.export", "--help"],
    "serve.app `--help`": ["serve.app", "--help"],
    "serve.chat `--help`": ["serve.chat", "--help"],
    "visualize.attention `--help`": ["visualize.attention", "--help"],
    "quickstart.run `--help`": ["quickstart.run", "--help"],
    "eval.run, a misspelt flag": ["eval.run", "pope", "--model_pth", "x"],
    "model.export, an unknown target": ["model.export", "--to", "nothing", "x", "y"],
    "serve.app, a misspelt flag": ["serve.app", "--model_pth", "x"],
    "serve.chat, a misspelt flag": ["serve.chat", "--model_pth", "x"],
    "visualize.attention, a misspelt flag": ["visualize.attention", "--imge", "x"],
    "quickstart.run, a bad value": ["quickstart.run", "--seeds", "0"],
}


def cpu_seconds(words: list[str]) -> float:
    """CPU seconds of one process.

    Raises:
        RuntimeError: the process ended with a traceback.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"DRY_RUN": "1", "DEVICE": "cpu"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if "Traceback" in done.stderr:
        raise RuntimeError(done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeat", type=int, default=3, help="runs of each command (default: %(default)s)")
    repeat = max(1, parser.parse_args().repeat)
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "sample.json")
        sample.write_text(json.dumps(SAMPLE))
        commands = {"python alone": ["-c", "pass"], "`import torch`": ["-c", "import torch"]}
        for title, (module, *words) in COMMANDS.items():
            words = [str(sample) if word == "SAMPLE" else word for word in words]
            commands[title] = ["-m", f"tinyllava_switchkd.{module}", *words]
        rows = []
        for title, words in commands.items():
            rows.append((title, f"{min(cpu_seconds(words) for _ in range(repeat)):.2f}"))
            print(*rows[-1], sep=": ", flush=True)
    note = f"CPU seconds of a whole process, the shortest of {repeat} runs; they depend little on other load."
    write_section("startup", "Until a command answers", [(["command", "CPU seconds"], rows)], machine(), note=note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
