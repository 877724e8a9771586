"""Image files: find them inside their folder, decode them to RGB, or refuse them with a reason."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

LEAST_SHARE = 0.75
"""If a crop leaves less than this share of an image, `ImagePreprocess` warns."""

MAX_SCANS = 100
"""Maximum passes of a progressive JPEG. Encoders write about ten; each costs time for all pixels, even in a small
file."""

_OUTSIDE = frozenset({"EPS"})  # Pillow would run another program, Ghostscript
_BAND = 2**20  # pixels that are scaled at a time
_WIDE_MODES = ("I", "F")  # with more than 8 bits per pixel, like all modes that begin with "I;"


class BadImageError(ValueError):
    """An image file that cannot be read; the message is only the reason, without the file's name."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode the first frame of an image file to RGB. EXIF orientation is not applied, as in v1.

    Raises:
        FileNotFoundError: there is no such file.
        BadImageError: it is empty, cut off, too large, or not an image that Pillow reads.
    """
    with opened(path) as image:
        return to_rgb(image)


def read_upright(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to RGB with its EXIF orientation applied: for people, not for training.

    Raises:
        FileNotFoundError, BadImageError: as `read_image`.
    """
    with opened(path) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """Convert an image to RGB (see `to_rgb`) and apply its EXIF orientation."""
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # lost in the copy, but `to_rgb` depends on it
    return to_rgb(turned)


def look_at(path: str | os.PathLike[str]) -> tuple[tuple[int, int], str | None]:
    """Decode an image file; returns its (width, height), and in words what the model sees differently, or None.

    Raises:
        FileNotFoundError, BadImageError: as `read_image`.
    """
    with opened(path) as image:
        to_rgb(image)
        odd = None
        if image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1):
            odd = "turned by their EXIF orientation, which is not applied (as in v1); turn them upright beforehand"
        elif Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            odd = f"of more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels, which take seconds to decode"
        elif "transparency" in image.info or (
            "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255)
        ):
            odd = "with transparency, which is dropped (as in v1), so that the colours behind it are seen"
        return image.size, odd


def image_problem(image: str | os.PathLike[str] | bytes) -> str | None:
    """Why an image file (or its bytes) does not decode; None if it does."""
    try:
        with opened(image) as one:
            one.load()
    except (FileNotFoundError, BadImageError) as error:
        return str(error)
    return None


@contextlib.contextmanager
def opened(image: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """Open an image file or its bytes; all errors of its decoder become a `BadImageError` with the reason.

    Never waits for a pipe or starts another program, and refuses a JPEG with very many passes.

    Raises:
        FileNotFoundError, BadImageError: as `read_image`.
    """
    try:
        if not isinstance(image, bytes) and not stat.S_ISREG(kind := os.stat(image).st_mode):
            raise BadImageError("it is a folder" if stat.S_ISDIR(kind) else "it is not a file but a pipe or a device")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `look_at` reports it
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats()) as one:
                if one.format in ("JPEG", "MPO") and scans(image) > MAX_SCANS:
                    raise BadImageError(f"it is a JPEG in more than {MAX_SCANS} passes, each of which costs time")
                yield one
    except (FileNotFoundError, BadImageError):
        raise
    except Exception as error:  # decoders fail in many ways: struct.error, zlib.error, KeyError, OverflowError, ...
        raise BadImageError(_reason(image, error)) from error


