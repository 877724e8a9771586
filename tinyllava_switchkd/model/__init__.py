"""The model: configuration, factories of its parts, the model itself and its checkpoints.

Names are imported on first use. `TinyLlavaConfig` is registered while transformers is still being imported, when the
other modules could not be imported yet.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ConnectorFactory": "connector",
    "register_connector": "connector",
    "LLMFactory": "llm",
    "register_llm": "llm",
    "VisionTowerFactory": "vision_tower",
    "register_vision_tower": "vision_tower",
    "TinyLlavaConfig": "configuration",
    "TinyLlavaForConditionalGeneration": "modeling",
    "build_model": "checkpoint",
    "load_checkpoint_weights": "checkpoint",
    "load_pretrained_model": "checkpoint",
    "push_pretrained_model": "saving",
    "save_pretrained_model": "saving",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
