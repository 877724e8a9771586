"""Conversation templates, images, data sets and batches.

Names are imported on first use, so that data can be checked without importing torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "BadImageError": "image_files",
    "DataCollatorForSupervisedDataset": "collator",
    "ImagePreprocess": "image",
    "LazySupervisedDataset": "dataset",
    "LengthGroupedSampler": "sampler",
    "Records": "records",
    "SampleError": "collator",
    "Template": "template",
    "TemplateFactory": "template",
    "TextPreprocess": "text",
    "check_data": "inspection",
    "check_template": "template",
    "make_supervised_data_module": "dataset",
    "read_image": "image_files",
    "register_template": "template",
    "to_rgb": "image_files",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
