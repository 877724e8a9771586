"""Which attention the language models compute with.

    asked for                        that one, if the installation, the device and the precision allow it
    --packing, flash-attn there      flash_attention_2: it reads where samples begin and skips what lies between them
    otherwise                        transformers' default, sdpa

Without packing samples are padded on the right and need no mask, so on a GPU sdpa runs torch's own flash kernel and
flash-attn would gain nothing. Packed samples need a mask, with which sdpa cannot. Vision towers attend to every patch
of one image and stay with sdpa; the teacher computes as the student does.
"""

from __future__ import annotations

import torch
from transformers.utils import is_flash_attn_2_available

from .arguments import Arguments

FLASH = "flash_attention_2"


def attention_of(arguments: Arguments) -> dict[str, str] | None:
    """The attention of a run, as `load_pretrained_model` takes it (see `choose_attention`)."""
    training = arguments.training
    return choose_attention(
        arguments.model.attn_implementation,
        device=training.device,
        dtype=training.compute_dtype,
        packing=training.packing,
    )


def choose_attention(
    asked: str | None, *, device: torch.device | str, dtype: torch.dtype, packing: bool = False
) -> dict[str, str] | None:
    """The attention of the language models, by part of the configuration; None is transformers' default.

    Args:
        asked: by the user; None chooses.
        device: where is computed.
        dtype: what is computed in.
        packing: whether samples are laid end to end.

    Raises:
        ValueError: flash attention is asked for and cannot be had.
    """
    hindrance = _why_not_flash(torch.device(device), dtype)
    if asked == FLASH and hindrance is not None:
        raise ValueError(f"--attn_implementation {FLASH} {hindrance}.")
    if asked is None and packing and hindrance is None:
        asked = FLASH
    return None if asked is None else {"text_config": asked}


def _why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA GPU and this run is on {device.type}; leave the argument out, or say sdpa"
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        return f"computes in bfloat16 or float16 and this run in {name}; add --bf16 True, or say sdpa"
    if not is_flash_attn_2_available():
        return "needs the package flash-attn, which is not installed: pip install flash-attn, or say sdpa"
    return None
