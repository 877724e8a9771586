"""What a run was: ``recipe.yaml`` in its output folder; ``tinyllava-switchkd train --recipe`` runs it again."""

from __future__ import annotations

from pathlib import Path

import yaml

from tinyllava_switchkd.io import write_text
from tinyllava_switchkd.runtime import versions

from ..command_line.arguments import Arguments

RECIPE = "recipe.yaml"

OF_THE_MACHINE = (
    "use_cpu",
    "deepspeed",
    "local_rank",
    "ddp_backend",
    "dataloader_num_workers",
    "gradient_checkpointing",
    "activation_checkpointing",
    "attn_implementation",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "estimate",
    "fill_teacher_cache",
)
"""Flags that say how it is computed rather than what; another machine has others."""

_COMPUTED = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16")

_HEADER = """\
# What this run was told, written when it began. The same again, into another folder:
#   tinyllava-switchkd train --recipe {path} --output_dir ELSEWHERE
# The part "machine" is not read then.
"""


def recipe_of(arguments: Arguments) -> dict[str, object]:
    """The recipe of a run: every flag that was given, the samples of a step, the precision.

    Secrets (tokens of hubs) are left out.
    """
    training = arguments.training
    given = {name: list(values) for name, values in arguments.given.items() if not name.endswith("token")}
    settings: dict[str, str | list[str]] = {
        name: values[0] if len(values) == 1 else values or "True"
        for name, values in given.items()
        if name not in OF_THE_MACHINE + _COMPUTED
    }
    per_device, accumulate = training.per_device_train_batch_size, training.gradient_accumulation_steps
    settings["global_batch_size"] = str(per_device * accumulate * training.world_size)
    settings["per_device_batch_size"] = str(per_device)
    settings["precision"] = "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
    machine: dict[str, object] = {name: " ".join(given[name]) for name in OF_THE_MACHINE if name in given}
    machine |= {"processes": training.world_size, "gradient_accumulation_steps": accumulate}
    machine |= {
        "device": training.device.type,
        "versions": versions(("torch", "transformers", "accelerate", "deepspeed", "peft")),
    }
    return {"stages": [{"settings": settings}], "machine": machine}


def write_recipe(arguments: Arguments) -> None:
    """Write the run's recipe into its output folder.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(str(arguments.training.output_dir)) / RECIPE
    text = yaml.safe_dump(recipe_of(arguments), sort_keys=False, allow_unicode=True, width=1000)
    write_text(path, _HEADER.format(path=path) + text)
