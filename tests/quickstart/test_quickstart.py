"""The quickstart from end to end, in miniature: its scripts run, what they launch runs in this process."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tinyllava_switchkd.eval import run as eval_run
from tinyllava_switchkd.quickstart import run as quickstart
from tinyllava_switchkd.quickstart.plan import Plan
from tinyllava_switchkd.quickstart.run import Quickstart
from tinyllava_switchkd.quickstart.runner import Runner, StageError
from tinyllava_switchkd.quickstart.scenes import QUESTION_TYPES
from tinyllava_switchkd.train import train as train_entry
from tinyllava_switchkd.visualize.paper import paper_tables

MINIATURE = Plan(
    font_scenes=24,
    teacher_scenes=24,
    student_scenes=16,
    val_scenes=4,
    test_scenes=6,
    probe_scenes=20,
    tower_width=16,
    teacher_width=24,
    student_width=16,
    layers=1,
    tower_steps=2,
    llm_steps=2,
    teacher_pt_steps=2,
    teacher_steps=2,
    student_pt_steps=2,
    student_steps=3,
)
METHODS = ("teacher", "sft", "sft_equal_time", "switch_kd")
MODULES = {"tinyllava_switchkd.train.train": train_entry.main, "tinyllava_switchkd.eval.run": eval_run.main}


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Lets the bash scripts launch a stand-in for Python that notes its arguments; they then run in this process.

    So that the test pays for the imports once and not two dozen times.
    """
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$NOTED_ARGUMENTS"\n')
    interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
    modules = []

    def script(self, title, command, environment, log, cost, steps=None):
        noted = tmp_path / "arguments"
        noted.unlink(missing_ok=True)
        added = {**environment, "PYTHON": str(interpreter), "NOTED_ARGUMENTS": str(noted)}
        result = subprocess.run(command, env={**os.environ, **added}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        flag, module, *arguments = noted.read_text().rstrip("\0").split("\0")
        assert flag == "-m"
        modules.append(module)
        if MODULES[module](arguments) != 0:
            raise StageError(title)

    monkeypatch.setattr(Runner, "script", script)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return modules


@pytest.mark.slow
def test_from_nothing_to_a_table_and_again(tmp_path, launched):
    def go(seeds):
        # One lane: what runs in this process runs one after another
        return Quickstart(tmp_path / "out", seeds, MINIATURE, lanes=1, quiet=True)()

    results = go([1])
    assert launched.count("tinyllava_switchkd.train.train") == 9
    assert launched.count("tinyllava_switchkd.eval.run") == 3 * 4
    check_results(results, tmp_path / "out", seeds=[1])
    assert "+-" not in results["text"]

    first, launched[:] = results["switch_kd"]["each"][0], []
    results = go([1, 2])  # the first seed is there, the second's four stages are not
    assert launched.count("tinyllava_switchkd.train.train") == 4 and len(launched) == 4
    check_results(results, tmp_path / "out", seeds=[1, 2])
    assert results["switch_kd"]["each"][0] == first
    assert "+-" in results["text"] and "Paired differences" in results["text"]

    launched.clear()
    again = go([1, 2])
    assert not launched and again == results


def check_results(results: dict, out: Path, seeds: list[int]) -> None:
    """What the table says, the file says, and the runs said."""
    stored = json.loads((out / "results.json").read_text())
    assert stored == {name: value for name, value in results.items() if name != "text"}
    assert stored["seeds"] == seeds and stored["versions"]["torch"] and stored["regime"] in results["text"]
    for method in METHODS:
        row = stored[method]
        assert 0 <= row["score"] <= 100 and 0 <= row["probe"] <= 100 and row["seconds"] > 0
        assert list(row["by_type"]) == list(QUESTION_TYPES)
        assert row["score"] == pytest.approx(sum(row["by_type"].values()) / len(QUESTION_TYPES))
        assert len(row["each"]) == (1 if method == "teacher" else len(seeds))
        assert ("std" in row) == (len(row["each"]) > 1)
    pairs = stored["paired_differences"]["switch_kd - sft"]["each"]
    for index, difference in enumerate(pairs):
        left, right = (stored[method]["each"][index]["score"] for method in ("switch_kd", "sft"))
        assert difference == pytest.approx(left - right)
    for picture in ("losses.png", "knees.png", "scores.png", "predictions.png", "benchmarks/radar.png"):
        if picture != "benchmarks/radar.png":  # four benchmarks make too few axes for one
            with Image.open(out / picture) as image:
                assert min(image.size) > 300
    paper = next(row for row in paper_tables()["table1"] if row["method"] == "Switch-KD" and "0.5B" in row["llm"])
    assert f"{paper['Avg10']:.1f}" in results["text"]
    for name in ("vqav2", "pope", "mmbench", "scienceqa"):
        assert (out / "benchmarks" / "switch_kd" / f"{name}.json").is_file()


def test_command_refuses_what_cannot_be(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "Quickstart", None)  # nothing may begin
    (tmp_path / "file").write_text("")
    assert quickstart.main(["--output", str(tmp_path / "file" / "out")]) == 1
    assert "set QUICKSTART_OUT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quickstart.main(["--seeds", "0"])
    assert "--seeds is 0" in capsys.readouterr().err


def test_output_comes_from_the_environment(tmp_path, monkeypatch):
    seen = []

    def stand_in(root, seeds, lanes):
        seen.append((root, list(seeds)))
        return lambda: {"text": "done"}

    monkeypatch.setattr(quickstart, "Quickstart", stand_in)
    monkeypatch.setenv("QUICKSTART_OUT", str(tmp_path / "elsewhere"))
    assert quickstart.main(["--seeds", "3"]) == 0
    assert seen == [((tmp_path / "elsewhere").resolve(), [1, 2, 3])]


def test_a_failed_stage_is_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    def stand_in(*args, **kwargs):
        def fail():
            raise StageError("teacher SFT failed (exit code 1); its log is here")

        return fail

    monkeypatch.setattr(quickstart, "Quickstart", stand_in)
    assert quickstart.main(["--output", str(tmp_path / "out")]) == 1
    assert "teacher SFT failed" in capsys.readouterr().err
