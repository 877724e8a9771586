"""Heat maps over images, and images resized for display."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from tinyllava_switchkd.data.image_files import to_rgb

_SMALLEST, _LARGEST = 448, 1024  # pixels of the longer side
_TOP = 0.995  # quantile drawn as the maximum, so that a few outliers do not hide the rest
_COLOURS = "turbo"


def overlay(image: Image.Image, heat: np.ndarray, box: tuple[float, ...] | None = None) -> Image.Image:
    """Draw a heat map over its image.

    Colours are relative to the map: its minimum is transparent, its maximum red. Areas that the model did not see
    (outside `box`) and cells without a token have no colour.

    Args:
        image: an image of any size; it is resized by `fit`.
        heat: [rows, columns]; NaN counts as the minimum.
        box: the part of the image that the map covers (left, top, right, bottom in pixels); default: all of it.

    Returns:
        an RGB image with the aspect ratio of `image`.
    """
    import matplotlib

    shown = fit(to_rgb(image))
    width, height = image.size
    left, top, right, bottom = box or (0.0, 0.0, float(width), float(height))
    rows, columns = heat.shape
    # Corners of the whole image in units of the map's cells.
    extent = (
        -left * columns / (right - left),
        -top * rows / (bottom - top),
        (width - left) * columns / (right - left),
        (height - top) * rows / (bottom - top),
    )
    cells = Image.fromarray(normalise(heat).astype(np.float32))
    smooth = cells.transform(shown.size, Image.Transform.EXTENT, extent, resample=Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(smooth), 0.0, 1.0)  # [H, W]
    colours = matplotlib.colormaps[_COLOURS](0.25 + 0.7 * strength)[..., :3] * 255  # [H, W, 3]
    picture = np.asarray(shown, dtype=np.float64)
    grey = picture.mean(axis=-1, keepdims=True)
    muted = 0.45 * picture + 0.45 * grey  # keeps the image's colours distinct from the map's
    alpha = 0.8 * strength[..., None]
    return Image.fromarray((muted * (1 - alpha) + colours * alpha).round().astype(np.uint8))


def normalise(heat: np.ndarray) -> np.ndarray:
    """Scale a map to 0..1; NaN becomes 0, and a constant map becomes 0 everywhere."""
    known = heat[~np.isnan(heat)]
    if known.size == 0:
        return np.zeros_like(heat)
    low, high = known.min(), np.quantile(known, _TOP, method="higher")
    if high <= low:
        return np.zeros_like(heat)
    return np.clip((np.nan_to_num(heat, nan=low) - low) / (high - low), 0.0, 1.0)


def fit(image: Image.Image) -> Image.Image:
    """Resize an image so that its longer side has 448 to 1024 pixels."""
    longer = max(image.size)
    scale = min(max(1.0, _SMALLEST / longer), _LARGEST / longer)
    if scale == 1.0:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    # Tiny images keep their pixels recognisable; large ones are reduced without aliasing.
    method = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
    return image.resize((width, height), method)


def data_address(image: Image.Image, side: int) -> str:
    """An RGB image as a JPEG in a data URL, reduced to `side` pixels, or enlarged by a whole factor if it is tiny."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if (times := side // max(image.size)) > 1:
        image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
