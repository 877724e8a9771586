"""Bad image files, as they occur in real data sets."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def encoded(format: str, **kwargs: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, format=format, **kwargs)
    return buffer.getvalue()


def of_many_passes(count: int) -> bytes:
    """A progressive JPEG with its last pass repeated."""
    data = encoded("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def png_of(width: int, height: int, text: int = 0) -> bytes:
    """A PNG whose header claims a size, with a compressed text of the given number of bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    if text:
        body = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(text))) + body
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


BAD_IMAGES: dict[str, tuple[str, bytes | Callable[[Path], object], str]] = {
    "empty": ("a.png", b"", "empty"),
    "one byte": ("a.png", b"\x89", "unknown kind"),
    "a text": ("a.png", b"this is no image\n", "a text"),
    "JSON": ("a.jpg", b'{"error": "not found"}', "a text"),
    "a web page": ("a.jpg", b"<!DOCTYPE html><html>404</html>", "a web page"),
    "a Git LFS pointer": ("a.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS"),
    "SVG": ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "SVG with a declaration": ("a.png", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "a cut PNG": ("a.png", encoded("PNG")[:2000], ""),
    "a PNG's header alone": ("a.png", encoded("PNG")[:33], ""),
    "a PNG with a wrong checksum": ("a.png", changed(encoded("PNG"), 200, b"\xff" * 400), ""),
    "a cut JPEG": ("a.jpg", encoded("JPEG")[:700], ""),
    "a JPEG's beginning": ("a.jpg", b"\xff\xd8\xff\xe0", ""),
    "zeros in the place of a JPEG": ("a.jpg", b"\0" * 4096, "unknown kind"),
    "a cut GIF": ("a.gif", encoded("GIF")[:40], ""),
    "a cut WEBP": ("a.webp", encoded("WEBP")[:60], ""),
    "a cut TIFF": ("a.tif", encoded("TIFF")[:300], ""),
    "a cut BMP": ("a.bmp", encoded("BMP")[:300], ""),
    "a bomb": ("a.png", png_of(60_000, 60_000), "too large"),
    "a bomb in one direction": ("a.png", png_of(400_000_000, 1), ""),
    "no pixels": ("a.png", png_of(0, 0), ""),
    "a PDF": ("a.png", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ""),
    "a ZIP archive": ("a.jpg", b"PK\x03\x04" + b"\0" * 100, "unknown kind"),
    "numpy's format": ("a.png", b"\x93NUMPY\x01\x00v\x00", "unknown kind"),
    "PostScript": ("a.eps", encoded("EPS"), "PostScript"),
    "a video": ("a.mp4", b"\0\0\0\x18ftypmp42" + b"\0" * 64, "unknown kind"),
    "PostScript under another name": ("a.png", encoded("EPS"), "PostScript"),
    "long PostScript": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"%a\n" * 1_000_000, "PostScript"),
    "a JPEG of a thousand passes": ("a.jpg", of_many_passes(1000), "more than 100 passes"),
    "a compressed text of 300 MB": ("a.png", png_of(64, 48, text=300 * 2**20), "too large"),
    "a pipe": ("a.png", lambda path: os.mkfifo(path), "pipe"),
    "a folder": ("a.png", lambda path: path.mkdir(), "folder"),
}
"""Name of the file, its content, a word of the reason."""
