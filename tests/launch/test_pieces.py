"""Devices, launchers and batch sizes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tinyllava_switchkd.launch.batch import Batch, batch_of
from tinyllava_switchkd.launch.devices import Devices, find_devices
from tinyllava_switchkd.launch.launcher import find_launcher, launch_environment, launch_words


def devices(**environment):
    return find_devices({"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "0,1,2,5", **environment}, "python")


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, "0,1,2,5"),
        ({"GPUS": "3"}, "0,1,2"),
        ({"GPUS": "1,5"}, "1,5"),
        ({"GPUS": "2,"}, "2"),
        ({"GPUS": "5, 0"}, "5,0"),
        ({"DEVICE": "cuda", "GPUS": "1"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "3,-1,2"}, "3"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f1a,GPU-77"}, "GPU-8f1a,GPU-77"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-1/2/0"}, "MIG-GPU-1/2/0"),
    ],
)
def test_gpus(environment, gpus):
    found = devices(**environment)
    assert found == Devices(tuple(gpus.split(",")), gpus.count(",") + 1) and found.kind == "cuda"


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({"DEVICE": "cpu"}, 1),
        ({"DEVICE": "cpu", "GPUS": "3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1", "GPUS": "2"}, 2),
    ],
)
def test_processes_on_the_cpu(environment, processes):
    assert devices(**environment) == Devices((), processes)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"GPUS": "5"}, "GPUS is 5, but only 0,1,2,5 are visible."),
        ({"GPUS": "0"}, "number of GPUs"),
        ({"GPUS": "0,3"}, "only 0,1,2,5 are visible"),
        ({"GPUS": "1,1"}, "twice"),
        ({"GPUS": "-1"}, "only 0,1,2,5"),
        ({"GPUS": "all"}, "only 0,1,2,5"),
        ({"GPUS": "1,,2"}, "only 0,1,2,5"),
        ({"DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "no GPU"),
        ({"DEVICE": "cpu", "GPUS": "0"}, "number of processes"),
        ({"DEVICE": "cpu", "GPUS": "0,1"}, "number of processes"),
        ({"DEVICE": "cpu", "GPUS": "two"}, "number of processes"),
        ({"DEVICE": "cpu", "GPUS": "100000"}, "number of processes, at most"),
        ({"DEVICE": "cpu", "GPUS": "9" * 5000}, "number of processes, at most"),
    ],
)
def test_wrong_devices(environment, words):
    with pytest.raises(ValueError, match=words):
        devices(**environment)


def test_gpus_listed_by_the_driver(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    assert find_devices({"PATH": f"{tmp_path}:/usr/bin:/bin"}, "python").gpus == ("0", "1")
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert find_devices({"PATH": f"{tmp_path}:/usr/bin:/bin"}, "python").gpus == ()


def test_global_batch_is_kept_if_possible():
    for total in (64, 128, 256):
        for processes in range(1, 33):
            batch = batch_of(total, 8, processes)
            assert 1 <= batch.per_device <= 8 and batch.accumulate >= 1
            if total % processes == 0:
                assert batch.total == total
            else:  # the nearest possible with this number of processes
                assert abs(batch.total - total) <= batch.per_device * processes / 2 or batch.accumulate == 1


def test_given_batch_sizes():
    assert batch_of(128, 8, 4, per_device=2) == Batch(2, 16, 4)
    assert batch_of(128, 8, 4, accumulate=2) == Batch(16, 2, 4)
    assert batch_of(128, 8, 4, per_device=3, accumulate=5) == Batch(3, 5, 4)
    assert batch_of(4, 8, 300) == Batch(1, 1, 300)
    assert str(Batch(8, 4, 4)) == "Batch: 8 per device x 4 accumulated x 4 processes = 128 per step"


def test_default_launchers():
    assert find_launcher({}, Devices((), 1)).kind == "python"
    assert find_launcher({}, Devices((), 2)).kind == "deepspeed"
    assert find_launcher({}, Devices(("0",), 1)).kind == "deepspeed"
    by_uuid = Devices(("GPU-1", "GPU-2"), 2)
    launcher = find_launcher({}, by_uuid)
    assert launcher.kind == "torchrun" and launcher.deepspeed.endswith("zero2.json")
    assert launch_environment(by_uuid, launcher) == {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}
    with pytest.raises(ValueError, match="accepts only GPU numbers"):
        find_launcher({"LAUNCHER": "deepspeed"}, by_uuid)


def test_several_nodes(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8 # the first\nb slots=4\n# c slots=2\n")
    four = Devices(("0", "1", "2", "3"), 4)
    launcher = find_launcher({"HOSTFILE": str(hosts)}, four)
    assert launcher.processes == 12
    assert "--hostfile" in launch_words({"HOSTFILE": str(hosts)}, four, launcher, "python")
    with pytest.raises(ValueError, match="GPUS is '0,1', but with a HOSTFILE its lines"):
        find_launcher({"HOSTFILE": str(hosts), "GPUS": "0,1"}, four)
    hosts.write_text("a\nb\n")
    with pytest.raises(ValueError, match="names no processes"):
        find_launcher({"HOSTFILE": str(hosts)}, four)
    nodes = {"LAUNCHER": "torchrun", "NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}
    with pytest.raises(ValueError, match="counts from 0 to 1"):
        find_launcher(nodes, four)
    assert find_launcher(nodes | {"NODE_RANK": "1"}, four).processes == 8


def test_missing_interpreter():
    script = Path(__file__).parents[2] / "scripts" / "train" / "finetune.sh"
    done = subprocess.run(
        ["bash", script], env={**os.environ, "PYTHON": "/gone/python"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "finetune.sh: there is no interpreter /gone/python; set PYTHON to an existing one.\n"
