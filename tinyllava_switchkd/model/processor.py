"""Load and check image processors: transformers' classes with the PIL backend, whose resampling equals v1's."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor

from tinyllava_switchkd.model.trust import one_sentence, refuse_code


def load_image_processor(folder: str | Path) -> BaseImageProcessor:
    """The image processor of a folder that has a ``preprocessor_config.json``.

    Raises:
        ValueError: the file asks for code, or does not describe an image processor.
    """
    refuse_code(Path(folder))
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # bad settings raise errors of any type
        raise ValueError(
            f"{Path(folder) / 'preprocessor_config.json'} describes no image processor that transformers can build "
            f"({one_sentence(error)}); replace it with the base model's file."
        ) from error


def check_image_processor(processor: BaseImageProcessor, size: int, file: Path) -> None:
    """Try an image processor on a small picture.

    Args:
        processor: the processor to try.
        size: height and width in pixels of the vision tower's input.
        file: file with the processor's settings, for error messages.

    Raises:
        ValueError: it fails, or its output does not fit the tower.
    """
    resample = getattr(processor, "resample", None)
    if resample is not None and resample not in range(6):
        raise ValueError(f"{file}: resample is {resample!r}, not a number of a Pillow filter (0 to 5).")
    try:
        picture = Image.new("RGB", (40, 30), (0, 128, 255))
        pixels = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0]).float()
    except Exception as error:  # arithmetic with bad settings raises errors of any type
        raise ValueError(f"{file}: the image processor fails on a test picture ({one_sentence(error)}).") from error
    if tuple(pixels.shape) != (3, size, size):
        raise ValueError(
            f"{file} makes images of shape {list(pixels.shape)}, but the vision tower takes {[3, size, size]}; correct "
            f"its size or crop_size."
        )
    if not pixels.isfinite().all() or pixels.abs().max() > 1000:
        raise ValueError(
            f"{file} makes pixel values up to {pixels.abs().max():g}, where values around 1 are normal; check its "
            f"image_mean, image_std and rescale_factor."
        )
