"""Image files: found inside their folder, decoded, and brought to RGB, or refused with a reason."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

LEAST_SHARE = 0.75
"""Of an image; where a processor's crop leaves less of one, `ImagePreprocess` warns."""

MAX_SCANS = 100
"""Passes of a progressive JPEG. Encoders write about ten; each goes over all pixels, whatever the file's size."""

_OUTSIDE = frozenset({"EPS"})  # Pillow would hand them to another program, Ghostscript
_BAND = 2**20  # pixels that are scaled at a time
_WIDE_MODES = ("I", "F")  # and every mode that begins with "I;": more than 8 bits a pixel
_LINKS = "; pass allow_outside_images to read it all the same"


class BadImageError(ValueError):
    """A file that is no image which can be read; the message is the reason alone, without the file's name."""


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to RGB; of several frames the first. EXIF orientation is not applied (v1's way).

    Raises:
        FileNotFoundError: there is no such file.
        BadImageError: it is empty, cut off, too large, or no image that Pillow reads.
    """
    with opened(path) as image:
        return to_rgb(image)


def read_upright(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file to RGB, turned as its camera noted (EXIF): what is shown to people, not what is trained on.

    Raises:
        FileNotFoundError, BadImageError: as `read_image`.
    """
    with opened(path) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB (see `to_rgb`), turned as its camera noted (EXIF)."""
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # which a copy loses, and the range of wide grey values depends on
    return to_rgb(turned)


def look_at(path: str | os.PathLike[str]) -> tuple[tuple[int, int], str | None]:
    """Decode an image file; its width and height, and what of it is read otherwise than it is shown (a few words).

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
    """Why an image file, or the bytes of one, does not decode; None if it does."""
    try:
        with opened(image) as one:
            one.load()
    except (FileNotFoundError, BadImageError) as error:
        return str(error)
    return None


@contextlib.contextmanager
def opened(image: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """An open image file, or the bytes of one; whatever its decoder raises is a `BadImageError` that says why.

    Neither a pipe is waited for nor another program started, and a JPEG of very many passes is refused.

    Raises:
        FileNotFoundError, BadImageError: as `read_image`.
    """
    try:
        if not isinstance(image, bytes) and not stat.S_ISREG(kind := os.stat(image).st_mode):
            raise BadImageError("it is a folder" if stat.S_ISDIR(kind) else "it is no file but a pipe or a device")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `look_at` tells of it
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=_formats()) as one:
                if one.format in ("JPEG", "MPO") and scans(image) > MAX_SCANS:
                    raise BadImageError(f"it is a JPEG in more than {MAX_SCANS} passes, each of which costs time")
                yield one
    except (FileNotFoundError, BadImageError):
        raise
    except Exception as error:  # decoders fail in many ways: struct.error, zlib.error, KeyError, OverflowError, ...
        raise BadImageError(_reason(image, error)) from error


def scans(image: str | os.PathLike[str] | bytes) -> int:
    """Passes that a JPEG file, or the bytes of one, claims to have; in one with a preview, of both together."""
    if not isinstance(image, bytes):
        with open(image, "rb") as file:
            image = file.read()
    return image.count(b"\xff\xda")


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name not in _OUTSIDE]


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, 8 bits a channel.

    What has 8 bits is converted as Pillow does (transparency is dropped, as in v1). Pillow cuts wider grey values off
    at 255, which makes an image of 16 bits white and one of floating point numbers from 0 to 1 black; here they are
    scaled: 16 bits by their full range, others by the first of the ranges 0 to 1, 0 to 255 and 0 to 65535 that holds
    them, or else by their own.

    Raises:
        BadImageError: no colours can be made of the mode (such as LAB).
    """
    if image.mode in _WIDE_MODES or image.mode.startswith("I;"):
        image = Image.fromarray(_eight_bits(image))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise BadImageError(f"its mode {image.mode!r} cannot be converted to RGB ({error})") from error


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values [H, W] of 8 bits of an image that has more; beside these it takes little memory."""
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
        return f"it is {_kind_of(image)} and no image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"it is too large to be decoded safely: {error}"
    known = isinstance(error, (OSError, ValueError, SyntaxError))
    return " ".join(str(error).split()) if known else f"its decoder failed ({type(error).__name__}: {error})"


def _kind_of(image: str | os.PathLike[str] | bytes) -> str:
    """What a file that is no image looks like."""
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
    """The folder that a data file's images lie in, and nothing outside it.

    A data file is often somebody else's, and so are the archives that fill the folder: neither chooses which files of
    this machine are read.

    Args:
        root: the folder; names start from the current one if it is None or empty.
        allow_outside: read what lies elsewhere, too: absolute names, ``..`` and symbolic links that lead out.
    """

    def __init__(self, root: str | None, allow_outside: bool = False) -> None:
        self.root = root or ""
        self.allow_outside = allow_outside
        self._real_root = os.path.realpath(self.root or os.curdir)
        self._real = functools.lru_cache(maxsize=65536)(os.path.realpath)

    def path(self, name: str) -> str:
        """Where the image of that name lies.

        Raises:
            BadImageError: outside the folder.
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
            return f"it is no name of a file ({error})"
        if real == self._real_root or real.startswith(os.path.join(self._real_root, "")):
            return None
        return f"it lies outside the image folder {self.root or os.curdir}, at {real}" + _LINKS


def missing_and_outside(folder: ImageFolder, names: dict[str, set[str]]) -> Iterator[tuple[str, str | None]]:
    """The files that are not there, or not in the folder.

    Folders are listed, which asks a network file system one question where a look-up of each file asks thousands.

    Args:
        folder: what the names start from.
        names: file names by folder.

    Yields:
        path, and why the file may not be read, None if it does not exist.
    """
    for parent, files in names.items():
        path = os.path.join(folder.root, parent)
        links: dict[str, bool] = {}  # what is there, and whether it is a link
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
