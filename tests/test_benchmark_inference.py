"""benchmarks/inference.py: the measurement runs, and its ratios follow from its figures."""

import argparse

import pytest

from benchmarks import inference
from tinyllava_switchkd.ablations.dry import qwen2, siglip


def test_every_way_on_the_cpu_is_measured(monkeypatch):
    student, teacher = qwen2(16, 1, 2, 1, 32, 64, True), qwen2(32, 2, 2, 1, 64, 64, True)
    monkeypatch.setitem(inference.SIZES, "tiny", (student, teacher, siglip(16, 2, 2, 32, 28, 14), 16))
    args = argparse.Namespace(size="tiny", device="cpu", text=8, new_tokens=4, repeats=1)
    ways = ["eager", "static"]
    found = inference.measure(args, ways)
    assert set(found) == {(name, way) for name in ("teacher", "student") for way in ways}
    header, rows = inference.table(found, ways)
    for way, name, *figures in rows:
        first, rate, warm_up = found[name, way]
        assert min(first, rate, warm_up) > 0 and len(figures) == len(header) - 2
        ratios = [float(figure) for figure in figures[2:5]]
        expected = (found["teacher", way][0] / first, rate / found["teacher", way][1], rate / found[name, "eager"][1])
        assert ratios == pytest.approx(expected, abs=0.006)
