"""A DeepSpeed configuration, looked over before DeepSpeed reads it: its types, its stage, what the flags say otherwise.

The section ``zero_optimization`` is checked by DeepSpeed's own model of it, which transformers and DeepSpeed only reach
after the weights are read, and then with a traceback.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import numbers
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.io import JsonObject, read_json

if TYPE_CHECKING:
    from tinyllava_switchkd.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)

MATCHES = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "fp16.enabled": "fp16",
    "bf16.enabled": "bf16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
}
"""Key of the configuration -> the argument that says the same."""

_SECTIONS = ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "activation_checkpointing", "aio")
_COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print")
_SWITCHES = ("fp16.enabled", "bf16.enabled", "wall_clock_breakdown", "zero_allow_untested_optimizer")
_KNOWN = (*_SECTIONS, *_COUNTS, "gradient_clipping", "wall_clock_breakdown", "zero_allow_untested_optimizer")


def check_deepspeed(config: str | JsonObject, training: TrainingArguments) -> None:
    """Refuse a configuration that cannot be meant.

    Args:
        config: path of a JSON file, the JSON itself, or what it holds; "auto" stands for the arguments' value.
        training: the training arguments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, a value has the wrong type or size, or contradicts an argument.
    """
    where, values = _read(config)
    for section in _SECTIONS:
        if section in values and not isinstance(values[section], dict):
            raise ValueError(f"{where}: {section!r} is {values[section]!r}; it must be an object of settings.")
    for name in values:
        near = difflib.get_close_matches(str(name), _KNOWN, n=1, cutoff=0.85)
        if name not in _KNOWN and near:
            raise ValueError(f"{where}: there is no {name!r}; did you mean {near[0]!r}?")
    for name, value in _numbers(values):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {name!r} is {value}; it must be a finite number.")
    for name in _COUNTS:
        value = values.get(name, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{where}: {name!r} is {value!r}; it must be a whole number of at least 1, or 'auto'.")
    clipping = values.get("gradient_clipping", "auto")
    if clipping != "auto" and (isinstance(clipping, bool) or not isinstance(clipping, numbers.Real) or clipping < 0):
        raise ValueError(f"{where}: 'gradient_clipping' is {clipping!r}; it must be a number of at least 0, or 'auto'.")
    for name in _SWITCHES:
        switch = _value(values, name)
        if switch not in ("auto", None) and not isinstance(switch, bool):
            raise ValueError(f"{where}: {name!r} is {switch!r}; it must be true, false or 'auto'.")
    for section in ("optimizer", "scheduler"):
        if section in values:
            _check_named(where, section, values[section])
    _check_zero(where, values.get("zero_optimization", {}))
    _check_contradictions(where, values, training)


def warn_of_builds() -> None:
    """Say which of DeepSpeed's parts somebody compiles now, or was killed while compiling.

    torch waits for such a lock without an end and without a word.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(folder).glob("*/lock") if folder else Path("~/.cache/torch_extensions").expanduser().glob("*/*/lock")
    for lock in sorted(locks):
        logger.warning(
            "%s says that another process compiles a part of DeepSpeed, or was killed while it did; if this run stands "
            "still now and no other one is starting, remove that file.",
            lock,
        )


def _read(config: str | JsonObject) -> tuple[str, JsonObject]:
    if isinstance(config, dict):
        return "--deepspeed", config
    if not isinstance(config, str | os.PathLike):
        raise ValueError(
            f"--deepspeed is {config!r}; it must be the path of a JSON file (scripts/train has zero2.json)."
        )
    text = os.fspath(config)
    if text.lstrip().startswith("{"):
        try:
            return "--deepspeed", json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"--deepspeed is neither a file nor JSON ({error}).") from None
    if not Path(text).exists():
        raise FileNotFoundError(f"--deepspeed {text} does not exist; scripts/train has zero2.json.")
    return f"--deepspeed {text}", read_json(text, what="file of --deepspeed")


