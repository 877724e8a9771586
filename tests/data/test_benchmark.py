"""The benchmark of data loading runs and measures what it should."""

import json
import multiprocessing

import pytest

from benchmarks import data_loading
from tinyllava_switchkd.data import Records


@pytest.fixture
def path(tmp_path):
    data_loading.write_samples(tmp_path / "data.json", 600)
    return tmp_path / "data.json"


def test_made_up_samples_are_llavas(path):
    records = Records(path)
    assert list(records) == json.loads(path.read_text())
    assert 0 < (records.num_images == 0).sum() < 100


def test_parts_of_a_sample_are_timed():
    rows = data_loading.samples(2)
    assert [row[0] for row in rows] == ["pil", "torchvision"]
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])


def test_grouping_pads_less(path):
    shares = {row[0]: float(row[1].rstrip("%")) for row in data_loading.padding(Records(path), ranks=2, accumulation=1)}
    assert shares["by modality and length"] < 0.5 * shares["random"]


def test_opening(path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # a new interpreter would import torch, once for each of the two
    monkeypatch.setattr(data_loading.multiprocessing, "get_context", lambda method: fork)
    rows = data_loading.opening(path, workers=2)
    assert [row[0] for row in rows] == ["list of dicts (TinyLLaVA)", "ours"]
