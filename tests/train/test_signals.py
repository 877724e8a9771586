"""Signals, locks, launchers that die, and ranks with uneven last batches, with runs in separate processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.train.ranks import CONTEXT, UNEVEN, train_on_ranks, train_once
from tests.train.world import command_line, write_world
from tinyllava_switchkd.train import train, trainer
from tinyllava_switchkd.train.reliability import checkpoints, locking, resume, signals
from tinyllava_switchkd.train.reliability.locking import LockedError, OutputLock


def run_command(argv, log, hold=None):
    """The child: the entry point's `main`, which waits after `hold` steps for a signal (at most two minutes)."""
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        import torch

        from tinyllava_switchkd.train import train, trainer

        torch.set_num_threads(1)
        step = trainer.LLaVATrainer.training_step

        def held(self, *args, **kwargs):
            if self.state.global_step == hold:
                until(signals.received, timeout=120)
            return step(self, *args, **kwargs)

        trainer.LLaVATrainer.training_step = held
        code = 70
        try:
            code = train.main(argv)
        except BaseException:
            traceback.print_exc(file=file)
        file.flush()
        os._exit(code)


def start(argv, log, hold=None):
    process = CONTEXT.Process(target=run_command, args=(list(map(str, argv)), str(log), hold))
    process.start()
    return process


def until(condition, timeout=90):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("signals") / "world", samples=8)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_run_after_a_checkpoint_and_the_same_command_continues(world, tmp_path, name):
    """Exit code 75, and no finished run; then the same weights as without a signal, to the bit."""
    settings = {"max_steps": 6, "save_steps": 1, "save_total_limit": 1}
    line = command_line(world, tmp_path / "run", **settings)
    process = start(line, tmp_path / "log", hold=1)
    assert until(lambda: (tmp_path / "run" / "checkpoint-1").exists())
    os.kill(process.pid, getattr(signal, name))
    process.join(90)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == signals.INTERRUPTED == 75, said
    assert f"error: {name} has ended the run at step" in said and "the same command continues" in said
    assert not (tmp_path / "run" / "trainer_state.json").exists()
    (folder,) = checkpoints.checkpoints(tmp_path / "run")
    assert checkpoints.damage(folder) is None and checkpoints.step_of(folder) < 6
    assert not (tmp_path / "run" / locking.LOCK).exists()
    for output in ("run", "through"):
        process = start(command_line(world, tmp_path / output, **settings), tmp_path / "log")
        process.join(90)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    first, second = (load_file(tmp_path / output / "model.safetensors") for output in ("run", "through"))
    assert all((first[key] == second[key]).all() for key in first)


def test_ctrl_c_ends_it_at_once_in_one_sentence(world, tmp_path, monkeypatch, capsys):
    line = [str(word) for word in command_line(world, tmp_path / "run", max_steps=3, save_steps=1)]
    step = trainer.LLaVATrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer.LLaVATrainer, "training_step", interrupted)
            assert train.main(line) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert f"error: Interrupted; the same command continues from checkpoint-2 in {tmp_path / 'run'}." in said
    assert "Traceback" not in said and not (tmp_path / "run" / locking.LOCK).exists()
    assert train.main(line) == 0 and "Resuming from" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_folder(world, tmp_path):
    """The second is refused and names the owner; once the first is killed, the third takes over with a warning."""
    line = command_line(world, tmp_path / "run", max_steps=5, save_steps=1, save_total_limit=1)
    first = start(line, tmp_path / "first", hold=1)
    assert until(lambda: (tmp_path / "run" / "checkpoint-1").exists())
    second = start(line, tmp_path / "second")
    second.join(90)
    said = (tmp_path / "second").read_text()
    assert second.exitcode == 1
    assert f"is being written to by process {first.pid} on {socket.gethostname()}" in said and "Traceback" not in said
    os.kill(first.pid, signal.SIGKILL)
    first.join(30)
    third = start(line, tmp_path / "third", hold=1)
    log = tmp_path / "third"
    assert until(lambda: log.exists() and "Resuming from" in log.read_text())
    assert f"process {first.pid}" in log.read_text() and "taking it over" in log.read_text()
    os.kill(third.pid, signal.SIGKILL)
    third.join(30)


