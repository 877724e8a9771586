"""From a command line to `Arguments`: the flags of old scripts keep working.

Hugging Face has removed arguments that every TinyLLaVA script passes (``--evaluation_strategy``, ``--warmup_ratio``,
``--logging_dir``, ...), and v1 had arguments that nothing read (``--lazy_preprocess``, ...). They are translated where
there is something to translate to, and otherwise accepted and ignored; each says so once.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence

from transformers import HfArgumentParser

from .arguments import Arguments, DataArguments, ModelArguments, TrainingArguments, distill_arguments

logger = logging.getLogger(__name__)

_TRUE = ("yes", "true", "t", "y", "1")

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "connector_lr": "mm_projector_lr",
}
"""Old name -> today's name, with the same meaning."""

BOTH_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Names that everybody knows -> what recent versions of transformers would rather read; nobody need be told."""

IGNORED = {
    # TinyLLaVA v1: read by nothing there, or always so here
    "lazy_preprocess": "samples are always read lazily",
    "mm_patch_merge_type": "nothing ever read it",
    "tune_embed_tokens": "nothing ever read it; the embeddings are trained with the language model",
    "lora_weight_path": "nothing ever read it; start from --pretrained_model_path",
    "tokenizer_use_fast": "transformers 5 has only fast tokenizers",
    # Hugging Face: gone with transformers 5
    "save_safetensors": "checkpoints are always safetensors",
    "fp16_backend": "mixed precision is torch's",
    "half_precision_backend": "mixed precision is torch's",
    "fp16_opt_level": "mixed precision is torch's",
    "include_tokens_per_second": "tokens per second are always logged",
    "include_inputs_for_metrics": "there is no evaluation inside training",
    "dispatch_batches": "set it in --accelerator_config",
    "split_batches": "set it in --accelerator_config",
    "jit_mode_eval": "there is no evaluation inside training",
    "use_legacy_prediction_loop": "there is no evaluation inside training",
    "past_index": "it was for models with a memory",
    "use_ipex": "transformers no longer integrates it",
    "use_mps_device": "the device is found by itself",
    "xpu_backend": "the backend is found by itself",
    "mp_parameters": "transformers no longer integrates it",
    "ray_scope": "there is no hyper-parameter search",
    "sharded_ddp": "shard with --deepspeed",
    "tpu_num_cores": "transformers no longer launches on TPU cores",
    "tpu_metrics_debug": "transformers no longer launches on TPU cores",
    "torchdynamo": "use --torch_compile",
}
"""Old name -> why nothing has to be done for it."""


def _warmup_ratio(value: str, rest: dict[str, str]) -> list[str]:
    try:
        ratio = float(value)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise ValueError(f"--warmup_ratio is {value!r}; it must be a number from 0 to below 1.")
    steps = rest.get("warmup_steps", "0")
    if steps not in ("0", "0.0"):
        logger.warning("--warmup_steps %s is given, so --warmup_ratio %s is ignored.", steps, value)
        return []
    return ["--warmup_steps", value]  # transformers 5 reads a number below 1 as a share of all steps


def _logging_dir(value: str, rest: dict[str, str]) -> list[str]:
    os.environ["TENSORBOARD_LOGGING_DIR"] = value
    return []


def _group_by_length(value: str, rest: dict[str, str]) -> list[str]:
    return ["--train_sampling_strategy", "group_by_length"] if value.lower() in _TRUE else []


def _adafactor(value: str, rest: dict[str, str]) -> list[str]:
    return ["--optim", "adafactor"] if value.lower() in _TRUE else []


TRANSLATED: dict[str, tuple[Callable[[str, dict[str, str]], list[str]], str]] = {
    "warmup_ratio": (_warmup_ratio, "it is passed on as a --warmup_steps below 1"),
    "logging_dir": (_logging_dir, "it is passed on in the environment as TENSORBOARD_LOGGING_DIR"),
    "group_by_length": (_group_by_length, "it is now --train_sampling_strategy group_by_length"),
    "adafactor": (_adafactor, "it is now --optim adafactor"),
}
"""Old name -> (translation of its value, what it says)."""


def _warn(message: str, *values: object) -> None:
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) <= 0:
        logger.warning(message, *values)


def _pairs(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Split ``["--a", "1", "2", "--b=3"]`` into ``[("a", ["1", "2"]), ("b", ["3"])]``."""
    pairs: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            pairs.append((name, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(token)
        else:
            raise ValueError(f"The command line begins with {token!r}; every value follows its --argument.")
    return pairs


def translate_argv(argv: Sequence[str]) -> list[str]:
    """Put today's arguments in the place of removed and dead ones, with one warning each.

    Arguments that the installed transformers still has are left alone.

    Raises:
        ValueError: a value that its successor cannot take.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    pairs = _pairs(argv)
    rest = {name: " ".join(values) for name, values in pairs}
    translated: list[str] = []
    warned: set[str] = set()
    for name, values in pairs:
        value = " ".join(values) or "True"
        if name in known or name not in RENAMED | IGNORED | TRANSLATED:
            preferred = BOTH_NAMES.get(name, name)
            translated += [f"--{preferred if preferred in known else name}", *values]
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


class _Parser(HfArgumentParser):
    """A parser whose errors are exceptions in one sentence rather than a usage of two hundred arguments."""

    def error(self, message: str) -> None:
        raise ValueError(f"The command line cannot be read: {message}.")

    def refuse_unknown(self, argv: Sequence[str]) -> None:
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for name, _ in _pairs(argv):
            if f"--{name}" not in options:
                close = difflib.get_close_matches(f"--{name}", options, n=1)
                hint = f"did you mean {close[0]}?" if close else "see --help for all arguments."
                raise ValueError(f"There is no argument --{name}; {hint}")


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read a command line (by default the process's own).

    Raises:
        ValueError: an unknown argument, a value of the wrong type, values that contradict each other.
    """
    argv = translate_argv(sys.argv[1:] if argv is None else argv)
    # the training arguments come last: constructing them already opens the process group
    parser = _Parser((ModelArguments, DataArguments, distill_arguments(), TrainingArguments), allow_abbrev=False)
    parser.refuse_unknown([token for token in argv if token != "-h"])
    model, data, distill, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    given = frozenset(name.replace("-", "_") for name, _ in _pairs(argv))
    arguments = Arguments(model, data, training, distill, given)
    _check_together(arguments)
    return arguments


def _check_together(arguments: Arguments) -> None:
    model, data, training, _, given = arguments
    if not data.data_path:
        raise ValueError("--data_path is missing: the training samples, a JSON file in LLaVA's format.")
    if "output_dir" not in given:
        raise ValueError("--output_dir is missing: the folder that the trained model goes to.")
    if not model.vision_tower and training.pretrained_model_path is None:
        raise ValueError("--vision_tower is missing (or --pretrained_model_path, a checkpoint that has one).")
