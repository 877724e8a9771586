"""The notebooks run from the first cell to the last, on the quickstart's shipped bases and a few steps of training."""

from __future__ import annotations

import json

import pytest

from tests.docs.pages import DOCS
from tinyllava_switchkd.distill import MethodFactory
from tinyllava_switchkd.quickstart import experiment

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
SHORT = experiment.Plan(
    teacher_scenes=16,
    student_scenes=16,
    val_scenes=4,
    test_scenes=6,
    probe_scenes=20,
    teacher_pt_steps=1,
    teacher_steps=2,
    student_pt_steps=1,
    student_steps=2,
)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "Plan", lambda: SHORT)
    monkeypatch.setenv("QUICKSTART_OUT", str(tmp_path))
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict = {"__name__": "__main__"}
    with MethodFactory.scope():
        for number, cell in enumerate(cells, 1):
            exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "They differ on" in printed and printed.count("distance of the towers") == 10
    history = names["read_history"](names["mine"])[:10]
    assert history[-1]["eyes"] < history[0]["eyes"]  # ten steps of the method bring the towers together


def test_notebooks_are_stored_without_output():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells), path
