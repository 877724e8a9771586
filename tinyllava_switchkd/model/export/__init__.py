"""Export checkpoints to the layouts of other software, and convert transformers' LLaVA back.

``python -m tinyllava_switchkd.model.export --to NAME MODEL OUT``, where NAME is an `ExportTarget`. The names below are
imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ExportTarget": "targets",
    "ExportTargetFactory": "targets",
    "from_hf_llava": "from_llava",
    "is_hf_llava": "from_llava",
    "jinja_template": "chat_template",
    "register_export_target": "targets",
    "to_hf_llava": "hf_llava",
    "verify_export": "verify",
    "why_not_llava": "hf_llava",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