def scans(image: str | os.PathLike[str] | bytes) -> int:
    """Number of passes that a JPEG file (or its bytes) claims to have, including those of a preview."""
    if not isinstance(image, bytes):
        image = Path(image).read_bytes()
    return image.count(b"\xff\xda")


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _OUTSIDE]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB with 8 bits per channel.

    Images with 8 bits are converted by Pillow (transparency is dropped, as in v1). Pillow clips wider grey values at
    255, which makes a 16-bit image white and a floating-point image from 0 to 1 black. Here they are scaled: 16 bits by
    their full range, others by the first of the ranges 0 to 1, 0 to 255 and 0 to 65535 that contains all values,
    otherwise by their own range.

    Raises:
        BadImageError: the mode cannot be converted (such as LAB).
    """
    if image.mode in _WIDE_MODES or image.mode.startswith("I;"):
        image = Image.fromarray(_eight_bits(image))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise BadImageError(f"its mode {image.mode!r} cannot be converted to RGB ({error})") from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """8-bit grey values [H, W] of an image with wider ones, computed in bands to save memory."""
    values = np.asarray(image)
    rows = max(1, _BAND // max(image.width, 1))
    bands = [slice(first, first + rows) for first in range(0, len(values), rows)]

    def finite(band: slice) -> np.ndarray:
        return np.nan_to_num(values[band].astype(np.float64), posinf=0, neginf=0)

    low = 0.0
    high = max((float(finite(band).max(initial=0)) for band in bands), default=0.0)
    least = min((float(finite(band).min(initial=0)) for band in bands), default=0.0)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        high = 65535.0
    elif least < 0 or high > 65535:
        low = least
    elif image.mode == "F" and high <= 1:
        high = 1.0
    else:
        high = 255.0 if high <= 255 else 65535.0
    eight = np.empty(values.shape, np.uint8)
    for band in bands:
        eight[band] = np.rint((finite(band) - low) * (255 / max(high - low, 1e-12)))
    return eight


def _reason(image: str | os.PathLike[str] | bytes, error: Exception) -> str:
    with contextlib.suppress(OSError, ValueError):
        if (len(image) if isinstance(image, bytes) else os.path.getsize(image)) == 0:
            return "it is empty (0 bytes)"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is {_kind_of(image)} and not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"it is too large to be decoded safely: {error}"
    known = isinstance(error, (OSError, ValueError, SyntaxError))
    return " ".join(str(error).split()) if known else f"its decoder failed ({type(error).__name__}: {error})"


def _kind_of(image: str | os.PathLike[str] | bytes) -> str:
    """The kind of a file that is not an image, in words."""
    if isinstance(image, bytes):
        head = image[:512]
    else:
        with open(image, "rb") as file:
            head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "PostScript (EPS), which only another program could decode,"
    if b"<svg" in text:
        return "a vector graphic (SVG)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, whose file was not downloaded,"
    return "a text" if head and b"\0" not in head and not any(byte > 126 for byte in head) else "a file of unknown kind"


class ImageFolder:
    """The folder with a data file's images; files outside it are refused.

    Data files and archives of images often come from other people, who must not choose which files of this machine are
    read.

    Args:
        root: the folder; None or empty means the current folder.
        allow_outside: also read files outside the folder: absolute names, ``..`` and symbolic links that lead out.
    """

    def __init__(self, root: str | None, allow_outside: bool = False) -> None:
        self.root = root or ""
        self.allow_outside = allow_outside
        self._real_root = os.path.realpath(self.root or os.curdir)
        self._real = functools.lru_cache(maxsize=65536)(os.path.realpath)

    def path(self, name: str) -> str:
        """Path of an image.

        Raises:
            BadImageError: it is outside the folder.
        """
        path = os.path.join(self.root, name)
        if not self.allow_outside:
            problem = self._outside(os.path.dirname(path)) or (self._outside(path) if os.path.islink(path) else None)
            if problem is not None:
                raise BadImageError(problem)
        return path

    def __reduce__(self) -> tuple[type, tuple[str, bool]]:
        return type(self), (self.root, self.allow_outside)

    def _outside(self, path: str) -> str | None:
        try:
            real = self._real(path or os.curdir)
        except (OSError, ValueError) as error:  # a name that no file can have, or links in a circle
            return f"it is not a valid file name ({error})"
        if real == self._real_root or real.startswith(os.path.join(self._real_root, "")):
            return None
        return (
            f"it lies outside the image folder {self.root or os.curdir}, at {real}; pass allow_outside_images to read "
            f"it anyway"
        )


def missing_and_outside(folder: ImageFolder, names: dict[str, set[str]]) -> Iterator[tuple[str, str | None]]:
    """The files that do not exist, or are outside the folder.

    Lists whole folders, which on a network file system is one request instead of thousands.

    Args:
        folder: the image folder.
        names: sub-folder -> file names.

    Yields:
        path, and why the file may not be read, or None if it does not exist.
    """
    for parent, files in names.items():
        path = os.path.join(folder.root, parent)
        links: dict[str, bool] = {}  # existing file -> whether it is a link
        try:
            folder.path(os.path.join(parent, "x"))
            with os.scandir(path or os.curdir) as listing:
                there = (entry for entry in listing if entry.name in files and (entry.is_symlink() or entry.is_file()))
                links = {entry.name: entry.is_symlink() for entry in there}
        except BadImageError as error:
            yield from ((os.path.join(path, file), str(error)) for file in files)
            continue
        except OSError:  # no such folder
            pass
        for file in files:
            if file not in links or (links[file] and not os.path.isfile(os.path.join(path, file))):
                yield os.path.join(path, file), None
            elif links[file]:
                try:
                    folder.path(os.path.join(parent, file))
                except BadImageError as error:
                    yield os.path.join(path, file), str(error)
