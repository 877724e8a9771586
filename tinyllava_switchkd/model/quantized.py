"""Language models in 8 or 4 bits (bitsandbytes): configuration, checks, size, and gradients through them.

Only the linear layers of the language model's decoder are quantised. The vision tower and the connector are small and
sensitive, and the output head computes the logits, so these three keep the compute precision.
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
"""Modules that are never quantised."""

BITS = (8, 4)

_BLOCK, _OUTER_BLOCK = 64, 256
"""4-bit weights per scale, and scales per second-level scale (bitsandbytes' defaults)."""


def check_quantization(asked: str, device: str | torch.device) -> None:
    """Raise if this installation or device cannot quantise.

    Args:
        asked: what the user asked for, such as ``load_4bit``; the error begins with it.
        device: device of the model.

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
    """transformers' configuration for 8 bits (LLM.int8) or 4 bits (NF4 with quantised scales, as in QLoRA).

    Args:
        bits: 8 or 4.
        compute_dtype: dtype of multiplications with 4-bit weights.
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        # 8-bit weights are always multiplied in float16, about which bitsandbytes warns at every layer.
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
    """Whether transformers quantised a model on loading. Such a model must not be cast or moved."""
    return bool(getattr(model, "is_quantized", False))


def keep_differentiable(model: nn.Module) -> None:
    """Make sure that gradients pass through a quantised model; does nothing to other models.

    On CPUs with bfloat16 instructions, the first pass without gradients makes bitsandbytes repack 4-bit weights for a
    kernel that has no backward pass. Every later pass would silently lose its gradient.

    Raises:
        ValueError: the weights have already been repacked.
    """
    for name, module in model.named_modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit model has generated on this CPU, which repacked its weights ({name}) into a form "
                    f"without gradients; load it again for distillation."
                )
            module.support_avx512bf16_for_cpu = False


def weight_bytes(model: nn.Module, size: int, bits: int = 16) -> int:
    """Bytes that a model's weights would take with the language model in `bits`.

    Args:
        model: on any device, not quantised.
        size: bytes of a weight that is not quantised.
        bits: 16 (not quantised), 8 or 4.
    """
    total = size * sum(parameter.numel() for parameter in model.parameters())
    if bits not in BITS:
        return total
    return total + sum(
        _quantized_bytes(linear.weight, bits) - size * linear.weight.numel() for linear in linears_to_quantize(model)
    )


def linears_to_quantize(model: nn.Module) -> list[nn.Linear]:
    """The layers of a model that quantisation applies to."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in EXACT_MODULES for part in name.split("."))
    ]


def _quantized_bytes(weight: torch.Tensor, bits: int) -> int:
    """Bytes of a linear layer's weight [out, in] with its scales."""
    if bits == 8:
        return weight.numel() + 4 * weight.shape[0]  # a float32 scale per row
    blocks = -(-weight.numel() // _BLOCK)
    # Half a byte per weight, a byte per block, a float32 scale per outer block; two tables and an offset per layer.
    return -(-weight.numel() // 2) + blocks + 4 * -(-blocks // _OUTER_BLOCK) + 4 * (16 + 256 + 1)
