"""torch.compile where it pays: each layer of the language models and vision towers is compiled in place.

A whole task would not become one graph: splicing depends on the data, and the chunked loss is a custom autograd
function. A layer does become one, and layers of the same kind share the compiled code. Parameter names do not change,
so checkpoints, resuming, adapters and distributed training work as without compiling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import nn

from tinyllava_switchkd.distill import Task
from tinyllava_switchkd.train.command_line.arguments import TrainingArguments
from tinyllava_switchkd.train.recipes.parts import LAYER

logger = logging.getLogger(__name__)

VARIANTS = 64
"""How many compiled variants of a layer torch may keep.

Student and teacher, with and without gradients, with batches of one and of more, need about a dozen. Beyond torch's
default limit of 8, further variants would run uncompiled.
"""


def check_compile(training: TrainingArguments) -> None:
    """Check the flags of torch.compile.

    Raises:
        ValueError: the backend or mode is unknown, or the run uses DeepSpeed's ZeRO-3.
    """
    if not training.torch_compile:
        return
    backends = torch._dynamo.list_backends(exclude_tags=())
    if training.torch_compile_backend not in backends:
        raise ValueError(
            f"--torch_compile_backend is {training.torch_compile_backend!r}; torch has {', '.join(backends)}."
        )
    if training.torch_compile_mode is not None:
        from torch._inductor import list_mode_options

        modes = list(list_mode_options())
        if training.torch_compile_backend != "inductor" or training.torch_compile_mode not in modes:
            raise ValueError(
                f"--torch_compile_mode is {training.torch_compile_mode!r} with the backend "
                f"{training.torch_compile_backend!r}; only inductor has modes: {', '.join(modes)}."
            )
    deepspeed = getattr(training, "hf_deepspeed_config", None)
    if deepspeed is not None and deepspeed.is_zero3():
        raise ValueError(
            "--torch_compile does not work with ZeRO-3, whose hooks gather weights inside every layer and would break "
            "each graph; use ZeRO-2 (zero2.json), or train without --torch_compile."
        )


def compile_layers(
    task: Task, backend: str | Callable = "inductor", mode: str | None = None, retain_graph: bool = False
) -> int:
    """Have torch compile every layer of a task's models when it first runs.

    Sequence lengths and numbers of images are dynamic, so another batch shape needs no new compilation. Layers with
    bitsandbytes' quantised weights are not compiled.

    Args:
        task: its models are changed in place.
        backend, mode: as for `torch.compile`.
        retain_graph: whether a graph may run backward several times, for which it keeps a little more memory.

    Returns:
        the number of compiled layers.
    """
    parts = [part for model in task.models for part in (model.language_model, model.vision_tower)]
    layers = [layer for part in parts for layer in _layers(part)]
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    if retain_graph:
        torch._functorch.config.donated_buffer = False
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
    logger.info("torch.compile (%s): %d layers; the first steps wait for the compiler.", backend, len(layers))
    return len(layers)


def _layers(part: nn.Module) -> Iterator[nn.Module]:
    outer = None
    for name, module in part.named_modules():
        if outer is not None and name.startswith(f"{outer}."):
            continue
        if LAYER.search(f"{name}."):
            outer = name
            if not any(type(child).__module__.startswith("bitsandbytes") for child in module.modules()):
                yield module
