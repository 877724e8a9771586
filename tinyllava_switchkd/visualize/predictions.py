"""A sheet of sample predictions: cards with an image, a question, and every model's answer."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tinyllava_switchkd.data.image_files import to_rgb
from tinyllava_switchkd.visualize.curves import STYLE, save_figure
from tinyllava_switchkd.visualize.radar import INK

RIGHT, WRONG = "#00734f", "#b3400e"
"""Colours of right and wrong answers; a mark in front shows the same without colour."""

_CHARACTERS = 34  # per line of a card
_LINE = 0.165  # line height in inches


@dataclass(frozen=True)
class Prediction:
    """One question about one image.

    Attributes:
        reference: the right answer.
        answers: label -> that model's answer.
        right: label -> whether its answer counts as right.
    """

    image: Image.Image
    question: str
    reference: str
    answers: Mapping[str, str]
    right: Mapping[str, bool]


def draw_predictions(predictions: Sequence[Prediction], path: str | Path, columns: int = 4, title: str = "") -> Path:
    """Draw the cards, row by row.

    Args:
        predictions: one or more predictions.
        path: file to write.
        columns: cards per row.
        title: title above the cards.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

    columns = min(columns, len(predictions))
    texts = [card_text(prediction) for prediction in predictions]
    rows = [texts[start : start + columns] for start in range(0, len(texts), columns)]
    side = 2.1
    heights = [part for row in rows for part in (side, _LINE * max(len(lines) for lines in row) + 0.25)]
    head = 0.45 if title else 0.1
    with rc_context(STYLE):
        figure = Figure(figsize=(columns * (side + 0.35), sum(heights) + head))
        total = figure.get_figheight()
        grid = GridSpec(
            len(heights),
            columns,
            figure=figure,
            height_ratios=heights,
            left=0.02,
            right=0.98,
            top=1 - head / total,
            bottom=0.0,
            hspace=0.0,
            wspace=0.12,
        )
        if title:
            figure.text(0.02, 1 - 0.16 / total, title, ha="left", va="top", color=INK, fontsize=11, fontweight="bold")
        for number, (prediction, lines) in enumerate(zip(predictions, texts, strict=True)):
            row, column = divmod(number, columns)
            picture = figure.add_subplot(grid[2 * row, column])
            picture.imshow(_enlarged(prediction.image), interpolation="lanczos")
            picture.set_axis_off()
            picture.set_anchor("NW")
            text = figure.add_subplot(grid[2 * row + 1, column])
            text.set_axis_off()
            text.set(xlim=(0, 1), ylim=(heights[2 * row + 1], 0))
            for line, (words, colour, weight) in enumerate(lines):
                text.text(
                    0.0,
                    0.06 + _LINE * line,
                    words,
                    ha="left",
                    va="top",
                    fontsize=8,
                    color=colour,
                    fontweight=weight,
                    family=["DejaVu Sans"],
                    parse_math=False,
                )
        return save_figure(figure, path, dpi=160)


def card_text(prediction: Prediction) -> list[tuple[str, str, str]]:
    """The lines of a card: (text, colour, font weight)."""
    lines = []
    for part in prediction.question.strip().splitlines():
        lines += [(line, INK, "bold") for line in textwrap.wrap(part, _CHARACTERS) or [""]]
    lines += [(line, "#555555", "normal") for line in textwrap.wrap(f"Truth: {prediction.reference}", _CHARACTERS)]
    for label, answer in prediction.answers.items():
        right = prediction.right[label]
        words = textwrap.wrap(
            f"{'✓' if right else '✗'} {label}: {answer or '(nothing)'}", _CHARACTERS, subsequent_indent="   "
        )
        lines += [(line, RIGHT if right else WRONG, "normal") for line in words]
    return [("".join(c if c.isprintable() else "□" for c in line), colour, weight) for line, colour, weight in lines]


def _enlarged(image: Image.Image, least: int = 256) -> Image.Image:
    """Enlarge a tiny image by a whole factor, so that matplotlib's interpolation does not blur it."""
    image = to_rgb(image)
    factor = max(1, -(-least // max(image.size)))
    return (
        image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC) if factor > 1 else image
    )
