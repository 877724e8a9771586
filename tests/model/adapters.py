"""A LoRA adapter's folder, as peft and v1 write it: the base's weights with the adapter beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tinyllava_switchkd.model import load_pretrained_model


def write_adapter(checkpoint: Path, folder: Path) -> Path:
    """A copy of a checkpoint with an adapter of random weights on its language model's queries."""
    shutil.copytree(checkpoint, folder)
    model = load_pretrained_model(checkpoint, device="cpu")[0]
    targets = [f"language_model.model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder
