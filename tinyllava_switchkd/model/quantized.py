"""A language model in 8 or 4 bits (bitsandbytes): what is quantised, where that is possible, and gradients through it.

Only the linear layers of the language model's decoder are quantised. The vision tower and the connector are small and
sensitive, and the output head makes the logits themselves: all three stay in the precision that is computed in.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

EXACT_MODULES = ("vision_tower", "connector", "lm_head")
"""What is never quantised."""

BITS = (8, 4)

_BLOCK, _OUTER_BLOCK = 64, 256
"""Weights that share a scale in 4 bits, and scales that share one of their own (bitsandbytes' defaults)."""


def check_quantization(asked: str, device: str | torch.device) -> None:
    """Refuse an installation or a device that cannot quantise.

    Args:
        asked: what the user asked for, e.g. ``load_4bit``: the sentence begins with it.
        device: where the model is to go.

    Raises:
        ValueError: bitsandbytes is not installed, or has no kernels for the device.
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{asked} needs the package bitsandbytes: pip install 'tinyllava_switchkd[qlora]'.")
    import bitsandbytes

    supported = sorted(getattr(bitsandbytes, "supported_torch_devices", {"cuda"}))
    kind = torch.device(device).type
    if kind not in supported:
        raise ValueError(f"{asked} is not possible on {kind}: bitsandbytes has kernels for {', '.join(supported)}.")


def quantization_config(bits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """transformers' configuration of 8 bits (LLM.int8) or 4 bits (NF4 with quantised scales, as QLoRA's).

    Args:
        bits: 8 or 4.
        compute_dtype: what 4-bit weights are multiplied in.
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        # Weights are multiplied in float16 whatever the precision of the run, and bitsandbytes says so at every layer.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(EXACT_MODULES))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(EXACT_MODULES),
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers quantised a model when it loaded it: it must not be cast, and stays where it was loaded."""
    return bool(getattr(model, "is_quantized", False))


def keep_differentiable(model: nn.Module) -> None:
    """Make sure that gradients pass through a quantised model; nothing to do for any other.

    On CPUs with bfloat16 instructions bitsandbytes repacks 4-bit weights at the first pass without gradient, for a
    kernel that has no backward pass: every later pass would silently lose its gradient.

    Raises:
        ValueError: that has happened already.
    """
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit model has generated on this CPU, which repacked its weights ({name}) into a form that "
                    f"no gradient passes through; load it again for distillation."
                )
            module.support_avx512bf16_for_cpu = False


def weight_bytes(model: nn.Module, size: int, bits: int = 16) -> int:
    """Bytes of a model's weights when its language model is held in `bits`, counted without quantising it.

    Args:
        model: on any device, not quantised.
        size: bytes of a weight that is not quantised.
        bits: 16 (nothing is), 8 or 4.
    """
    total = size * sum(parameter.numel() for parameter in model.parameters())
    if bits not in BITS:
        return total
    return total + sum(
        _quantized_bytes(linear.weight, bits) - size * linear.weight.numel() for linear in linears_to_quantize(model)
    )


def linears_to_quantize(model: nn.Module) -> list[nn.Linear]:
    """The layers of a model that would be quantised."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in EXACT_MODULES for part in name.split("."))
    ]


def _quantized_bytes(weight: torch.Tensor, bits: int) -> int:
    """Of a linear layer's weight [out, in] with its scales."""
    if bits == 8:
        return weight.numel() + 4 * weight.shape[0]  # a float32 scale a row
    blocks = -(-weight.numel() // _BLOCK)
    # Half a byte a weight and a byte a block; a float32 scale an outer block, two tables and an offset a layer.
    return -(-weight.numel() // 2) + blocks + 4 * -(-blocks // _OUTER_BLOCK) + 4 * (16 + 256 + 1)
