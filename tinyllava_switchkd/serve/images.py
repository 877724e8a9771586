"""Images from people: opened with limits, turned upright, in RGB."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tinyllava_switchkd.data.image_files import MAX_SCANS, scans, upright

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What visitors may send; formats that need an outside program, such as EPS, are never opened."""

OWN_FORMATS = (*FORMATS, "TIFF", "PPM")
"""What is read of the own disk besides."""


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost.

    Attributes:
        max_bytes: size of the file.
        max_pixels: width times height; checked from the header, before anything is decoded, because a file of a few
            kilobytes can unfold into gigabytes.
        max_side: larger images are reduced to this many pixels on the longer side; None keeps them as they are.
        formats: the decoders that are tried.
    """

    max_bytes: int = 200 * 2**20
    max_pixels: int = 100_000_000
    max_side: int | None = None
    formats: tuple[str, ...] = FORMATS


def read_image(path: str | Path, limits: ImageLimits | None = None, name: str | None = None) -> Image.Image:
    """Open an image file.

    Args:
        path: the file.
        limits: see `ImageLimits`; None for a file of one's own, of which `OWN_FORMATS` are read.
        name: what to call the file in messages; the path if None.

    Returns:
        an RGB image, turned as its camera noted (EXIF); the first frame of an animation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, is damaged, or is over a limit.
    """
    path, limits = Path(path), limits or ImageLimits(formats=OWN_FORMATS)
    name = str(path) if name is None else name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not there, or is no file.")
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise ValueError(f"{name} has {size / 2**20:.1f} MB; at most {limits.max_bytes / 2**20:.0f} MB are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            opened = Image.open(path, formats=limits.formats)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has too many pixels; at most {_millions(limits.max_pixels)} are taken.") from None
    except (OSError, ValueError, SyntaxError):
        raise ValueError(f"{name} is no image that can be read here ({', '.join(limits.formats)}).") from None
    with opened:
        pixels = opened.width * opened.height
        if pixels > limits.max_pixels:
            raise ValueError(
                f"{name} has {opened.width} x {opened.height} = {_millions(pixels)} pixels; at most "
                f"{_millions(limits.max_pixels)} are taken."
            )
        if opened.format in ("JPEG", "MPO") and scans(path) > MAX_SCANS:
            raise ValueError(f"{name} is a JPEG in more than {MAX_SCANS} passes, each of which costs time.")
        try:
            if limits.max_side is not None:
                side = (limits.max_side, limits.max_side)
                opened.draft("RGB", side)  # JPEG: decoded at a reduced size, never smaller
                if opened.mode in ("RGB", "L", "RGBA"):  # reduced before anything is copied; others are no more bytes
                    opened.thumbnail(side, Image.Resampling.LANCZOS, reducing_gap=2.0)
            image = upright(opened)
        except Exception as error:  # decoders raise whatever they like on damaged files
            raise ValueError(f"{name} is damaged and cannot be decoded ({type(error).__name__}).") from error
    if limits.max_side is not None and max(image.size) > limits.max_side:
        image.thumbnail(side, Image.Resampling.LANCZOS)
    return image


def _millions(pixels: int) -> str:
    return f"{pixels / 1e6:.1f} million"
