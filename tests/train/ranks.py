"""The trainer in several processes on the CPU, joined by gloo, as torchrun would start them.

The processes are forked from a server that has imported everything once and computed nothing, which is quick and safe.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.eval.forked import PRELOADED, ranks

CONTEXT = multiprocessing.get_context("forkserver")
LATE = ["deepspeed.compile.backend", "deepspeed.module_inject.auto_ep_layer", "PIL.PngImagePlugin"]
LATE += ["transformers.models.qwen2.modeling_qwen2", "transformers.models.siglip.modeling_siglip"]
"""Modules that runs import at the start, which takes half of a short run's time; missing ones are skipped."""
OURS = ["tests.train.ranks", "tests.train.toy", "tinyllava_switchkd.train.train"]
CONTEXT.set_forkserver_preload([*PRELOADED, *OURS, "peft", "deepspeed", *LATE, "tests.frozen"])

UNEVEN = {
    "in_random_order": {"batch_size": 2, "size": 13, "max_steps": 4},
    "in_groups": {"batch_size": 2, "size": 13, "max_steps": 4, "group_by_modality_length": True},
    "accumulated": {"batch_size": 1, "gradient_accumulation_steps": 2, "size": 13, "max_steps": 4},
}
"""Settings of two ranks for an epoch of three full steps of four samples and a last step of one sample."""


def train_on_ranks(world: int, settings: Mapping[str, Mapping[str, Any]], folder: str) -> dict[str, Mapping[str, Any]]:
    """Weights of the student after training, by the names of `settings` (see `train_once`), from rank 0."""
    _run(world, _rank, dict(settings), folder)
    return {name: np.load(f"{folder}/{name}.npz") for name in settings}


def main_on_ranks(world: int, lines: Sequence[Sequence[str]]) -> None:
    """Run the entry point on ranks, for one command line after another."""
    _run(world, _main, lines)


def _run(world: int, target: Callable[..., None], *args: Any) -> None:
    processes = [CONTEXT.Process(target=target, args=(each, *args)) for each in ranks(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")


def codes_on_ranks(
    world: int, argv: Sequence[object], log: str | Path, before: Callable[[], None] | None = None
) -> list[int]:
    """Exit codes of the entry point on each rank; rank N's output goes to ``log.N``.

    Args:
        world: processes.
        argv: the command line, with ``{rank}`` for the rank's number.
        log: where their output goes.
        before: called first in each process; must be picklable.
    """
    environments = ranks(world)
    words = [str(word) for word in argv]
    processes = [CONTEXT.Process(target=_code, args=(each, words, str(log), before)) for each in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(900)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _code(environment: Mapping[str, str], argv: list[str], log: str, before: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    with open(f"{log}.{environment['RANK']}", "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        import torch

        from tinyllava_switchkd.train.train import main

        torch.set_num_threads(1)
        code = 70
        argv = [word.replace("{rank}", environment["RANK"]) for word in argv]
        try:
            if "--deepspeed" in argv:
                leave_out_kernels_of_inference()
            if before is not None:
                before()
            code = main(argv)
        except BaseException:
            traceback.print_exc(file=file)
        file.flush()
        os._exit(code)


def leave_out_kernels_of_inference() -> None:
    """Keep DeepSpeed from compiling C++ for `inference_all_reduce`, which it does on every CPU and no training calls.

    The first compilation on a machine takes a minute.
    """
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def train_once(
    folder: str, batch_size: int, lora: bool = False, size: int = 12, resume: str | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The weights, as arrays, after a step of distillation by SGD, in which they are linear in the gradient."""
    import torch

    from tests.train.toy import toy_arguments, toy_task, toy_trainer
    from tinyllava_switchkd.distill import build_distiller
    from tinyllava_switchkd.train.recipes import TrainingRecipeFactory

    adapters = {"training_recipe": "lora", "tune_type_llm": "lora", "tune_type_vision_tower": "lora", "lora_r": 4}
    fields = {"optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.1, "max_steps": 1, "lora_dropout": 0.0}
    fields |= {"lr_scheduler_type": "constant", **(adapters if lora else {}), **kwargs}
    args = toy_arguments(folder, per_device_train_batch_size=batch_size, **fields)
    torch.manual_seed(0)
    task = toy_task(distil=True)
    if lora:
        task = build_distiller(TrainingRecipeFactory("lora")(args)(task.student), task.teacher)
    toy_trainer(args, task, size=size).train(resume_from_checkpoint=resume)
    return {name: p.detach().numpy().copy() for name, p in task.named_parameters() if p.requires_grad}


def _main(environment: Mapping[str, str], lines: Sequence[Sequence[str]]) -> None:
    os.environ.update(environment)
    import torch

    from tinyllava_switchkd.train.train import main

    torch.set_num_threads(1)
    for line in lines:
        code = main(line)
        if code:
            sys.exit(code)


def _rank(environment: Mapping[str, str], settings: dict[str, dict[str, Any]], folder: str) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    for name, kwargs in settings.items():
        weights = train_once(f"{folder}/{name}", ddp_backend="gloo", **kwargs)
        if environment["RANK"] == "0":
            np.savez(f"{folder}/{name}.npz", **weights)
