"""Bar charts and sheets of predictions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tinyllava_switchkd.visualize.bars import draw_bars
from tinyllava_switchkd.visualize.predictions import RIGHT, WRONG, Prediction, card_text, draw_predictions

SCORES = {"Teacher": {"overall": 90.0, "where": 100.0}, "SFT": {"overall": 60.0, "where": 99.0}}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def test_height_of_bars(tmp_path):
    path = draw_bars(SCORES, tmp_path / "deep" / "bars.png", spread={"SFT": {"overall": 2.0}}, note="a note")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    heights = []
    for colour in ("#0072B2", "#D55E00"):  # the first bar of each model, in the column where it is highest
        columns = (np.abs(pixels - rgb(colour)).sum(axis=2) < 12).sum(axis=0)
        heights.append(columns[: pixels.shape[1] // 2].max())
    assert heights[1] / heights[0] == pytest.approx(60 / 90, abs=0.03)


def test_card_marks_right_answers_in_text_and_colour():
    prediction = Prediction(
        Image.new("RGB", (8, 8)), "What is in the image?\nA. 3\nB. 5", "A", {"x": "A", "y": ""}, {"x": True, "y": False}
    )
    lines = card_text(prediction)
    assert [line for line, _, _ in lines] == [
        "What is in the image?",
        "A. 3",
        "B. 5",
        "Truth: A",
        "✓ x: A",
        "✗ y: (nothing)",
    ]
    assert [colour for _, colour, _ in lines[-2:]] == [RIGHT, WRONG]


def test_odd_characters_are_shown_as_boxes(tmp_path, recwarn):
    answers = {"model": "a\x02b costs $5 and $6"}
    prediction = Prediction(Image.new("RGB", (8, 8)), "?", "x", answers, {"model": False})
    assert card_text(prediction)[-1][0] == "✗ model: a□b costs $5 and $6"
    draw_predictions([prediction], tmp_path / "sheet.png")
    assert not recwarn.list


def test_sheet_grows_by_rows(tmp_path):
    prediction = Prediction(Image.new("L", (32, 32)), "Where?", "there", {"model": "here"}, {"model": False})
    sizes = []
    for number in (1, 2, 3):
        with Image.open(draw_predictions([prediction] * number, tmp_path / f"{number}.png", columns=2)) as image:
            sizes.append(image.size)
    (one, _), (two, low), (wide, high) = sizes
    assert two == pytest.approx(2 * one, rel=0.02) and wide == two and high > 1.9 * low
