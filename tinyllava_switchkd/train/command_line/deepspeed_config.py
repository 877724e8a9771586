"""Checks a DeepSpeed configuration before DeepSpeed reads it: types, stage, contradictions with the flags.

The section ``zero_optimization`` is checked by DeepSpeed's own class for it. Without this, transformers and DeepSpeed
would reach that check only after reading the weights, and fail with a traceback.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from tinyllava_switchkd.io import JsonObject, read_json
from tinyllava_switchkd.runtime import world_size
from tinyllava_switchkd.train.command_line.settings import OneOf, Range, numbers_in

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

_SECTIONS = ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler", "activation_checkpointing", "aio")
_COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print")
_SWITCHES = ("fp16.enabled", "bf16.enabled", "wall_clock_breakdown", "zero_allow_untested_optimizer")
_STAGES = OneOf(0, 1, 2, 3)
_VALUES: dict[str, Range | OneOf] = {
    **dict.fromkeys(_COUNTS, Range(1, 1_000_000_000, whole=True)),
    **dict.fromkeys(_SWITCHES, OneOf(True, False)),
    "gradient_clipping": Range(0, 1e30),
    **{f"scheduler.params.{name}": Range(0, 1e30) for name in ("warmup_min_lr", "warmup_num_steps", "total_num_steps")},
}
"""Dotted name -> allowed values besides "auto". transformers compares most other settings with an argument."""

_KNOWN = (*_SECTIONS, *(name for name in _VALUES if "." not in name))


def check_deepspeed(config: str | JsonObject, training: TrainingArguments) -> None:
    """Check a DeepSpeed configuration.

    Args:
        config: path of a JSON file, the JSON text, or its content; "auto" stands for the arguments' value.
        training: the training arguments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or a value has the wrong type, is out of range or contradicts an argument.
    """
    where, values = _read(config)
    for section in _SECTIONS:
        if section in values and not isinstance(values[section], dict):
            raise ValueError(f"{where}: {section!r} is {values[section]!r}; it must be an object of settings.")
    for name in values:
        near = difflib.get_close_matches(str(name), _KNOWN, n=1, cutoff=0.85)
        if name not in _KNOWN and near:
            raise ValueError(f"{where}: there is no {name!r}; did you mean {near[0]!r}?")
    for section in ("optimizer", "scheduler"):
        if section in values:
            _check_named(where, section, values[section])
    if "optimizer" in values:  # DeepSpeed gives it one group with all parameters
        for name in ("mm_projector_lr", "vision_tower_lr", "weight_decay"):
            value = getattr(training, name, None)
            if value is not None and (value or name != "weight_decay"):
                raise ValueError(
                    f"{where}: the section 'optimizer' treats all parameters alike, unlike --{name} {value}; leave the "
                    "section out, and the optimiser is made from the arguments."
                )
    for name, number in numbers_in(values):
        if not math.isfinite(number):
            raise ValueError(f"{where}: {name!r} is {number}; it must be a finite number.")
    for name, allowed in _VALUES.items():
        value = _value(values, name, absent="auto")
        if value != "auto" and value not in allowed:
            raise ValueError(f"{where}: {name!r} is {value!r}; it must be {allowed}, or 'auto'.")
    _check_zero(where, values.get("zero_optimization", {}))
    _check_contradictions(where, values, training)


def warn_of_builds() -> None:
    """Warn of locks by which a process compiles one of DeepSpeed's extensions, or was killed while it did.

    torch waits for such a lock forever and silently.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    locks = Path(folder).glob("*/lock") if folder else Path("~/.cache/torch_extensions").expanduser().glob("*/*/lock")
    for lock in sorted(locks):
        logger.warning(
            "%s says that another process is compiling a part of DeepSpeed, or was killed while it did; if this run "
            "hangs now and no other one is starting, remove that file.",
            lock,
        )


def _read(config: str | JsonObject) -> tuple[str, JsonObject]:
    if isinstance(config, dict):
        return "--deepspeed", config
    if not isinstance(config, str | os.PathLike):
        raise ValueError(
            f"--deepspeed is {config!r}; it must be the path of a JSON file (such as scripts/train/zero2.json)."
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


def _value(values: object, name: str, absent: object = None) -> object:
    for key in name.split("."):
        if not isinstance(values, dict) or key not in values:
            return absent
        values = values[key]
    return values


def _check_named(where: str, section: str, values: JsonObject) -> None:
    if not isinstance(values.get("type"), str):
        raise ValueError(f"{where}: '{section}.type' is {values.get('type')!r}; it must be a name.")
    if not isinstance(values.get("params", {}), dict):
        raise ValueError(f"{where}: '{section}.params' is {values['params']!r}; it must be an object of settings.")


def _check_zero(where: str, zero: JsonObject) -> None:
    stage = zero.get("stage", 0)
    if stage not in _STAGES:
        raise ValueError(f"{where}: 'zero_optimization.stage' is {stage!r}; it must be {_STAGES}.")
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError
    except ImportError as error:
        raise ImportError(
            f"{where} needs DeepSpeed ({error}); pip install 'tinyllava_switchkd[train]', or train without (ZERO=none)."
        ) from None
    try:
        DeepSpeedZeroConfig(**_without_auto(zero))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        known = [key for key in DeepSpeedZeroConfig.model_fields if first["type"] == "extra_forbidden"]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}" if near else first["msg"][:1].lower() + first["msg"][1:]
        raise ValueError(f"{where}: {name!r} is {first['input']!r}; {hint}.") from None
    for name, least in (("offload_param", 3), ("offload_optimizer", 1)):
        offload = zero.get(name) or {}
        if offload.get("device", "none") != "none" and stage < least:
            raise ValueError(
                f"{where}: 'zero_optimization.{name}' needs stage {least} or more, and 'zero_optimization.stage' is "
                f"{stage}."
            )
        if offload.get("device") == "nvme" and not offload.get("nvme_path"):
            raise ValueError(f"{where}: 'zero_optimization.{name}.device' is 'nvme', which needs an 'nvme_path'.")


def _without_auto(values: JsonObject) -> JsonObject:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }


def _check_contradictions(where: str, values: JsonObject, training: TrainingArguments) -> None:
    """Run transformers' own check now; transformers itself runs it only after the weights are read."""
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    if _value(values, "fp16.enabled") is True and _value(values, "bf16.enabled") is True:
        raise ValueError(f"{where}: 'fp16.enabled' and 'bf16.enabled' are both true; choose one.")
    config = HfTrainerDeepSpeedConfig(copy.deepcopy(values))
    config.trainer_config_process(SimpleNamespace(**{**vars(training), "world_size": world_size()}))
    if config.mismatches:
        found = "; ".join(line.removeprefix("- ds ").replace(" vs hf ", " there, ") for line in config.mismatches)
        raise ValueError(f"{where}: {found} here; write 'auto' in the file, or give both the same.")
