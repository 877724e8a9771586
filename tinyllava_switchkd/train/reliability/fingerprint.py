"""A run's fingerprint, which says what is learned and how. Checkpoints record it, and resuming compares it.

It has digests of the data and the teacher (their content, since paths may change) and every argument that changes the
maths. A run's length and the intervals of logging and saving may change. So may the number of processes, as long as
the batch of an optimiser step stays the same.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import transformers

from tinyllava_switchkd.distill import MethodFactory
from tinyllava_switchkd.io import JsonObject, digest, digest_of_files, read_json
from tinyllava_switchkd.model.weights import resolve_folder
from tinyllava_switchkd.train.command_line.arguments import Arguments

logger = logging.getLogger(__name__)

FILE = "fingerprint.json"
"""File in a checkpoint."""

DATA, HELD_OUT, TEACHER = "data_path", "eval_data_path", "teacher_path"
"""Arguments of which the files' content is recorded instead of the path."""

_OF_TRANSFORMERS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "average_tokens_across_devices",
    "bf16",
    "data_seed",
    "dataloader_drop_last",
    "fp16",
    "gradient_accumulation_steps",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "optim_args",
    "per_device_train_batch_size",
    "seed",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
)
"""transformers' training arguments that change the maths. A resumed run keeps its learning rate in any case."""

_WITHOUT_EFFECT = {
    # paths, memory use, one-time actions; chunks and attention only change rounding
    *("cache_dir", "attn_implementation", "image_folder", "model_name_or_path", "tokenizer_name_or_path"),
    *("vision_tower", "vision_tower2", "chunk_size", "pretrained_model_path", "overwrite_output_dir", "estimate"),
    *("report_to", "remove_unused_columns", "on_nan", "max_nan_steps", "allow_changed", "teacher_cache"),
    *("fill_teacher_cache", "log_gradient_shares", "keep_in_memory", "allow_outside_images"),
    *("early_stopping_patience", DATA, HELD_OUT, TEACHER),
}
_UNREADABLE = ("deepspeed", "lora_r", "num_queries", "num_resampler_layers", "resampler_hidden_size")
"""Arguments without which a checkpoint's weights or optimiser states cannot be read, so they may never differ."""

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_NEW_RUN = "start a new run with --overwrite_output_dir True"


def describe(arguments: Arguments, world_size: int = 1) -> JsonObject:
    """The fingerprint of a run: the arguments that change the maths, and the digests of data and teacher.

    Args:
        arguments: the run's arguments.
        world_size: the number of processes.
    """
    model, data, training, distill = arguments[:4]
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    chosen: JsonObject = {}
    for group in (model, data, distill, training):
        for field in dataclasses.fields(group):
            if field.name in _WITHOUT_EFFECT or (group is training and field.name in inherited):
                continue
            chosen[field.name] = getattr(group, field.name)
    if distill.teacher_path is not None:  # settings that were not given have the method's defaults
        for name, setting in MethodFactory(distill.distill_method).settings().items():
            chosen[name] = setting.default if chosen[name] is None else chosen[name]
    chosen |= {name: getattr(training, name) for name in _OF_TRANSFORMERS if hasattr(training, name)}
    if training.bf16 or distill.teacher_cache_dtype != "bf16":
        chosen["teacher_cache_dtype"] = None  # without rounding the cache changes nothing
    chosen = {name: plain(value) for name, value in chosen.items()}
    config = getattr(training, "hf_deepspeed_config", None)
    chosen["deepspeed"] = "none" if config is None else f"ZeRO-{config.config['zero_optimization']['stage']}"
    chosen["world_size"] = world_size
    assert data.data_path is not None, "the arguments have been checked"
    chosen[DATA] = digest(data.data_path)
    chosen[HELD_OUT] = None if data.eval_data_path is None else digest(data.eval_data_path)
    chosen[TEACHER] = None if distill.teacher_path is None else teacher_digest(distill.teacher_path, model.cache_dir)
    return chosen


