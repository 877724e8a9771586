"""The paper's numbers (arXiv 2604.14629v1, Tables 1 to 6), read from ``paper_tables.json`` beside this file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from tinyllava_switchkd.io import JsonObject

COLUMNS = {
    "mme": "MME",
    "mmbench": "MMB",
    "mmbench_cn": "MMB-CN",
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "scienceqa": "SciQA",
    "mmmu": "MMMU",
    "textvqa": "TextVQA",
    "vizwiz": "VizWiz",
    "pope": "POPE",
}
"""Benchmark -> the paper's column, in the paper's order."""

AVG10 = tuple(COLUMNS.values())
AVG7 = ("MME", "MMB", "MMB-CN", "GQA", "SciQA", "TextVQA", "VizWiz")
AVERAGES = {"Avg7": AVG7, "Avg10": AVG10}
"""Average -> its columns; it is the mean of unrounded scores."""


@cache
def paper_tables() -> JsonObject:
    """The data file: ``table1`` ... ``table6``, ``figure1_axes`` and notes on the paper's rounding."""
    return json.loads(Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))


def figure1_axes() -> dict[str, tuple[str, ...]]:
    """The five axes of Figure 1: title -> the columns it averages."""
    return {title: tuple(columns) for title, columns in paper_tables()["figure1_axes"].items()}


def average(scores: Mapping[str, float], columns: Sequence[str]) -> float | None:
    """Mean over the columns; None if one of them has no score."""
    if any(scores.get(column) is None for column in columns):
        return None
    return sum(scores[column] for column in columns) / len(columns)
