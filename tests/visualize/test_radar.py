"""The radar chart: the paper's groups, complete and reproducible files."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from tinyllava_switchkd.visualize.paper import AVERAGES, COLUMNS, average, figure1_axes, paper_tables
from tinyllava_switchkd.visualize.radar import COLOURS, RINGS, absences, axis_values, common_axes, draw_radar, scale_end

TABLE1 = {f"{row['method']} {row['llm']}": row for row in paper_tables()["table1"]}
SWITCH_KD = TABLE1["Switch-KD Qwen2.5-0.5B"]["scores"]
SFT = TABLE1["TinyLLaVA Qwen2.5-0.5B"]["scores"]


@pytest.mark.parametrize("row", TABLE1.values(), ids=TABLE1)
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_table_1_match_the_paper(row: dict, name: str) -> None:
    """The paper averages before it rounds, so averages of the printed cells may differ by 0.1."""
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


def test_axes_missing_for_a_model_are_left_out() -> None:
    axes = common_axes([SWITCH_KD, {"MME": 1.0, "MMB": 2.0, "POPE": 3.0}])
    assert axes == {"Perception & Understanding": ("MME", "MMB"), "Hallucination": ("POPE",)}


@pytest.mark.parametrize("values", [[28.9, 41.5, 44.9], [86.1, 86.1], [0.0, 100.0], [100.0], [0.0], [50.0, 80.04]])
def test_scale_starts_at_zero_and_contains_all_values(values: list[float]) -> None:
    top = scale_end(values)
    assert max(values) <= top <= 100 and (top / RINGS).is_integer()
    assert all(RINGS * step < max(values) for step in (1, 2, 5, 10, 15, 20, 25) if RINGS * step < top)
    with pytest.raises(ValueError, match="must lie on 0-100, not 3 to 101"):
        scale_end([3, 101])


def test_missing_axis_gives_the_reason(tmp_path: Path) -> None:
    part = {column: score for column, score in SFT.items() if column not in ("POPE", "MMB")}
    models = {"Switch-KD": SWITCH_KD, "SFT": part}
    sentences = absences(models, {("SFT", "POPE"): "not yet scored"})
    assert sentences == [
        "Perception & Understanding without MMB (SFT: no score).",
        "No axis Hallucination: POPE (SFT: not yet scored).",
    ]
    both = absences({"A": part, "B": part}, {("B", "MMB"): "not asked"})
    assert both == [
        "Perception & Understanding without MMB (A: no score; B: not asked).",
        "No axis Hallucination: POPE (A, B: no score).",
    ]
    [file] = draw_radar(models, tmp_path / "radar", formats=("svg",), reasons={("SFT", "POPE"): "not yet scored"})
    assert "No axis Hallucination: POPE (SFT: not yet scored)." in file.read_text(encoding="utf-8")


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
def test_invalid_charts_are_refused(models: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        draw_radar(models, tmp_path / "radar")
    with pytest.raises(ValueError, match="a has no score for the axis 'y'"):
        draw_radar({"a": {"POPE": 1.0}}, tmp_path / "radar", axes={"x": ["POPE"], "y": ["GQA"], "z": ["POPE"]})
    assert not list(tmp_path.iterdir())
