"""Uploads: what is accepted, what is refused, and that refusing is cheap."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image

from tests.serve.talkers import picture
from tinyllava_switchkd.serve.images import ImageLimits, read_image

LIMITS = ImageLimits(max_bytes=2**20, max_pixels=1_000_000, max_side=400)


def bomb(width: int, height: int) -> bytes:
    """A valid PNG of one colour: a few kilobytes on disk, `width * height` bytes when decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(width + 1)) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_formats(tmp_path, kind, mode):
    file = tmp_path / "image"  # the extension does not matter
    picture().convert(mode).convert("RGB" if kind == "WEBP" else "L" if kind == "JPEG" and mode == "P" else mode).save(
        file, format=kind
    )
    image = read_image(file, LIMITS)
    assert image.mode == "RGB" and image.size == (80, 60)


def test_pixels_are_exact_without_a_reduction(tmp_path):
    picture().save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tobytes() == picture().tobytes()


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture().save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(tmp_path / "phone.jpg").size == (60, 80)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_images_are_reduced(tmp_path, kind):
    picture(size=(1200, 600)).save(tmp_path / "large", format=kind)
    assert read_image(tmp_path / "large", LIMITS).size == (400, 200)


@pytest.mark.parametrize("side", [400, 410])
def test_the_colours_behind_transparency_are_those_of_training(tmp_path, side):
    image = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    image.paste((200, 0, 0, 255), (100, 100, 300, 300))
    image.save(tmp_path / "logo.png")
    shown = read_image(tmp_path / "logo.png", LIMITS)
    assert shown.size == (400, 400) and shown.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1200, 1200), (20_000, 20_000)])  # beyond our limit, and beyond Pillow's own
def test_a_decompression_bomb_is_never_decoded(tmp_path, size):
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb(*size))
    assert file.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.png has .*pixels; at most 1\.0 million"):
        read_image(file, ImageLimits(max_bytes=2**20, max_pixels=1_000_000))
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()


def test_too_many_bytes(tmp_path):
    (tmp_path / "big.png").write_bytes(bytes(1_400_000))
    with pytest.raises(ValueError, match=r"big\.png has 1\.3 MB; at most 1 MB"):
        read_image(tmp_path / "big.png", LIMITS)


def test_files_that_are_not_images(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="not an image in a supported format"):
        read_image(tmp_path / "text.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="not an image in a supported format"):
        read_image(tmp_path / "empty.png")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(ValueError, match="not an image in a supported format"):
        read_image(tmp_path / "page.eps")
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^Your image does not exist"):
        read_image(tmp_path / "none.png", name="Your image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged(tmp_path, kind):
    buffer = io.BytesIO()
    picture(size=(300, 300)).save(buffer, format=kind)
    (tmp_path / "cut").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_image(tmp_path / "cut", LIMITS)
