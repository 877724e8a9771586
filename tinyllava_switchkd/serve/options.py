"""Command-line options shared by the terminal chat and the web demo."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from tinyllava_switchkd.cli import first_line
from tinyllava_switchkd.constants import FLOAT_DTYPES, TEMPLATE_FLAGS
from tinyllava_switchkd.data.template import TemplateFactory
from tinyllava_switchkd.runtime import check_device
from tinyllava_switchkd.serve.conversation import Sampling


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for loading checkpoints."""
    group = parser.add_argument_group("loading")
    group.add_argument(*TEMPLATE_FLAGS, help="conversation template; default: the one the checkpoint names")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    group.add_argument(
        "--dtype", choices=FLOAT_DTYPES, help="default: the checkpoint's own on a GPU, float32 on the CPU"
    )
    group.add_argument("--attn_implementation", help="sdpa, eager or flash_attention_2; default: transformers' choice")
    quantised = group.add_mutually_exclusive_group()
    quantised.add_argument("--load_8bit", action="store_true", help="load the language model in 8 bits (bitsandbytes)")
    quantised.add_argument("--load_4bit", action="store_true", help="load the language model in 4 bits (bitsandbytes)")


def loading_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `load_pretrained_model`.

    Raises:
        ValueError: the device, template or attention implementation is unknown or unusable.
    """
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if args.device is not None:
        _check_device(args.device)
    if args.template is not None:
        TemplateFactory.name_of(args.template)
    kernel, kernels = args.attn_implementation, ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if kernel is not None and kernel not in kernels:
        raise ValueError(f"--attn_implementation {kernel} is not one of those in transformers: {', '.join(kernels)}.")
    on_cpu = args.device == "cpu" or (args.device is None and not torch.cuda.is_available())
    dtype = getattr(torch, args.dtype) if args.dtype else (torch.float32 if on_cpu else None)
    return {
        "device": args.device,
        "dtype": dtype,
        "attn_implementation": args.attn_implementation,
        "load_8bit": args.load_8bit,
        "load_4bit": args.load_4bit,
    }


def _check_device(name: str) -> None:
    import torch

    try:
        if check_device(name).type == "meta":
            raise ValueError("it stores no values")
        torch.empty(0, device=name)
    except (ValueError, RuntimeError, AssertionError) as error:  # AssertionError: torch is built without this device
        reason = first_line(error).rstrip(".")
        raise ValueError(f"--device {name} cannot be used here ({reason}); 'cpu' always works.") from None


def number(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a finite number (or an int) from `low` to `high`."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")
        return value

    return convert


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for decoding; the defaults are those of `Sampling`."""
    group = parser.add_argument_group("sampling")
    default = Sampling()
    group.add_argument("--temperature", type=float, default=default.temperature, help="0 is greedy (default)")
    group.add_argument("--top_p", type=float, default=default.top_p)
    group.add_argument("--top_k", type=int, default=default.top_k, help="0 for all tokens (default)")
    group.add_argument("--repetition_penalty", type=float, default=default.repetition_penalty)
    group.add_argument("--max_new_tokens", type=int, default=default.max_new_tokens)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The decoding settings from the command line."""
    return Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.max_new_tokens)
