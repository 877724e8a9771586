"""benchmarks.step and benchmarks.loss: the commands run on the smallest models and print their measurements."""

from __future__ import annotations

import pytest

from benchmarks import loss, step


@pytest.fixture
def sections(monkeypatch):
    """The tables that would be written: key -> tables; memory is not measured in a separate process."""
    found = {}
    for module in (step, loss):
        monkeypatch.setattr(module, "write_section", lambda key, title, tables, *_, **__: found.update({key: tables}))
    monkeypatch.setattr(step, "resident_growth", lambda *_: 2.0**20)
    monkeypatch.setattr(loss, "peak_memory", lambda *_: 2.0**20)
    monkeypatch.setattr(step, "matrix_rate", lambda _: 1e9)
    monkeypatch.setattr(loss, "readme_cell", lambda *_: None)
    return found


def run(*words):
    step.main(["--size", "tiny", "--device", "cpu", "--repeats", "1", *words])


def test_the_variants_side_by_side(sections):
    run("--variants", *(name for name in step.VARIANTS if name != "+ compile"))
    ((header, rows),) = sections["step-tiny-cpu"]
    assert [row[0] for row in rows] == [name for name in step.VARIANTS if name != "+ compile"]
    assert all(len(row) == len(header) for row in rows)


def test_a_cached_step_leaves_the_teachers_own_pass_out(sections, monkeypatch):
    passes = []
    run_teacher = step.Distiller._run_teacher
    monkeypatch.setattr(step.Distiller, "_run_teacher", lambda *args: passes.append(1) or run_teacher(*args))
    run("--teacher_cache")
    ((_, rows),) = sections["step-cache-tiny-cpu"]
    assert len(passes) == 2 * 2 + 2 + 2  # two steps of each variant without a cache, their operations, two fillings
    saved = {name: int(share.rstrip(" %")) for name, _, _, _, share in rows if share}
    assert set(saved) == {"align only, cached", "align + switch, cached"}
    assert 0 < saved["align + switch, cached"] < saved["align only, cached"] < 100


def test_growth_is_reported_as_slopes(sections, monkeypatch):
    monkeypatch.setattr(step, "GROWN", {"images": (1, 2), "supervised tokens": (64, 128)})
    run("--growth")
    points, slopes = sections["step-growth-tiny-cpu"]
    assert [row[:2] for row in points[1]] == [["3", "128"], ["6", "128"], ["3", "64"], ["3", "128"]]
    assert all(0 <= float(of_memory) < 1.5 and 0 < float(of_flops) < 1.5 for *_, of_memory, of_flops in slopes[1])


@pytest.mark.parametrize("variant", ["SFT", "align only", "align + switch", "+ checkpointing"])
def test_the_estimate_is_what_torch_allocates(variant):
    """Also with a small vocabulary, where logits do not dominate."""
    shape = step.Shape("small", "cpu", vocab=4096)
    assert step.predicted(variant, shape) == pytest.approx(step.Bench(shape).peak(variant), rel=0.15)


def test_the_losses_side_by_side(sections, monkeypatch):
    monkeypatch.setattr(loss, "growth", lambda *_: [["pair term", "k", "", "1.0"]] * 3)  # a minute by itself
    loss.main(["--device", "cpu", "--tokens", "2", "--vocab", "512", "--repeats", "1"])
    assert len(sections["loss-cpu"][0][1]) == 5
