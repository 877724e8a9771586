"""From a command line to `Arguments`, including the flags of older scripts.

Hugging Face has removed arguments that every TinyLLaVA script passes (``--evaluation_strategy``, ``--warmup_ratio``,
``--logging_dir``, ...), and v1 had arguments that nothing read (``--lazy_preprocess``, ...). Such flags are translated
if there is an equivalent, and ignored otherwise, with one warning each.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, NoReturn

from tinyllava_switchkd.cli import show
from tinyllava_switchkd.runtime import is_main_process
from tinyllava_switchkd.train.command_line.flags import (
    REQUIRED,
    TRUE,
    check_flags,
    help_text,
    own_flags,
    pairs,
    refuse_unknown,
    transformers_flags,
)
from tinyllava_switchkd.train.command_line.settings import Range

if TYPE_CHECKING:
    from tinyllava_switchkd.train.command_line.arguments import Arguments

logger = logging.getLogger(__name__)

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
}
"""Old name -> new name with the same meaning."""

GUESSED = {"connector_lr": "mm_projector_lr"}
"""Names that users might guess -> the argument's name."""

TEMPLATE = dict.fromkeys(("conv_version", "conv_mode"), "template")
"""TinyLLaVA v1's and LLaVA's names of the conversation template -> ours, translated without a warning."""

IGNORED = {
    # TinyLLaVA v1: nothing read them there, or they always hold here
    "lazy_preprocess": "samples are always read lazily",
    "mm_patch_merge_type": "nothing ever read it",
    "tune_embed_tokens": "nothing ever read it; the embeddings are trained with the language model",
    "lora_weight_path": "nothing ever read it; start from --pretrained_model_path",
    "tokenizer_use_fast": "transformers 5 has only fast tokenizers",
    # removed in transformers 5
    "save_safetensors": "checkpoints are always safetensors",
    "fp16_backend": "mixed precision is torch's",
    "half_precision_backend": "mixed precision is torch's",
    "include_tokens_per_second": "tokens per second are always logged",
    "use_mps_device": "the device is chosen automatically",
}
"""Old name -> why it can be ignored."""


def _warmup_ratio(value: str, rest: dict[str, str]) -> list[str]:
    wrong = Range(0, 1, without_high=True).wrong(value)
    if wrong is not None:
        raise ValueError(f"--warmup_ratio is {value!r}; it must be {wrong}.")
    steps = rest.get("warmup_steps", "0")
    if steps not in ("0", "0.0"):
        logger.warning("--warmup_steps %s is given, so --warmup_ratio %s is ignored.", steps, value)
        return []
    return ["--warmup_steps", value]  # transformers 5 takes a number below 1 as a share of all steps


def _if_true(*words: str) -> Callable[[str, dict[str, str]], list[str]]:
    return lambda value, rest: list(words) if value.lower() in TRUE else []


TRANSLATED: dict[str, tuple[Callable[[str, dict[str, str]], list[str]], str]] = {
    "warmup_ratio": (_warmup_ratio, "it is passed on as a --warmup_steps below 1"),
    # `parse_arguments` sets the variable, because translating must have no side effects
    "logging_dir": (lambda value, rest: [], "it is passed on in the environment as TENSORBOARD_LOGGING_DIR"),
    "group_by_length": (
        _if_true("--train_sampling_strategy", "group_by_length"),
        "it is now --train_sampling_strategy group_by_length",
    ),
    "adafactor": (_if_true("--optim", "adafactor"), "it is now --optim adafactor"),
}
"""Old name -> (translation of its value, note for the warning)."""


_ONLY_WITH: tuple[tuple[tuple[str, ...], Callable[[Arguments], bool], str], ...] = (
    (("log_gradient_shares",), lambda run: run.distill.teacher_path is not None, "--teacher_path"),
    (
        ("lora_r", "lora_alpha", "lora_dropout", "lora_bias"),
        lambda run: run.training.training_recipe != "common",
        "--training_recipe lora or qlora",
    ),
    (
        ("bits", "double_quant", "quant_type"),
        lambda run: run.training.training_recipe not in ("common", "lora"),
        "--training_recipe qlora",
    ),
    (("vision_tower2",), lambda run: "mof" in (run.model.vision_tower or "mof"), "--vision_tower mof:NAME"),
    (("max_nan_steps",), lambda run: run.training.on_nan == "skip", "--on_nan skip"),
)
"""Flags, whether a run uses them, and what they belong to; other values than the default cause a warning."""


def _warn_of_unused(arguments: Arguments) -> None:
    for flags, is_used, owner in _ONLY_WITH:
        for flag in flags:
            group = next(group for group in arguments[:4] if hasattr(group, flag))
            if getattr(group, flag) != type(group).__dataclass_fields__[flag].default and not is_used(arguments):
                _warn("--%s %s does nothing without %s.", flag, getattr(group, flag), owner)


