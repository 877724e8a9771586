"""The allowed values of settings, in one table for command lines, environment variables and Python.

NaN passes a test such as ``value < 0``, and an infinite learning rate or weight silently ruins a model. So no setting
may be infinite or NaN, and `ALLOWED` has the other limits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class OneOf:
    """Words or numbers to choose from."""

    def __init__(self, *choices: str | int) -> None:
        self.choices = choices

    def __contains__(self, value: object) -> bool:
        return any(value == choice and type(value) is type(choice) for choice in self.choices)  # 1 is not True

    def __str__(self) -> str:
        return f"one of {', '.join(str(choice) for choice in self.choices)}"

    def wrong(self, text: str) -> str | None:
        """None if the text is an allowed value; otherwise a phrase that says what is allowed."""
        return None if text in [str(choice) for choice in self.choices] else str(self)


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; None is allowed if it is the setting's default."""

    low: float
    high: float
    without_low: bool = False
    without_high: bool = False
    whole: bool = False
    """Whole numbers only."""
    share: bool = False
    """A value below 1 is a share of all steps; other values are whole numbers of steps."""
    also: tuple[float, ...] = ()
    """Special values outside the range."""

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if value in self.also:
            return True
        low = value > self.low if self.without_low else value >= self.low
        high = value < self.high if self.without_high else value <= self.high
        return low and high and (value == int(value) or not (self.whole or (self.share and value > 1)))

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        least, most = (f"{end:d}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        low = f"greater than {least}" if self.without_low else f"at least {least}"
        high = f"less than {most}" if self.without_high else f"at most {most}"
        also = "".join(f", or {value:g}" for value in self.also)
        share = " (below 1 a share of all steps, otherwise whole)" if self.share else ""
        return f"{kind} {low} and {high}{share}{also}"

    def wrong(self, text: str) -> str | None:
        """As `OneOf.wrong`."""
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            return str(self)
        return None if value in self and text == text.strip() and "_" not in text else str(self)


_COUNT = Range(1, 1_000_000_000, whole=True)
_NATURAL = Range(0, 1_000_000_000, whole=True)
_RATE = Range(0, 10)
_EVERY = Range(0, 1_000_000_000, without_low=True, share=True)
_BETA = Range(0, 1, without_high=True)
_SEED = Range(0, 2**32 - 1, whole=True)  # what numpy takes

ALLOWED: dict[str, Range | OneOf] = {
    "log_gradient_shares": _NATURAL,
    "early_stopping_patience": _COUNT,
    "learning_rate": _RATE,
    "mm_projector_lr": _RATE,
    "vision_tower_lr": _RATE,
    "weight_decay": Range(0, 10),
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": Range(0, 1, without_low=True),
    "max_grad_norm": Range(0, 1e9),
    "num_train_epochs": Range(0, 1e6, without_low=True),
    "max_steps": Range(1, 1_000_000_000, whole=True, also=(-1,)),
    "warmup_steps": Range(0, 1_000_000_000, share=True),
    "logging_steps": _EVERY,
    "save_steps": _EVERY,
    "eval_steps": _EVERY,
    "save_total_limit": _COUNT,
    "per_device_train_batch_size": Range(1, 1_000_000, whole=True),
    "per_device_eval_batch_size": Range(1, 1_000_000, whole=True),
    "gradient_accumulation_steps": Range(1, 1_000_000, whole=True),
    "max_nan_steps": _COUNT,
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": Range(0, 1024, whole=True),
    "dataloader_prefetch_factor": Range(1, 100_000, whole=True),
    "torch_empty_cache_steps": _COUNT,
    "ddp_bucket_cap_mb": Range(1, 1_000_000, whole=True),
    "ddp_timeout": _COUNT,
    "lora_r": Range(1, 100_000, whole=True),
    "lora_alpha": Range(0, 1e6, without_low=True),
    "lora_dropout": Range(0, 1, without_high=True),
    "tune_vision_tower_from_layer": _NATURAL,
    "num_queries": Range(1, 1_000_000, whole=True),
    "num_resampler_layers": Range(1, 10_000, whole=True),
    "resampler_hidden_size": Range(1, 1_000_000, whole=True),
    "model_max_length": _COUNT,
    "mm_vision_select_layer": Range(-10_000, 10_000, whole=True),
    "chunk_size": _COUNT,
    "mm_vision_select_feature": OneOf("patch", "cls_patch"),
    "tokenizer_padding_side": OneOf("right", "left"),
    "image_aspect_ratio": OneOf("square", "pad"),
    "image_backend": OneOf("pil", "torchvision"),
    "on_bad_image": OneOf("raise", "skip"),
    "eval_share": Range(0, 1, without_low=True, without_high=True),
    "tune_type_llm": OneOf("frozen", "full", "lora", "qlora"),
    "tune_type_vision_tower": OneOf("frozen", "full", "partially-tune", "lora", "qlora"),
    "tune_type_connector": OneOf("frozen", "full", "lora", "qlora"),
    "bits": OneOf(4, 8, 16),
    "quant_type": OneOf("nf4", "fp4"),
    "lora_bias": OneOf("none", "all", "lora_only"),
    "teacher_bits": OneOf(16, 8, 4),
    "teacher_cache_dtype": OneOf("bf16", "fp32"),
    "bridge": OneOf("auto", "none"),
    "on_nan": OneOf("stop", "skip"),
}
"""Setting -> allowed values. Methods and losses check the range of their own (temperature, top_k, ...)."""


def check_settings(group: Any) -> None:
    """Check that settings are finite and within `ALLOWED`.

    Args:
        group: a dataclass of arguments.

    Raises:
        ValueError: the first wrong setting, with its value and the allowed ones.
    """
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        allowed = ALLOWED.get(field.name)
        if value is None and (field.default is None or allowed is None):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{field.name} is {value}; it must be {allowed or 'a finite number'}.")
        for name, inner in _inner(field.name, value):
            if not math.isfinite(inner):
                raise ValueError(f"--{field.name} has {inner} for {name!r}; it must be a finite number.")
        if allowed is not None and value not in allowed:
            raise ValueError(f"--{field.name} is {value!r}; it must be {allowed}.")


_PARTS = ("llm", "vision_tower", "connector")


def check_tuning(training: Any) -> None:
    """Check that the tune types fit each other, the learning rates and the training recipe.

    Args:
        training: has these settings as attributes, as they are or as on a command line; None if not given.

    Raises:
        ValueError: the values that contradict each other, and the remedy.
    """
    kind = {part: getattr(training, f"tune_type_{part}") for part in _PARTS}
    if all(one == "frozen" for one in kind.values()):
        raise ValueError(
            "--tune_type_llm, --tune_type_vision_tower and --tune_type_connector are all frozen, so nothing would "
            "be trained; set one of them to full."
        )
    for name, part in (("mm_projector_lr", "connector"), ("vision_tower_lr", "vision_tower")):
        if getattr(training, name) is not None and kind[part] == "frozen":
            raise ValueError(
                f"--{name} {getattr(training, name)} is given, but --tune_type_{part} is frozen; leave the learning "
                f"rate out or train the {part.replace('_', ' ')}."
            )
    recipe = training.training_recipe.lower()
    with_adapters = [part for part in _PARTS if kind[part] in ("lora", "qlora")]
    if recipe == "common" and with_adapters:
        part = with_adapters[0]
        raise ValueError(
            f"--tune_type_{part} is {kind[part]!r}, which needs --training_recipe lora or qlora, "
            f"not {training.training_recipe!r}."
        )
    if recipe in ("lora", "qlora", "qlora_int8"):
        wanted = recipe.split("_")[0]
        if not with_adapters:
            raise ValueError(
                f"--training_recipe {training.training_recipe} needs a part to adapt; set --tune_type_llm {wanted}."
            )
        if recipe == "lora" and any(kind[part] == "qlora" for part in with_adapters):
            raise ValueError("--training_recipe lora has no tune type qlora; use --training_recipe qlora.")


def check_teacher_cache(distill: Any) -> None:
    """Check that no setting of a teacher cache is given without its folder; `distill` is as in `check_tuning`.

    Raises:
        ValueError: the setting, and the remedy.
    """
    if distill.teacher_cache_dtype is not None and distill.teacher_cache is None:
        raise ValueError(f"--teacher_cache_dtype {distill.teacher_cache_dtype} does nothing without --teacher_cache.")
    if distill.fill_teacher_cache and distill.teacher_cache is None:
        raise ValueError("--fill_teacher_cache True names no folder to fill; give --teacher_cache as well.")


def weightless(flags: Sequence[str], teacher: str) -> str:
    """The error if all weights of a method are 0."""
    return (
        f"{', '.join(f'--{flag}' for flag in flags)} {'are all' if len(flags) > 1 else 'is'} 0, so the teacher "
        f"{teacher!r} teaches nothing; leave --teacher_path out or give one of them a weight."
    )


def _inner(setting: str, value: object) -> Iterator[tuple[str, float]]:
    """Every floating-point number in a setting that is an object, JSON or the text of optim_args, with its name."""
    if isinstance(value, str) and value.startswith("{") and setting != "deepspeed":  # see `deepspeed_config`
        with contextlib.suppress(ValueError, RecursionError):
            yield from numbers_in(json.loads(value))
    elif isinstance(value, str) and setting == "optim_args":
        for part in value.replace(" ", "").split(","):
            key, _, number = part.partition("=")
            with contextlib.suppress(ValueError):
                yield key, float(number)
    else:
        yield from numbers_in(value)


def numbers_in(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every floating-point number in a nested object, with its dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers_in(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers_in(inner, name)
    elif isinstance(value, float) and name:
        yield name, value
