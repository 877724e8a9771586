"""Image processors from folders: transformers' own classes, on PIL, whose resampling is bit-exact with v1's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from .trust import one_sentence, refuse_code


def load_image_processor(folder: str | Path) -> Any:
    """The image processor of a folder that has a ``preprocessor_config.json``.

    Raises:
        ValueError: the file asks for code, or describes no image processor.
    """
    refuse_code(Path(folder))
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # whatever the settings' consumer raises on settings it cannot use
        raise ValueError(
            f"{Path(folder) / 'preprocessor_config.json'} describes no image processor that transformers can make "
            f"({one_sentence(error)}); put the base model's file there."
        ) from error
