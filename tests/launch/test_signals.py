"""Signals to the command: those that end a run reach the ranks below a launcher, and are repeated until received."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllava_switchkd.launch import processes

SUPERVISOR = """
import sys
from tinyllava_switchkd.launch import processes
processes._AGAIN_SECONDS = 0.2
with processes.Commands().listening() as commands:
    code = commands.run(sys.argv[1:], {})
    print(commands.interrupted, flush=True)
sys.exit(code)
"""

LAUNCHER = """
import subprocess, sys
sys.exit(1 if subprocess.call([sys.executable, "-m", "tinyllava_switchkd.train.train", *sys.argv[1:]]) else 0)
"""

RANK = """
import os, pathlib, signal, sys, time
heard = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
heard.with_name("new").write_text(os.environ["TINYLLAVA_LAUNCHER"])
heard.with_name("new").rename(heard)  # atomic: readers see the whole file
time.sleep(float(sys.argv[2]))
signal.signal(signal.SIGUSR1, lambda *_: (heard.write_text("heard"), sys.exit(75)))
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("deaf", [0.0, 1.0], ids=["", "while it still starts"])
def test_signal_reaches_the_rank_and_sets_the_exit_code(tmp_path, name, deaf):
    """The launcher stays alive until its rank has ended, and the exit code asks for the run to be resumed."""
    package = tmp_path / "tinyllava_switchkd" / "train"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "train.py").write_text(RANK)
    launcher, mark = tmp_path / "launcher.py", tmp_path / "mark"
    launcher.write_text(LAUNCHER)
    root = Path(__file__).parents[2]
    supervisor = f"import os, sys; sys.path.insert(0, {str(root)!r})\n{SUPERVISOR}"
    supervisor = supervisor.replace("import sys\nfrom", "os.environ['PYTHONPATH'] = sys.argv.pop(1)\nfrom", 1)
    run = subprocess.Popen(
        [sys.executable, "-c", supervisor, str(tmp_path), sys.executable, str(launcher), str(mark), str(deaf)],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert mark.read_text().endswith(f":{run.pid}")
    run.send_signal(getattr(signal, name))
    output, _ = run.communicate(timeout=60)
    assert mark.read_text() == "heard"
    assert run.returncode == processes.INTERRUPTED and output.strip() == "True"


def test_launchers_are_distinguished_from_ranks():
    assert processes.is_rank(["python", "-m", processes.MODULE, "--seed", "1"])
    assert not processes.is_rank(["python", "-m", "torch.distributed.run", "-m", processes.MODULE])
    assert not processes.is_rank(["python", "-m", "deepspeed.launcher.runner", "--module", processes.MODULE])
    assert processes.ranks_below(os.getpid()) == []


STAGE = """
trap 'sleep 0.3; exit $CODE' USR1
echo ready "$@" > "$MARK"
kill -USR1 $PPID
while true; do sleep 0.1; done
"""
"""A run that is signalled as early as possible, right after its script has started it."""


@pytest.mark.parametrize(("code", "is_queued"), [(75, True), (3, False), (0, False)])
def test_slurm_script_requeues_only_after_a_checkpoint(tmp_path, code, is_queued):
    """Slurm's signal reaches the run, its exit code decides, and the command's words arrive unchanged."""
    stage, mark, queue = tmp_path / "stage.sh", tmp_path / "mark", tmp_path / "queue"
    stage.write_text(STAGE)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" > "{queue}"\n')
    scontrol.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MARK": str(mark), "CODE": str(code)}
    script = Path(__file__).parents[2] / "scripts" / "train" / "slurm.sh"
    run = subprocess.Popen(["bash", script, stage, "two words", ""], env={**environment, "SLURM_JOB_ID": "17"})
    assert run.wait(60) == code
    assert mark.read_text() == "ready two words \n"
    assert queue.exists() == is_queued and (not is_queued or queue.read_text() == "requeue 17\n")