def _numbers(values: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a nested configuration, with its dotted name."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, name)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield name, values


def _value(values: object, name: str) -> object:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _check_named(where: str, section: str, values: JsonObject) -> None:
    if not isinstance(values.get("type"), str):
        raise ValueError(f"{where}: '{section}.type' is {values.get('type')!r}; it must be the name of an {section}.")
    params = values.get("params", {})
    if not isinstance(params, dict):
        raise ValueError(f"{where}: '{section}.params' is {params!r}; it must be an object of settings.")
    for name in ("lr", "eps", "weight_decay", "warmup_max_lr", "warmup_min_lr", "warmup_num_steps", "total_num_steps"):
        value = params.get(name, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, numbers.Real) or value < 0):
            raise ValueError(
                f"{where}: '{section}.params.{name}' is {value!r}; it must be a number of at least 0, or 'auto'."
            )
    betas = params.get("betas", "auto")
    fits = isinstance(betas, list) and len(betas) == 2 and all(isinstance(b, float | int) and 0 <= b < 1 for b in betas)
    if betas != "auto" and not fits:
        raise ValueError(
            f"{where}: '{section}.params.betas' is {betas!r}; it must be two numbers in [0, 1), or 'auto'."
        )


def _check_zero(where: str, zero: JsonObject) -> None:
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        raise ValueError(f"{where}: 'zero_optimization.stage' is {stage!r}; it must be 0, 1, 2 or 3.")
    for name, least in (("offload_param", 3), ("offload_optimizer", 1)):
        offload = zero.get(name)
        if isinstance(offload, dict) and offload.get("device", "none") != "none" and stage < least:
            raise ValueError(
                f"{where}: 'zero_optimization.{name}' needs stage {least} or more, and 'zero_optimization.stage' is "
                f"{stage}."
            )
        if isinstance(offload, dict) and offload.get("device") == "nvme" and not offload.get("nvme_path"):
            raise ValueError(f"{where}: 'zero_optimization.{name}.device' is 'nvme', which needs an 'nvme_path'.")
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError
    except ImportError:  # transformers says so, with the remedy
        return
    try:
        DeepSpeedZeroConfig(**_without_auto(zero))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        known = [key for key in DeepSpeedZeroConfig.model_fields if first["type"] == "extra_forbidden"]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}" if near else first["msg"][:1].lower() + first["msg"][1:]
        raise ValueError(f"{where}: {name!r} is {first['input']!r}; {hint}.") from None


def _without_auto(values: JsonObject) -> JsonObject:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


def _check_contradictions(where: str, values: JsonObject, training: TrainingArguments) -> None:
    if _value(values, "fp16.enabled") is True and _value(values, "bf16.enabled") is True:
        raise ValueError(f"{where}: 'fp16.enabled' and 'bf16.enabled' are both true; choose one.")
    for name, argument in MATCHES.items():
        value, asked = _value(values, name), getattr(training, argument)
        if value not in ("auto", None) and value != asked:
            raise ValueError(
                f"{where}: {name!r} is {value!r}, and --{argument} is {asked!r}; write 'auto' in the file, or give "
                "both the same."
            )
    betas, asked = _value(values, "optimizer.params.betas"), [training.adam_beta1, training.adam_beta2]
    if betas not in ("auto", None) and betas != asked:
        raise ValueError(
            f"{where}: 'optimizer.params.betas' are {betas}, and --adam_beta1 and --adam_beta2 are {asked}; write "
            "'auto' in the file, or give both the same."
        )
    batch, ranks = _value(values, "train_batch_size"), int(os.environ.get("WORLD_SIZE", "1"))
    own = training.per_device_train_batch_size * training.gradient_accumulation_steps * ranks
    if batch not in ("auto", None) and batch != own:
        raise ValueError(
            f"{where}: 'train_batch_size' is {batch}, and --per_device_train_batch_size "
            f"{training.per_device_train_batch_size} x --gradient_accumulation_steps "
            f"{training.gradient_accumulation_steps} x {ranks} processes make {own}; write 'auto' in the file."
        )
