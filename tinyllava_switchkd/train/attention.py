"""Which attention implementation the language models use.

    --attn_implementation X          X, if the installation, the device and the precision allow it
    --packing, flash-attn installed  flash_attention_2, which knows where samples begin and skips pairs across samples
    otherwise                        transformers' default, sdpa

Without packing, samples are padded on the right and need no mask. On a GPU, sdpa then runs torch's own flash kernel, so
flash-attn would gain nothing. Packed samples need a mask, with which sdpa cannot use that kernel. Vision towers attend
to every patch of one image and keep sdpa. The teacher uses the student's implementation.
"""

from __future__ import annotations

import torch
from transformers.utils import is_flash_attn_2_available

from tinyllava_switchkd.train.command_line.arguments import Arguments

FLASH = "flash_attention_2"


def attention_of(arguments: Arguments) -> dict[str, str] | None:
    """The `attn_implementation` argument of `load_pretrained_model`; None is transformers' default.

    Raises:
        ValueError: flash attention was requested but is not available.
    """
    training, asked = arguments.training, arguments.model.attn_implementation
    hindrance = _why_not_flash(training.device, training.compute_dtype)
    if asked == FLASH and hindrance is not None:
        raise ValueError(f"--attn_implementation {FLASH} {hindrance}.")
    if asked is None and training.packing and hindrance is None:
        asked = FLASH
    return None if asked is None else {"text_config": asked}


def _why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA GPU and this run is on {device.type}; leave the argument out, or use sdpa"
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        return f"computes in bfloat16 or float16 and this run in {name}; add --bf16 True, or use sdpa"
    if not is_flash_attn_2_available():
        return "needs the package flash-attn, which is not installed: pip install flash-attn, or use sdpa"
    return None