def _warn(message: str, *values: object) -> None:
    if is_main_process():
        logger.warning(message, *values)


def translate_argv(argv: Sequence[str]) -> list[str]:
    """Replace or drop outdated arguments, with one warning each.

    Arguments that the installed transformers still has are not changed.

    Raises:
        ValueError: a value that the new argument cannot take.
    """
    known = transformers_flags().keys() | own_flags().keys()
    split = pairs(argv)
    rest = {name: " ".join(values) for name, values in split}
    translated: list[str] = []
    warned: set[str] = set()
    for name, values in split:
        value = " ".join(values) or "True"
        name = TEMPLATE.get(name.replace("-", "_"), name)
        if name in GUESSED and name not in known:
            _warn("--%s is called --%s.", name, GUESSED[name])
            name = GUESSED[name]
        if name in known or name not in RENAMED | IGNORED | TRANSLATED:
            translated += [f"--{name}", *values]
            continue
        if name in RENAMED:
            note = f"it is now --{RENAMED[name]}"
            translated += [f"--{RENAMED[name]}", *values]
        elif name in IGNORED:
            note = f"it is ignored: {IGNORED[name]}"
        else:
            translate, note = TRANSLATED[name]
            translated += translate(value, rest)
        if name not in warned:
            _warn("--%s is an argument of older versions; %s.", name, note)
            warned.add(name)
    return translated


def answer_at_once(argv: Sequence[str]) -> None:
    """End the process if the command line asks for help or is certainly wrong, before slow imports."""
    if {"-h", "--help"} & set(argv):
        if is_main_process():
            show(help_text())
        sys.exit(0)
    try:
        check_command_line(argv)
    except ValueError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def check_command_line(argv: Sequence[str]) -> None:
    """Refuse a command line that is certainly wrong, without slow imports.

    Raises:
        ValueError: what is wrong, in one sentence.
    """
    logging.disable()  # `parse_arguments` warns later
    try:
        check_flags(translate_argv(argv))
    finally:
        logging.disable(logging.NOTSET)


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read a command line (by default the process's own).

    Raises:
        ValueError: an argument is unknown, a value has the wrong type, or values contradict each other.
    """
    from transformers import HfArgumentParser

    from tinyllava_switchkd.train.command_line.arguments import (
        Arguments,
        DataArguments,
        ModelArguments,
        TrainingArguments,
        distill_arguments,
    )

    argv = sys.argv[1:] if argv is None else argv
    for values in (values for name, values in pairs(argv) if name == "logging_dir"):
        os.environ["TENSORBOARD_LOGGING_DIR"] = " ".join(values)
    argv = translate_argv(argv)
    # the training arguments come last, because constructing them opens the process group
    groups = (ModelArguments, DataArguments, distill_arguments(), TrainingArguments)
    parser = HfArgumentParser(list(groups), allow_abbrev=False)
    parser.error = _error  # one sentence instead of a usage text of two hundred arguments
    options = [option[2:] for option in parser._option_string_actions if option.startswith("--")]
    split = dict(pairs(argv))
    for name in split:
        if name not in options:
            refuse_unknown(name, options)
    given = {name.replace("-", "_"): values for name, values in split.items()}
    model, data, distill, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    arguments = Arguments(model, data, training, distill, given)
    _check_together(arguments)
    _warn_of_unused(arguments)
    return arguments


def _error(message: str) -> NoReturn:
    raise ValueError(f"The command line cannot be read: {message}.")


def _check_together(arguments: Arguments) -> None:
    model, data, training, _, given = arguments
    names = [field.name for group in arguments[:4] for field in fields(group)]
    for name in training.allow_changed or ():
        if name not in (*names, "step_samples"):
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help for all arguments."
            raise ValueError(f"--allow_changed names {name!r}, which is no argument; {hint}")
    for name, value in (("data_path", data.data_path), ("output_dir", "output_dir" in given)):
        if not value:
            raise ValueError(f"--{name} is missing: {REQUIRED[name]}.")
    held_out = data.eval_data_path is not None or data.eval_share is not None
    looks = training.eval_strategy != "no"
    if held_out and not looks:
        raise ValueError(
            "Held-out data is given but not used; add --eval_strategy steps --eval_steps N (or --eval_strategy epoch)."
        )
    if looks and not held_out:
        raise ValueError(
            f"--eval_strategy {training.eval_strategy.value} needs held-out data: give --eval_data_path FILE, or "
            f"--eval_share of the training samples."
        )
    if training.early_stopping_patience is not None and not training.load_best_model_at_end:
        raise ValueError(
            f"--early_stopping_patience {training.early_stopping_patience} needs --load_best_model_at_end True and "
            f"compares by --metric_for_best_model."
        )
    if not model.vision_tower and training.pretrained_model_path is None:
        raise ValueError("--vision_tower is missing (or --pretrained_model_path, a checkpoint that has one).")
