"""README and the quickstart's page say what the stored runs say."""

from __future__ import annotations

import copy
import importlib.util
from statistics import mean, stdev

import pytest

from tests.docs.pages import DOCS, ROOT
from tinyllava_switchkd.io import read_json


@pytest.fixture(scope="module")
def generator():
    path = DOCS / "_generate_quickstart.py"
    spec = importlib.util.spec_from_file_location("generate_quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_are_in_sync(generator):
    parts = generator.blocks(read_json(generator.RUNS))
    everything = ""
    for path in generator.TEXTS:
        text = path.read_text(encoding="utf-8")
        assert generator.filled(text, parts) == text, f"{path.name}: run python docs/_generate_quickstart.py"
        everything += text
    assert all(f"<!-- {name} -->\n\n{content}\n" in everything for name, content in parts.items())
    assert ROOT / "README.md" in generator.TEXTS


def test_pictures_show_the_stored_results(generator):
    """A picture says which results it shows; other results are told."""
    shown = generator.sources(read_json(generator.RUNS))
    assert generator.stale_pictures(shown) == [], "run python docs/_generate_quickstart.py"
    shown["quickstart.png"]["sft"]["score"] += 0.1
    assert generator.stale_pictures(shown) == ["quickstart.png"]
    assert generator.stale_pictures({"none.png": {}}) == ["none.png"]


def test_figures_are_those_of_the_runs(generator):
    """The README's row of Switch-KD, computed here from the file."""
    stored = read_json(generator.RUNS)
    scores = [row["score"] for run in stored["runs"] for row in run["switch_kd"]]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith("| **Switch-KD** |")]
    spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
    assert f"| {mean(scores):.1f}{spread} |" in line


def test_a_run_that_is_far_off_is_told(generator):
    stored = read_json(generator.RUNS)
    odd = copy.deepcopy(stored["runs"][-1])
    odd["torch"] = "99.0"
    for row in odd["switch_kd"]:
        row["score"] -= 40
    stored["runs"] += [copy.deepcopy(run) for run in stored["runs"] for _ in range(4)] + [odd]
    far = generator.deviations(stored)
    name, distance = max(far.items(), key=lambda item: item[1])
    assert name.startswith("Switch-KD's score with torch 99.0") and distance > 2
    assert f"the farthest, {name}, is {distance:.1f} away" in generator.spread(stored)
