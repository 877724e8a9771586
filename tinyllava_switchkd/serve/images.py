"""Reads images from users within limits; returns them upright and in RGB."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tinyllava_switchkd.data.image_files import MAX_SCANS, scans, upright

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats of uploads. Formats that need an external program, such as EPS, are never opened."""

OWN_FORMATS = (*FORMATS, "TIFF", "PPM")
"""Formats that are read from the local disk."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits on an image.

    Attributes:
        max_bytes: file size.
        max_pixels: width times height. It is read from the header before decoding, because a file of a few kilobytes
            can decode to gigabytes.
        max_side: larger images are reduced to this many pixels on the longer side; None keeps the size.
        formats: the decoders to try.
    """

    max_bytes: int = 200 * 2**20
    max_pixels: int = 100_000_000
    max_side: int | None = None
    formats: tuple[str, ...] = FORMATS


def read_image(path: str | Path, limits: ImageLimits | None = None, name: str | None = None) -> Image.Image:
    """Open an image file.

    Args:
        path: the file.
        limits: see `ImageLimits`; None for a local file, which may be in any of `OWN_FORMATS`.
        name: the file's name in error messages; default: the path.

    Returns:
        an RGB image, turned upright according to its EXIF data; the first frame of an animation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is damaged, or exceeds a limit.
    """
    path, limits = Path(path), limits or ImageLimits(formats=OWN_FORMATS)
    name = str(path) if name is None else name
    if not path.is_file():
        raise FileNotFoundError(f"{name} does not exist or is not a file.")
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise ValueError(f"{name} has {size / 2**20:.1f} MB; at most {limits.max_bytes / 2**20:.0f} MB are allowed.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            opened = Image.open(path, formats=limits.formats)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has too many pixels; at most {_millions(limits.max_pixels)} are allowed.") from None
    except (OSError, ValueError, SyntaxError):
        raise ValueError(f"{name} is not an image in a supported format ({', '.join(limits.formats)}).") from None
    with opened:
        pixels = opened.width * opened.height
        if pixels > limits.max_pixels:
            raise ValueError(
                f"{name} has {opened.width} x {opened.height} = {_millions(pixels)} pixels; at most "
                f"{_millions(limits.max_pixels)} are allowed."
            )
        if opened.format in ("JPEG", "MPO") and scans(path) > MAX_SCANS:
            raise ValueError(f"{name} is a JPEG with more than {MAX_SCANS} scans, which takes too long to decode.")
        try:
            if limits.max_side is not None:
                side = (limits.max_side, limits.max_side)
                opened.draft("RGB", side)  # a JPEG is decoded at a reduced size, but not below `side`
                if opened.mode == "RGBA":
                    opened.putalpha(255)  # the model sees the colours behind it, which reducing would blend away
                if opened.mode in ("RGB", "L", "RGBA"):  # reduced before anything is copied; others are no larger
                    opened.thumbnail(side, Image.Resampling.LANCZOS, reducing_gap=2.0)
            image = upright(opened)
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            raise ValueError(f"{name} is damaged and cannot be decoded ({type(error).__name__}).") from error
    if limits.max_side is not None and max(image.size) > limits.max_side:
        image.thumbnail(side, Image.Resampling.LANCZOS)
    return image


def _millions(pixels: int) -> str:
    return f"{pixels / 1e6:.1f} million"
