"""The results' page says what the stored runs say."""

from __future__ import annotations

import importlib.util
import re
from statistics import mean

import pytest
from scipy import stats

from tests.docs.pages import DOCS
from tinyllava_switchkd.ablations.tables import TABLES
from tinyllava_switchkd.io import read_json


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_results", DOCS / "_generate_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_in_sync(generator):
    parts = generator.blocks(read_json(generator.RUNS))
    everything = ""
    for path in generator.TEXTS:
        text = path.read_text(encoding="utf-8")
        assert generator._quickstart().filled(text, parts) == text, f"{path.name}: run python docs/_generate_results.py"
        everything += text
    assert all(f"<!-- {name} -->\n\n{content}\n" in everything for name, content in parts.items())
    assert all(f"results-{name}" in parts for name in TABLES)


def test_pictures_show_the_stored_results(generator):
    shown = generator.sources(read_json(generator.RUNS))
    assert "methods.png" in shown
    assert generator._quickstart().stale_pictures(shown) == [], "run python docs/_generate_results.py"


def test_a_difference_is_that_of_the_stored_scores(generator):
    """The row "with the switch", computed here from the file."""
    runs = read_json(generator.RUNS)["runs"]
    seeds = [run["seed"] for run in runs.values() if run["way"] == "switch_kd"]
    seeds = [seed for seed in seeds if f"sft/{seed}" in runs and f"align/{seed}" in runs]
    ours, base = ([runs[f"{way}/{seed}"]["score"] for seed in seeds] for way in ("switch_kd", "sft"))
    row = re.search(r"^\| with the switch \| (.*)$", generator.table_block({"runs": runs}, "switch"), re.MULTILINE)[1]
    assert row.startswith(f"{mean(ours):.1f} | ") and f"{mean(ours) - mean(base):+.1f}" in row
    if len(seeds) > 1:
        interval = stats.ttest_rel(ours, base).confidence_interval(0.95)
        assert f"[{interval.low:+.1f}, {interval.high:+.1f}]" in row


def test_papers_figures_are_the_papers(generator):
    assert generator.paper_scores("switch") == {"sft": 56.5, "align": 58.8, "switch_kd": 60.1}
    assert generator.paper_scores("schemes") == {"sft": 56.5, "dpt_sft": 57.4, "align": 58.8, "dpt_dft": 58.7}
    assert generator.paper_scores("losses")["bild_rkl"] == 58.6
    assert generator.paper_scores("sizes")["larger_teacher"] == 59.8
    assert generator.paper_scores("methods")["llava_kd"] == 58.9