def teacher_digest(path: str, cache_dir: str | None = None) -> str:
    """A digest of a checkpoint's weights and configuration, independent of its path."""
    folder = resolve_folder(path, cache_dir=cache_dir)
    patterns = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
    files = [file for pattern in patterns for file in folder.rglob(pattern)]
    of_run = ("training_args.bin", "checkpoint-")  # a training keeps these beside the model
    kept = {f for f in files if not any(part.startswith(of_run) for part in f.relative_to(folder).parts)}
    return digest_of_files(folder, kept)


def read(checkpoint: str | Path) -> JsonObject | None:
    """The fingerprint in a checkpoint; None if it has none.

    Raises:
        ValueError: this program did not write the file.
    """
    file = Path(checkpoint) / FILE
    if not file.is_file():
        return None
    recorded = read_json(file)
    numbers = [recorded.get(name) for name in ("world_size", *_BATCH)]
    if not all(type(number) is int and number > 0 for number in numbers) or TEACHER not in recorded:
        raise ValueError(f"{file} does not hold a run's arguments; use another checkpoint, or {_NEW_RUN}.")
    if "conv_version" in recorded:  # the template's name until 0.2.0
        recorded.setdefault("template", recorded.pop("conv_version"))
    return recorded


def differences(theirs: JsonObject, ours: JsonObject, allowed: Iterable[str] = ()) -> dict[str, str]:
    """Name -> description of each argument that differs, except those in `allowed`.

    If the numbers of processes differ, only the batch of a step is compared, not how it is divided. Arguments that only
    one side has (from another version of this program) are not compared.
    """
    theirs, ours = dict(theirs), dict(ours)
    if theirs["world_size"] != ours["world_size"]:
        for side in (theirs, ours):
            side["step_samples"] = side["world_size"] * side.pop(_BATCH[0]) * side.pop(_BATCH[1])
    found = {}
    joined = (theirs[TEACHER] is None) != (ours[TEACHER] is None)
    for name in sorted(theirs.keys() & ours.keys() - {"world_size", *allowed}):
        before, now = theirs[name], ours[name]
        if before == now or (joined and name != TEACHER and None in (before, now)):  # settings of the teacher's method
            continue
        if name in (DATA, HELD_OUT, TEACHER) and before is not None and now is not None:
            found[name] = f"the content of --{name} has changed"
        elif name == TEACHER:
            found[name] = "the teacher was left out" if now is None else "there was no teacher"
        else:
            found[name] = f"{name} {before!r}, now {now!r}"
    return found


def check(checkpoint: str | Path, ours: JsonObject, allowed: Iterable[str] = ()) -> None:
    """Refuse to resume from a checkpoint with another fingerprint.

    Raises:
        ValueError: with each difference, and how to allow it.
    """
    theirs = read(checkpoint)
    if theirs is None:
        logger.warning("%s does not record its run's arguments, so they are not compared.", checkpoint)
        return
    fixed = set(_UNREADABLE)
    if all(side.get("deepspeed") in ("ZeRO-1", "ZeRO-2") for side in (theirs, ours)):  # they write the same files
        fixed.remove("deepspeed")
    found = differences(theirs, ours, set(allowed) - fixed)
    started = f"The run in {checkpoint} was started with other arguments: {'; '.join(found.values())}."
    if found.keys() & fixed:
        raise ValueError(f"{started} Its checkpoint can only be read with those; use them, or {_NEW_RUN}.")
    if found:
        raise ValueError(
            f"{started} Use those, {_NEW_RUN}, or, if the change is intended, pass --allow_changed {' '.join(found)}."
        )
    for words in differences(theirs, ours).values():
        logger.warning("Allowed to differ from %s: %s.", checkpoint, words)


def plain(value: object) -> object:
    """A value in the form that JSON returns."""
    value = getattr(value, "value", value)  # of an enum
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
