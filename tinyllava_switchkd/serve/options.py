"""Command-line options that the terminal chat and the web demo share."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from tinyllava_switchkd.serve.conversation import Sampling

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """How checkpoints are loaded."""
    group = parser.add_argument_group("loading")
    group.add_argument("--conv-mode", help="conversation template; default: the one the checkpoint names")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    group.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="default: the checkpoint's own on a GPU, float32 on the CPU",
    )
    group.add_argument("--attn-implementation", help="sdpa, eager or flash_attention_2; default: transformers' choice")
    quantised = group.add_mutually_exclusive_group()
    quantised.add_argument("--load-8bit", action="store_true", help="language model in 8 bits (bitsandbytes)")
    quantised.add_argument("--load-4bit", action="store_true", help="language model in 4 bits (bitsandbytes)")


def loading_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `load_pretrained_model`.

    Raises:
        ValueError: there is no such device.
    """
    if args.device is not None:
        _check_device(args.device)
    on_cpu = args.device == "cpu" or (args.device is None and not torch.cuda.is_available())
    dtype = _DTYPES[args.dtype] if args.dtype else (torch.float32 if on_cpu else None)
    return {
        "device": args.device,
        "dtype": dtype,
        "attn_implementation": args.attn_implementation,
        "load_8bit": args.load_8bit,
        "load_4bit": args.load_4bit,
    }


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without the device
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here ({reason.rstrip('.')}); 'cpu' always can.") from None


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How answers are decoded; the defaults are `Sampling`'s."""
    group = parser.add_argument_group("sampling")
    default = Sampling()
    group.add_argument("--temperature", type=float, default=default.temperature, help="0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=default.top_p)
    group.add_argument("--top-k", type=int, default=default.top_k, help="0 for all tokens (default)")
    group.add_argument("--repetition-penalty", type=float, default=default.repetition_penalty)
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling that was asked for."""
    return Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.max_new_tokens)
