"""Which parameters of a model are trained: the tune types of TinyLLaVA v1 (``training_recipe/base.py``)."""

from __future__ import annotations

import logging
import re

from torch import nn

logger = logging.getLogger(__name__)

MODULES = {"llm": "language_model", "vision_tower": "vision_tower", "connector": "connector"}
"""A model's parts: name in the arguments -> submodule."""

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|resblocks)\.(\d+)\.")
"""The layer number in parameter names of transformers (layers, layer), timm (blocks) and open_clip (resblocks)."""


def set_tune_type(module: nn.Module, tune_type: str) -> None:
    """Make a part trainable ("full") or freeze it ("frozen"). Other tune types leave it as its recipe set it."""
    if tune_type in ("frozen", "full"):
        module.requires_grad_(tune_type == "full")


def tune_from_layer(vision_tower: nn.Module, from_layer: int) -> None:
    """Train only the vision tower's encoder layers from number `from_layer` on ("partially-tune").

    Raises:
        ValueError: the tower has no such layer.
    """
    layers: set[int] = set()
    for name, parameter in vision_tower.named_parameters():
        match = LAYER.search(name)
        parameter.requires_grad_(match is not None and int(match[1]) >= from_layer)
        if match is not None:
            layers.add(int(match[1]))
    if from_layer > max(layers, default=-1):
        raise ValueError(
            f"--tune_vision_tower_from_layer is {from_layer}, but the vision tower has {len(layers)} encoder layers, "
            f"counted from 0; nothing of it would be trained."
        )


def describe(model: nn.Module) -> str:
    """One line with the trainable and total parameters of each part."""
    counts = []
    for name in MODULES.values():
        parameters = list(getattr(model, name).parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        counts.append(f"{name} {trainable:,} of {sum(p.numel() for p in parameters):,}")
    return "Trainable parameters: " + ", ".join(counts)
