"""Everything that can be known to be wrong before weights are read: names, paths, the teacher."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

from tinyllava_switchkd.data.template import TemplateFactory
from tinyllava_switchkd.model.connector import ConnectorFactory
from tinyllava_switchkd.model.vision_tower import VisionTowerFactory

from ..command_line.arguments import Arguments, TrainingArguments
from ..recipes import TrainingRecipeFactory


def check_names(arguments: Arguments) -> None:
    """Every registered name must exist; a fresh model's language model is looked up when its configuration is read.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    model, data, training, *_ = arguments
    TrainingRecipeFactory.name_of(training.training_recipe)
    TemplateFactory.name_of(data.template)
    if training.pretrained_model_path is None:
        VisionTowerFactory.name_of(model.vision_tower)
        ConnectorFactory.name_of(model.connector_type)


def check_paths(arguments: Arguments) -> None:
    """Whatever is named by a path must exist, and the output must be writable.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: with the argument, the path and the remedy.
    """
    _, data, training, *_ = arguments
    if data.data_path is None or not Path(data.data_path).is_file():
        raise FileNotFoundError(f"--data_path {data.data_path} does not exist; give a JSON file in LLaVA's format.")
    if data.eval_data_path is not None and not Path(data.eval_data_path).is_file():
        raise FileNotFoundError(f"--eval_data_path {data.eval_data_path} does not exist; give a JSON file.")
    if data.image_folder and not Path(data.image_folder).is_dir():
        raise FileNotFoundError(f"--image_folder {data.image_folder} is no folder; give the one with the images.")
    for name, path in {**_models(arguments), "resume_from_checkpoint": training.resume_from_checkpoint}.items():
        if name in ("model_name_or_path", "vision_tower") and training.pretrained_model_path is not None:
            continue  # a checkpoint has its own
        # a hub name is ``owner/model`` or ``model``; what is written otherwise, or is there, can only be a path
        is_path = path and (path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).exists())
        if path and is_path and not Path(path).expanduser().is_dir():
            hint = " (pretrain.sh writes one)" if name == "pretrained_model_path" else ""
            raise FileNotFoundError(f"--{name} {path} does not exist; give the folder of a model{hint}.")
    check_writable(training.output_dir)
    check_overwriting(arguments)


def check_overwriting(arguments: Arguments) -> None:
    """The output must not take the place of what the run reads, nor of a model that is none of its own.

    Raises:
        FileExistsError: it would.
    """
    training, folder = arguments.training, Path(arguments.training.output_dir)
    for name, path in _models(arguments).items():
        if path and folder.is_dir() and Path(path).is_dir() and folder.samefile(path):
            raise FileExistsError(f"--output_dir {folder} is the folder of --{name} as well; choose another.")
    marks = ("training_args.*", "trainer_state.json", "checkpoint-*")  # what a run of this program leaves
    if training.overwrite_output_dir or any(any(folder.glob(mark)) for mark in marks):
        return
    for weights in ("*.safetensors", "*.bin"):
        for file in folder.glob(weights):
            raise FileExistsError(
                f"--output_dir {folder} holds weights ({file.name}) that no training run has put there; choose another "
                f"folder, or pass --overwrite_output_dir True."
            )


def check_writable(output_dir: str) -> None:
    """Whether the output folder is one or can be made; nothing is made.

    Raises:
        NotADirectoryError, PermissionError: it can't.
    """
    existing = Path(output_dir).expanduser().absolute()
    while not existing.exists() and not existing.is_symlink():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"--output_dir {output_dir} cannot be made: {existing} is a file; choose another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--output_dir {output_dir} is not writable: {existing} forbids it; choose another.")


def prepare_output(output_dir: str) -> None:
    """Make the output folder and write to it, once: permissions do not tell of full or read-only file systems.

    Raises:
        OSError: it failed.
        ValueError: something in it can be no file of a run.
    """
    try:
        Path(output_dir).expanduser().mkdir(parents=True, exist_ok=True)
        for path in Path(output_dir).iterdir():  # writing to a pipe would wait for ever
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError(f"--output_dir {output_dir} holds {path.name}, a pipe or a device; remove it.")
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"--output_dir {output_dir} cannot be written to: {reason}; choose another.") from error


def _models(arguments: Arguments) -> dict[str, str | None]:
    """Arguments that name models, and their values."""
    model = arguments.model
    return {
        "teacher_path": arguments.distill.teacher_path,
        "pretrained_model_path": arguments.training.pretrained_model_path,
        "model_name_or_path": model.model_name_or_path,
        "vision_tower": model.vision_tower.split(":", 1)[-1],  # a tower may carry its kind in front
    }


def check_metric(arguments: Arguments, metric: str) -> None:
    """The metric that tells the best checkpoint must be one that the run reports.

    Raises:
        ValueError: it isn't, with those that are.
    """
    names = ["loss", "ce"]
    if arguments.distill.teacher_path is not None:
        names += [name for term in arguments.distill.method().terms for name in term.reports]
    if metric.removeprefix("eval_") not in names:
        raise ValueError(
            f"--metric_for_best_model is {metric!r}; this run reports {', '.join(f'eval_{name}' for name in names)}."
        )


FEW_STEPS = 50
"""Fewer than so many optimiser steps are hardly meant: warm-up and decay take them all."""


def few_steps(training: TrainingArguments, samples: int) -> str | None:
    """What to say of a run that ends after a few steps because its batch is large for its data; None if it isn't so.

    Args:
        training: its arguments; where they say ``max_steps``, that is meant.
        samples: of the training data.
    """
    of_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = math.ceil(training.num_train_epochs * math.ceil(samples / of_step))
    if training.max_steps > 0 or steps >= FEW_STEPS:
        return None
    return (
        f"{samples:,} samples make {steps} optimiser steps of {of_step} in {training.num_train_epochs:g} epoch(s), "
        f"hardly enough; a smaller batch (--gradient_accumulation_steps, in the scripts GLOBAL_BATCH_SIZE) or more "
        f"epochs (--num_train_epochs, EPOCHS) makes more."
    )
