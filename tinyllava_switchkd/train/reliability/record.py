"""``recipe.yaml`` in the output folder, with which ``tinyllava-switchkd train --recipe`` repeats the run."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from tinyllava_switchkd.io import read_json, write_text
from tinyllava_switchkd.runtime import is_main_process, versions
from tinyllava_switchkd.train.command_line.arguments import Arguments

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"

ARGUMENTS = "training_args.json"
"""File beside the weights with the run's arguments, without secrets."""

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
"""Flags that say how a run is computed, not what; they differ between machines."""

_COMPUTED = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16")

_HEADER = """\
# The settings of this run, written when it started. To repeat it into another folder:
#   tinyllava-switchkd train --recipe {path} --output_dir ELSEWHERE
# The section "machine" is not read then.
"""


def recipe_of(arguments: Arguments) -> dict[str, object]:
    """The recipe of a run: every flag given, the samples per step and the precision, without secrets (hub tokens)."""
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
    machine |= {
        "processes": training.world_size,
        "gradient_accumulation_steps": accumulate,
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


def keep_rates(arguments: Arguments, checkpoint: str | None) -> Arguments:
    """The arguments with the learning rates that a resumed run keeps, so that it records what it trains with.

    Args:
        arguments: the run's arguments; their training arguments change.
        checkpoint: the checkpoint to resume from, if any.
    """
    if checkpoint is None or not Path(checkpoint, ARGUMENTS).is_file():
        return arguments
    stored, given = read_json(Path(checkpoint, ARGUMENTS)), dict(arguments.given)
    for name in ("learning_rate", "mm_projector_lr", "vision_tower_lr"):
        before, now = stored.get(name), getattr(arguments.training, name)
        if isinstance(before, float) and now is not None and before != now:
            if is_main_process():
                logger.warning(
                    "--%s %s is not used: the run continues with %s, as in %s.", *(name, now, before, checkpoint)
                )
            setattr(arguments.training, name, before)
            given[name] = [str(before)]
    return arguments._replace(given=given)
