"""Starts a training's processes: directly, by torchrun, or by DeepSpeed's launcher."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyllava_switchkd.launch.devices import Devices

DEEPSPEED = Path(__file__).parent / "deepspeed"
"""DeepSpeed's configurations: zero2.json, zero3.json, zero2_offload.json."""

MODULE = "tinyllava_switchkd.train.train"


@dataclass(frozen=True)
class Launcher:
    """A launcher and its settings.

    Attributes:
        kind: python, torchrun or deepspeed.
        deepspeed: DeepSpeed's configuration file, or None.
        processes: processes on all machines together.
    """

    kind: str
    deepspeed: str | None
    processes: int


def find_launcher(variables: Mapping[str, str], devices: Devices, zero: str | None = None) -> Launcher:
    """The launcher given by ``LAUNCHER``, or the one that fits the devices.

    Args:
        variables: ``LAUNCHER``, ``HOSTFILE``, ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR``.
        devices: the devices of this machine.
        zero: 2, 3, 2_offload, a DeepSpeed JSON file, or none; default: 2, or none if the launcher is python.

    Raises:
        ValueError: settings contradict each other, or a file does not exist.
    """
    kind = variables.get("LAUNCHER")
    if not kind:
        if devices.kind == "cpu" and devices.processes == 1:
            kind = "python"
        else:
            kind = "deepspeed" if devices.numbered else "torchrun"
    if kind == "python" and devices.processes > 1:
        raise ValueError(f"LAUNCHER=python runs one process, but GPUS asks for {devices.processes}.")
    if kind == "deepspeed" and not devices.numbered:
        raise ValueError(
            f"LAUNCHER=deepspeed accepts only GPU numbers, but {','.join(devices.gpus)} are visible; use torchrun."
        )
    config = _deepspeed_config(zero or ("none" if kind == "python" else "2"), kind)
    return Launcher(kind, config, _processes(variables, devices, kind))


def _deepspeed_config(zero: str, kind: str) -> str | None:
    if zero == "none":
        return None
    if zero in ("2", "3", "2_offload"):
        config = str(DEEPSPEED / f"zero{zero}.json")
    elif zero.endswith(".json"):
        config = zero
    else:
        raise ValueError(f"ZERO is {zero!r}; it must be 2, 3, 2_offload, none or a DeepSpeed JSON file.")
    if not Path(config).is_file():
        raise ValueError(f"The DeepSpeed configuration {config} does not exist.")
    if kind == "python":
        raise ValueError(f"ZERO={zero} needs LAUNCHER=deepspeed or torchrun.")
    return config


def _processes(variables: Mapping[str, str], devices: Devices, kind: str) -> int:
    nodes = int(variables.get("NNODES", 1))
    hostfile = variables.get("HOSTFILE")
    if hostfile:
        if kind != "deepspeed":
            raise ValueError("HOSTFILE is only for LAUNCHER=deepspeed; for torchrun set NNODES and MASTER_ADDR.")
        if variables.get("GPUS"):
            raise ValueError(
                f"GPUS is {variables['GPUS']!r}, but with a HOSTFILE its lines (node0 slots=8) say how many are used."
            )
        if not Path(hostfile).is_file():
            raise ValueError(f"The HOSTFILE {hostfile} does not exist.")
        lines = [line.split("#")[0] for line in Path(hostfile).read_text(encoding="utf-8").splitlines()]
        slots = [int(count) for line in lines for count in re.findall(r"slots=(\d+)", line)]
        if sum(slots) < 1:
            raise ValueError(f"The HOSTFILE {hostfile} names no processes; it needs lines such as 'node0 slots=8'.")
        return sum(slots)
    if nodes > 1:
        if kind != "torchrun":
            raise ValueError(f"NNODES={nodes} needs LAUNCHER=torchrun; deepspeed takes a HOSTFILE.")
        if not variables.get("MASTER_ADDR") or not variables.get("NODE_RANK"):
            raise ValueError(f"NNODES={nodes} needs MASTER_ADDR and NODE_RANK.")
        if int(variables["NODE_RANK"]) >= nodes:
            raise ValueError(
                f"NODE_RANK is {variables['NODE_RANK']}; with NNODES={nodes} it counts from 0 to {nodes - 1}."
            )
    return devices.processes * nodes


def launch_words(variables: Mapping[str, str], devices: Devices, launcher: Launcher, python: str) -> list[str]:
    """The command up to the entry point's arguments."""
    port = variables.get("MASTER_PORT", "29501")
    if launcher.kind == "python":
        return [python, "-m", MODULE]
    if launcher.kind == "torchrun":
        words = [python, "-m", "torch.distributed.run", "--nproc_per_node", str(devices.processes)]
        words += ["--nnodes", variables.get("NNODES", "1"), "--node_rank", variables.get("NODE_RANK", "0")]
        words += ["--master_addr", variables.get("MASTER_ADDR", "127.0.0.1"), "--master_port", port]
        return [*words, "-m", MODULE]
    words = [python, "-m", "deepspeed.launcher.runner", "--master_port", port]
    if variables.get("HOSTFILE"):
        words += ["--hostfile", variables["HOSTFILE"]]
    elif devices.gpus:
        words += ["--include", f"localhost:{','.join(devices.gpus)}"]
    else:
        words += ["--num_gpus", str(devices.processes)]
    return [*words, "--module", MODULE]


def launch_environment(devices: Devices, launcher: Launcher) -> dict[str, str]:
    """Environment variables to set for the command."""
    if devices.kind == "cpu":
        return {"DS_ACCELERATOR": "cpu"}
    if launcher.kind == "deepspeed":  # sets the visible devices itself
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices.gpus)}
