"""Draws the demo's example images: ``python -m tinyllava_switchkd.serve.examples.draw [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tinyllava_switchkd.serve.examples import FOLDER

SIZE = (480, 360)
_SCALE = 4  # drawn larger and reduced, for smooth edges


class Canvas:
    """A picture in the coordinates of `SIZE`."""

    def __init__(self, background: str) -> None:
        self._image = Image.new("RGB", (SIZE[0] * _SCALE, SIZE[1] * _SCALE), background)
        self._draw = ImageDraw.Draw(self._image)

    def shape(self, kind: str, points: list[tuple[float, float]], fill: str, **kwargs: object) -> None:
        """`kind` is a method of `PIL.ImageDraw`."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        kwargs = {key: value * _SCALE if isinstance(value, int) else value for key, value in kwargs.items()}
        getattr(self._draw, kind)(scaled, fill=fill, **kwargs)

    def text(self, at: tuple[float, float], text: str, size: int, fill: str) -> None:
        """Centred text."""
        font = ImageFont.load_default(size * _SCALE)
        self._draw.text((at[0] * _SCALE, at[1] * _SCALE), text, fill=fill, font=font, anchor="mm")

    def finish(self) -> Image.Image:
        """The picture, reduced to 64 colours so that the file stays small."""
        return self._image.resize(SIZE, Image.Resampling.LANCZOS).quantize(64, dither=Image.Dither.NONE)


def street() -> Image.Image:
    """A house with a red door between two trees."""
    canvas = Canvas("#bfe3f5")
    canvas.shape("ellipse", [(385, 30), (445, 90)], "#ffd34d")
    canvas.shape("rectangle", [(0, 255), (480, 360)], "#8cc474")
    canvas.shape("rectangle", [(0, 315), (480, 360)], "#9a9fa6")
    canvas.shape("rectangle", [(150, 140), (330, 290)], "#f2e2c4")
    canvas.shape("polygon", [(130, 140), (240, 60), (350, 140)], "#a4553f")
    canvas.shape("rectangle", [(218, 215), (262, 290)], "#d22f2f")
    canvas.shape("ellipse", [(252, 250), (257, 255)], "#ffe9a8")
    for x in (168, 278):
        canvas.shape("rectangle", [(x, 168), (x + 36, 202)], "#6fb1d6", outline="#ffffff", width=3)
    for x in (75, 405):
        canvas.shape("rectangle", [(x - 8, 215), (x + 8, 290)], "#7a5230")
        canvas.shape("ellipse", [(x - 42, 135), (x + 42, 235)], "#3c8c46")
    return canvas.finish()


def fruit() -> Image.Image:
    """An apple, a banana and a pear on a table, from left to right."""
    canvas = Canvas("#efe7dc")
    canvas.shape("rectangle", [(0, 230), (480, 360)], "#b98a5b")
    canvas.shape("rectangle", [(0, 230), (480, 238)], "#a1744a")
    canvas.shape("ellipse", [(50, 165), (150, 262)], "#cf2b33")
    canvas.shape("ellipse", [(72, 185), (92, 205)], "#e8777b")
    canvas.shape("line", [(100, 170), (106, 145)], "#5d3d1e", width=5)
    canvas.shape("polygon", [(106, 150), (135, 138), (126, 160)], "#4c9a4a")
    canvas.shape("ellipse", [(180, 130), (310, 268)], "#f4cf3c")
    canvas.shape("ellipse", [(172, 105), (302, 236)], "#efe7dc")
    canvas.shape("rectangle", [(172, 100), (312, 168)], "#efe7dc")
    canvas.shape("polygon", [(300, 172), (310, 150), (318, 154), (308, 185)], "#6d5426")
    canvas.shape("ellipse", [(345, 175), (435, 265)], "#9dbf3b")
    canvas.shape("ellipse", [(362, 125), (418, 215)], "#9dbf3b")
    canvas.shape("line", [(390, 128), (396, 104)], "#5d3d1e", width=5)
    return canvas.finish()


def chart() -> Image.Image:
    """A bar chart of five days; Thursday is highest."""
    canvas = Canvas("#ffffff")
    canvas.text((240, 28), "Visitors per day", 22, "#243447")
    for step, y in enumerate(range(300, 49, -50)):
        canvas.shape("line", [(60, y), (450, y)], "#d5dbe3", width=1)
        canvas.text((40, y), str(step * 20), 14, "#5b6b7d")
    bars = [("Mon", 46, "#4477aa"), ("Tue", 62, "#66ccee"), ("Wed", 30, "#228833"), ("Thu", 94, "#ee6677")]
    for index, (day, value, colour) in enumerate([*bars, ("Fri", 71, "#aa3377")]):
        left = 80 + index * 75
        canvas.shape("rectangle", [(left, 300 - value * 2.5), (left + 48, 300)], colour)
        canvas.text((left + 24, 322), day, 16, "#243447")
    return canvas.finish()


def draw(folder: Path) -> None:
    """Write every example image into `folder`."""
    from tinyllava_switchkd.quickstart.scenes import make_scenes

    for picture in (street, fruit, chart):
        picture().save(folder / f"{picture.__name__}.png", optimize=True)
    for index, scene in enumerate(make_scenes("handwriting", "test", 3, seed=7), start=1):
        Image.fromarray(scene.pixels).save(folder / f"digits_{index}.png", optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
