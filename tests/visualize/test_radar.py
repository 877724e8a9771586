"""The radar chart: its numbers are the paper's groups, its files are whole and the same every time."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from tinyllava_switchkd.visualize.paper import AVERAGES, COLUMNS, average, figure1_axes, paper_tables
from tinyllava_switchkd.visualize.radar import COLOURS, axis_scale, axis_scales, axis_values, common_axes, draw_radar

TABLE1 = {f"{row['method']} {row['llm']}": row for row in paper_tables()["table1"]}
SWITCH_KD = TABLE1["Switch-KD Qwen2.5-0.5B"]["scores"]
SFT = TABLE1["TinyLLaVA Qwen2.5-0.5B"]["scores"]


@pytest.mark.parametrize("row", TABLE1.values(), ids=TABLE1)
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_table_1_are_the_printed_ones(row: dict, name: str) -> None:
    """The cells are rounded and the averages were taken before; they may differ by 0.1."""
    mean = average(row["scores"], AVERAGES[name])
    if row[name] is None:
        assert mean is None
    else:
        assert mean == pytest.approx(row[name], abs=0.1)


def test_paper_tables_have_the_ten_columns() -> None:
    assert list(COLUMNS.values()) == paper_tables()["benchmarks"]
    named = [column for columns in figure1_axes().values() for column in columns]
    assert sorted(named) == sorted(COLUMNS.values()) and len(figure1_axes()) == 5


def test_axes_are_means_of_their_columns() -> None:
    values = axis_values(SWITCH_KD)
    assert values["Perception & Understanding"] == pytest.approx((66.8 + 63.5 + 57.8) / 3)
    assert values["Cognition & Reasoning"] == pytest.approx((79.6 + 61.6 + 57.9 + 29.8) / 4)
    assert (values["OCR"], values["Domain-specific"], values["Hallucination"]) == (52.3, 44.9, 87.3)
    assert axis_values({"TextVQA": 1.0})["Hallucination"] is None


def test_axes_that_some_model_lacks_are_cut() -> None:
    axes = common_axes([SWITCH_KD, {"MME": 1.0, "MMB": 2.0, "POPE": 3.0}])
    assert axes == {"Perception & Understanding": ("MME", "MMB"), "Hallucination": ("POPE",)}


@pytest.mark.parametrize("values", [[28.9, 41.5, 44.9], [86.1, 86.1], [0.0, 100.0], [100.0], [0.0], [50.0, 50.04]])
def test_scale_holds_its_values(values: list[float]) -> None:
    low, high = axis_scale(values)
    assert low <= min(values) and max(values) <= high
    assert (high - low) / 3 == pytest.approx(round((high - low) / 3))  # whole numbers on the rings
    assert high <= 100 or high - low > 100  # no such score, unless the rings need it


def test_a_lone_model_has_one_scale_from_zero() -> None:
    """On scales of their own all its corners would lie on the same ring."""
    assert axis_scales([[62.7, 57.2, 44.9]]) == [(0.0, 75.0)] * 3
    assert axis_scales([[62.7, 57.2], [60.0, 41.0]]) == [axis_scale([62.7, 60.0]), axis_scale([57.2, 41.0])]


def test_chart_is_written_as_png_and_svg(tmp_path: Path) -> None:
    models = {"TinyLLaVA": SFT, "Switch-KD": SWITCH_KD}
    files = draw_radar(models, tmp_path / "charts" / "v1.0", note="a note")
    assert [file.name for file in files] == ["v1.0.png", "v1.0.svg"]
    with Image.open(files[0]) as image:
        assert min(image.size) > 1200  # 300 dots an inch
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}
    for colour in COLOURS[:2]:
        assert tuple(bytes.fromhex(colour[1:])) in colours
    drawing = files[1].read_text(encoding="utf-8")
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    for text in ("Perception &amp; Understanding", "Hallucination", "TinyLLaVA", "Switch-KD", "62.7", "a note"):
        assert f"<!-- {text} -->" in drawing
    again = draw_radar(models, tmp_path / "again", formats=("svg",), note="a note")
    assert again[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "shows one to 7 models, not 0"),
        ({str(number): SFT for number in range(8)}, "shows one to 7 models, not 8"),
        ({"a": {"POPE": 1.0}}, r"three axes that every model has, and there is 1 \(Hallucination\)"),
    ],
)
def test_chart_that_makes_no_sense(models: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        draw_radar(models, tmp_path / "radar")
    with pytest.raises(ValueError, match="a has no score for the axis 'y'"):
        draw_radar({"a": {"POPE": 1.0}}, tmp_path / "radar", axes={"x": ["POPE"], "y": ["GQA"], "z": ["POPE"]})
    assert not list(tmp_path.iterdir())