@pytest.mark.parametrize(("age", "is_held"), [(10, True), (10_000, False)])
def test_the_lock_of_another_machine_counts_while_it_is_renewed(tmp_path, age, is_held):
    (tmp_path / locking.LOCK).write_text(json.dumps({"host": "elsewhere", "process": 1, "since": "noon"}))
    before = time.time() - age
    os.utime(tmp_path / locking.LOCK, (before, before))
    lock = OutputLock(tmp_path)
    if is_held:
        with pytest.raises(LockedError, match="process 1 on elsewhere"):
            lock.acquire()
    else:
        lock.acquire()
        lock.release()
    assert (tmp_path / locking.LOCK).exists() == is_held


CHILD = """
import sys, time
from tinyllava_switchkd.train.reliability import signals
signals.follow_launcher(0.2)
open(sys.argv[1], "w").write("ready")
time.sleep(300)
"""

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()
"""


@pytest.mark.parametrize("killed", ["script", "launcher", "program"])
def test_ranks_end_with_what_started_them(tmp_path, killed):
    """A script or a program starts a launcher, which starts a rank; then one of those above the rank is killed."""
    root = Path(__file__).parents[2]
    rank, launcher = tmp_path / "rank.py", tmp_path / "torchrun"
    rank.write_text(CHILD)
    launcher.write_text(PARENT)
    top = (
        "import os, socket, subprocess, sys; os.environ['TINYLLAVA_LAUNCHER'] = f'{socket.gethostname()}:{os.getpid()}'"
    )
    top += "; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
    mark = tmp_path / "mark"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    above = ["-c", top]
    if killed == "program":  # called by hand, without a script that names itself as the outermost process
        above = [tmp_path / "deepspeed", "--num_gpus", "2", "--master_port", "29500", "--module"]
        above[0].write_text(PARENT.replace("[1:]", "[6:]"))
    script = subprocess.Popen([sys.executable, *above, launcher, rank, mark], env=environment)
    try:
        assert until(mark.exists)
        (middle,) = _children(script.pid)
        (last,) = _children(middle)
        os.kill(middle if killed == "launcher" else script.pid, signal.SIGKILL)
        assert until(lambda: signals.started_at(last) is None, timeout=60)  # on its own it would sleep longer
    finally:
        for process in [script.pid, *(_children(script.pid) or [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        script.wait()


def _children(process):
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_run_in_the_background_outlives_its_shell(tmp_path):
    """Only launchers are watched: a run outlives the shell that started it."""
    mark = tmp_path / "mark"
    code = "import sys; from tinyllava_switchkd.train.reliability.signals import launchers; "
    code += "open(sys.argv[1], 'w').write(str(launchers()))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(["bash", "-c", f"'{sys.executable}' -c \"{code}\" '{mark}'; true"], env=environment, check=True)
    assert mark.read_text() == "[]"


@pytest.mark.slow
def test_any_number_of_ranks_gives_one_processs_gradient(tmp_path):
    """13 samples: the last step of every epoch has one, and the other ranks get fillers without a loss."""
    both = train_on_ranks(2, UNEVEN, str(tmp_path))
    for name, settings in UNEVEN.items():
        one = train_once(str(tmp_path / "one"), **{**settings, "batch_size": 4, "gradient_accumulation_steps": 1})
        assert set(both[name]) == set(one) and one
        largest = max(float(abs(both[name][key] - one[key]).max()) for key in one)
        assert largest < 1e-5, (name, largest)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(tmp_path):
    """One process writes a checkpoint after two of six steps; two resume from it and learn what one would have."""
    settings = {"max_steps": 6, "optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 1e-2}
    saving = {"save_strategy": "steps", "save_steps": 2}
    through = train_once(str(tmp_path / "one"), batch_size=4, **settings, **saving)
    checkpoint = tmp_path / "one" / "checkpoint-2"
    assert resume.what_is_missing(checkpoint, world_size=2) is None
    both = train_on_ranks(2, {"two": {"batch_size": 2, **settings, "resume": str(checkpoint)}}, str(tmp_path))["two"]
    assert max(float(abs(both[key] - through[key]).max()) for key in through) < 1e-5
