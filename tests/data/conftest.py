"""A small data set on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import AutoImageProcessor

from tests.data.tokenizers import FIXTURES

RECORDS = [
    {"id": "one", "image": "a/red.png", "conversations": [
        {"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "Red"}]},
    {"id": "text", "conversations": [
        {"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "4, of course, as everyone knows"},
        {"from": "human", "value": "And 3+3?"}, {"from": "gpt", "value": "6"}]},
    {"id": "two", "image": ["a/red.png", "b.jpg"], "conversations": [
        {"from": "human", "value": "<image>\n<image>\nThe same?"}, {"from": "gpt", "value": "No"}]},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``data.json`` with `RECORDS` and their images."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a" / "red.png")
    Image.new("L", (20, 30), 200).save(tmp_path / "b.jpg")
    write(tmp_path, RECORDS)
    return tmp_path


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def data_args(folder: Path, **kwargs: Any) -> SimpleNamespace:
    settings = {
        "data_path": str(folder / "data.json"),
        "image_folder": str(folder),
        "image_aspect_ratio": "square",
        "template": "phi",
        "is_multimodal": True,
        "image_processor": AutoImageProcessor.from_pretrained(FIXTURES / "v1" / "siglip-tiny"),
        "num_image_tokens": 15,
    }
    return SimpleNamespace(**settings | kwargs)
