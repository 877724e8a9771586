"""Checks of names, paths and settings before weights are read."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

from tinyllava_switchkd.data.template import TemplateFactory
from tinyllava_switchkd.model.connector import ConnectorFactory
from tinyllava_switchkd.model.vision_tower import VisionTowerFactory
from tinyllava_switchkd.train.command_line.arguments import Arguments, TrainingArguments
from tinyllava_switchkd.train.recipes import TrainingRecipeFactory
from tinyllava_switchkd.train.reliability.checkpoints import is_chosen


def check_names(arguments: Arguments) -> None:
    """Check that every registered name exists, except the language model's, which is looked up with its configuration.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    model, data, training, *_ = arguments
    TrainingRecipeFactory.name_of(training.training_recipe)
    TemplateFactory.name_of(data.template)
    if training.pretrained_model_path is None:
        VisionTowerFactory.name_of(model.vision_tower)
        ConnectorFactory.name_of(model.connector_type)


def check_paths(arguments: Arguments) -> None:
    """Check that every path exists and that the output folder is writable.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: with the argument, the path and the remedy.
    """
    _, data, training, *_ = arguments
    if data.data_path is None or not Path(data.data_path).is_file():
        raise FileNotFoundError(f"--data_path {data.data_path} does not exist; give a JSON file in LLaVA's format.")
    if data.eval_data_path is not None and not Path(data.eval_data_path).is_file():
        raise FileNotFoundError(f"--eval_data_path {data.eval_data_path} does not exist; give a JSON file.")
    if data.image_folder and not Path(data.image_folder).is_dir():
        raise FileNotFoundError(f"--image_folder {data.image_folder} is not a folder; give the one with the images.")
    for name, path in {**_models(arguments), "resume_from_checkpoint": training.resume_from_checkpoint}.items():
        if name in ("model_name_or_path", "vision_tower") and training.pretrained_model_path is not None:
            continue  # the checkpoint has its own
        if name == "resume_from_checkpoint" and path and is_chosen(training.output_dir, path):
            continue  # it may have been removed since, and the run goes on from its latest one
        # a hub name is ``owner/model`` or ``model``; anything else, and anything that exists, is a path
        is_path = path and (path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).exists())
        if path and is_path and not Path(path).expanduser().is_dir():
            hint = " (pretrain.sh writes one)" if name == "pretrained_model_path" else ""
            raise FileNotFoundError(f"--{name} {path} does not exist; give the folder of a model{hint}.")
    check_writable(training.output_dir)
    check_overwriting(arguments)


def check_overwriting(arguments: Arguments) -> None:
    """Check that the output overwrites neither what the run reads nor a model that no training run wrote.

    Raises:
        FileExistsError: it would.
    """
    training, folder = arguments.training, Path(arguments.training.output_dir)
    for name, path in _models(arguments).items():
        if path and folder.is_dir() and Path(path).is_dir() and folder.samefile(path):
            raise FileExistsError(f"--output_dir {folder} is also the folder of --{name}; choose another.")
    marks = ("training_args.*", "trainer_state.json", "checkpoint-*")  # files of a training run
    if training.overwrite_output_dir or any(any(folder.glob(mark)) for mark in marks):
        return
    for weights in ("*.safetensors", "*.bin"):
        for file in folder.glob(weights):
            raise FileExistsError(
                f"--output_dir {folder} holds weights ({file.name}) that no training run has written; choose another "
                f"folder, or pass --overwrite_output_dir True."
            )


def check_writable(output_dir: str) -> None:
    """Check that the output folder exists or can be created, without creating it.

    Raises:
        NotADirectoryError, PermissionError: it cannot.
    """
    existing = Path(output_dir).expanduser().absolute()
    while not existing.exists() and not existing.is_symlink():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"--output_dir {output_dir} cannot be created: {existing} is a file; choose another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--output_dir {output_dir}: you may not write to {existing}; choose another.")


def prepare_output(output_dir: str) -> None:
    """Create the output folder and write to it once, since permissions do not reveal a full or read-only file system.

    Raises:
        OSError: that failed.
        ValueError: the folder holds a pipe or a device.
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
    """Arguments that name models -> their values."""
    model = arguments.model
    return {
        "teacher_path": arguments.distill.teacher_path,
        "pretrained_model_path": arguments.training.pretrained_model_path,
        "model_name_or_path": model.model_name_or_path,
        "vision_tower": model.vision_tower.split(":", 1)[-1],  # may start with the kind of tower, "kind:"
    }


def check_metric(arguments: Arguments, metric: str) -> None:
    """Check that the run reports the metric that selects the best checkpoint.

    Raises:
        ValueError: it does not; the message lists the metrics that it reports.
    """
    names = ["loss", "ce"]
    if arguments.distill.teacher_path is not None:
        names += [name for term in arguments.distill.method().terms for name in term.reports]
    if metric.removeprefix("eval_") not in names:
        raise ValueError(
            f"--metric_for_best_model is {metric!r}; this run reports {', '.join(f'eval_{name}' for name in names)}."
        )


def remarks(training: TrainingArguments) -> list[str]:
    """Warnings of settings that a user may not expect: one GPU of several, and checkpoints without an optimiser."""
    gpus, found = getattr(training, "_n_gpu", 1), []
    if gpus > 1:
        found.append(
            f"Only one of {gpus} GPUs is used; for all, start the run by scripts/train or by torchrun --nproc_per_node "
            f"{gpus}."
        )
    if training.save_only_model:
        found.append(
            "With --save_only_model True no run can resume from its checkpoints; the same command starts from the "
            "beginning."
        )
    return found


def check_batch(training: TrainingArguments, samples: int) -> None:
    """Check that `dataloader_drop_last` leaves a batch.

    Raises:
        ValueError: it does not.
    """
    batch = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and samples < batch:
        raise ValueError(
            f"There are {samples} samples, fewer than a batch of {batch}, and --dataloader_drop_last True leaves them "
            "out; leave that flag out, or take a smaller --per_device_train_batch_size."
        )


def check_gradient_shares(training: TrainingArguments) -> None:
    """Check that the run can log the gradient of each term.

    Raises:
        ValueError: it uses ZeRO-3.
    """
    deepspeed = getattr(training, "hf_deepspeed_config", None)
    if training.log_gradient_shares and deepspeed is not None and deepspeed.is_zero3():
        raise ValueError(
            f"--log_gradient_shares {training.log_gradient_shares} does not work with ZeRO-3, which has released the "
            f"weights that a backward pass per term needs; use ZeRO-2 (zero2.json), or leave it out."
        )


FEW_STEPS = 50
"""Fewer optimiser steps than this are probably a mistake: warm-up and decay take all of them."""


def few_steps(training: TrainingArguments, samples: int) -> str | None:
    """A warning if the batch is so large for the data that the run has only a few steps; otherwise None.

    Args:
        training: the training arguments; with an explicit ``max_steps`` there is no warning.
        samples: number of training samples.
    """
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps = math.ceil(training.num_train_epochs * math.ceil(samples / batch))
    if training.max_steps > 0 or steps >= FEW_STEPS:
        return None
    return (
        f"{samples:,} samples make only {steps} optimiser steps of {batch} in {training.num_train_epochs:g} epoch(s); "
        f"for more, take a smaller batch (--gradient_accumulation_steps, in the scripts GLOBAL_BATCH_SIZE) or more "
        f"epochs (--num_train_epochs, EPOCHS)."
    )
