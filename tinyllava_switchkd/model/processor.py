"""Image processors from folders: transformers' own classes, on PIL, whose resampling is bit-exact with v1's."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor

from .trust import one_sentence, refuse_code


def load_image_processor(folder: str | Path) -> BaseImageProcessor:
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


def check_image_processor(processor: BaseImageProcessor, size: int, file: Path) -> None:
    """Try an image processor on a small picture.

    Args:
        processor: what to try.
        size: height and width in pixels of the images that the vision tower takes.
        file: where its settings are.

    Raises:
        ValueError: it fails, or what it makes is no image for the tower.
    """
    resample = getattr(processor, "resample", None)
    if resample is not None and resample not in range(6):
        raise ValueError(f"{file}: resample is {resample!r}, not the number of one of Pillow's filters (0 to 5).")
    try:
        picture = Image.new("RGB", (40, 30), (0, 128, 255))
        pixels = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0]).float()
    except Exception as error:  # whatever arithmetic on wrong settings raises
        raise ValueError(f"{file} makes no pixels of a picture ({one_sentence(error)}).") from error
    if tuple(pixels.shape) != (3, size, size):
        raise ValueError(
            f"{file} makes images of shape {list(pixels.shape)}, but the vision tower takes {[3, size, size]}; its "
            f"size or crop_size is another model's."
        )
    if not pixels.isfinite().all() or pixels.abs().max() > 1000:
        raise ValueError(
            f"{file} makes pixel values up to {pixels.abs().max():g}, where they lie around 1; look at its image_mean, "
            f"image_std and rescale_factor."
        )
