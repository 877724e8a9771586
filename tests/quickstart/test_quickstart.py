"""The quickstart from end to end, in miniature, and its command."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory
from tinyllava_switchkd.quickstart import bases as bases_module
from tinyllava_switchkd.quickstart import run as command
from tinyllava_switchkd.quickstart.as_benchmarks import BENCHMARKS
from tinyllava_switchkd.quickstart.bases import LEARNED, BasePlan, make_bases
from tinyllava_switchkd.quickstart.experiment import Experiment, Plan, StageError
from tinyllava_switchkd.quickstart.scenes import QUESTION_TYPES
from tinyllava_switchkd.visualize.paper import paper_tables

MINIATURE = Plan(
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
TINY_BASES = BasePlan(
    scenes=16,
    val_scenes=4,
    layers=1,
    towers=(("base-siglip", 16),),
    companion_width=16,
    widths=(("teacher", 24), ("student", 16)),
    tower_steps=1,
    llm_steps=1,
    learned={},
)
METHODS = ("teacher", "sft", "sft_equal_time", "switch_kd")


@pytest.mark.slow
def test_whole_quickstart_and_resuming(tmp_path, monkeypatch):
    trained = []
    train = Experiment.train

    def counted(self, title, name, flags):
        folder = self.root / "checkpoints" / name
        before = folder.stat().st_mtime_ns if folder.exists() else None
        result = train(self, title, name, flags)
        if before is None or folder.stat().st_mtime_ns != before:
            trained.append(title)
        return result

    monkeypatch.setattr(Experiment, "train", counted)
    for name in BENCHMARKS:  # a model that has learned nothing does not end its answers
        monkeypatch.setattr(type(BenchmarkFactory(name)), "max_new_tokens", 8)
    said = []
    bases = make_bases(tmp_path, TINY_BASES, said.append)
    assert len(trained) == 3 and sum("accuracy on validation" in line for line in said) == 3

    def go(seeds):
        trained.clear()
        return command.quickstart(tmp_path, seeds, MINIATURE, bases, said.append)

    results = go([1])
    assert len(trained) == 2 + 4  # the teacher's PT and SFT, the student's PT and three ways
    check_results(results, tmp_path, seeds=[1])
    assert "+-" not in results["text"]

    first = results["switch_kd"]["each"][0]
    results = go([1, 2])
    assert len(trained) == 4
    check_results(results, tmp_path, seeds=[1, 2])
    assert results["switch_kd"]["each"][0] == first
    assert "+-" in results["text"] and "Paired differences" in results["text"]

    again = go([1, 2])
    assert not trained and again == results


def check_results(results: dict, out, seeds: list[int]) -> None:
    """Table, file and runs agree."""
    stored = json.loads((out / "results.json").read_text())
    assert stored == {name: value for name, value in results.items() if name != "text"}
    assert (out / "results.txt").read_text() == results["text"] + "\n"
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
    for picture in ("losses.png", "knees.png", "scores.png", "predictions.png"):
        with Image.open(out / "pictures" / picture) as image:
            assert min(image.size) > 300
    paper = next(row for row in paper_tables()["table1"] if row["method"] == "Switch-KD" and "0.5B" in row["llm"])
    assert f"{paper['Avg10']:.1f}" in results["text"]
    for name in ("vqav2", "pope", "mmbench", "scienceqa"):
        assert (out / "benchmarks" / "switch_kd" / f"{name}.json").is_file()


def test_base_that_did_not_learn_starts_again(tmp_path, monkeypatch):
    """Without training: rounds and starts follow from the scores of each checkpoint."""
    answers = iter([{"digits": 99.0}, {"where": 99.0, "read": 10.0}, {"where": 20.0, "read": 90.0}])

    def train(self, title, name, flags):
        folder = self.root / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(name)
        return folder

    monkeypatch.setattr(Experiment, "train", train)
    for name in ("_keep_tower", "_keep_llm"):
        monkeypatch.setattr(bases_module, name, lambda checkpoint, folder: None)
    monkeypatch.setattr("tinyllava_switchkd.quickstart.evaluate.load", lambda checkpoint: checkpoint)
    monkeypatch.setattr("tinyllava_switchkd.quickstart.evaluate.probe", lambda *_: next(answers)["digits"])
    monkeypatch.setattr("tinyllava_switchkd.quickstart.evaluate.answer_questions", lambda *_: [])
    monkeypatch.setattr("tinyllava_switchkd.quickstart.evaluate.accuracy", lambda *_: (0.0, next(answers)))
    plan = BasePlan(scenes=2, val_scenes=2, widths=(("teacher", 16), ("student", 16)), rounds=2, starts=1, layers=1)
    said = []
    with pytest.raises(StageError, match=r"base-qwen2-teacher did not learn every kind .* from any of 1 starts"):
        make_bases(tmp_path, plan, said.append)
    assert any("not learned: read; training another round, attempts left: 1" in line for line in said)
    assert any("not learned: where; giving up" in line for line in said)
    assert (tmp_path / "models" / "base-siglip").is_dir() and not (tmp_path / "models" / "base-qwen2-teacher").exists()
    assert set(LEARNED) == {"digits", *QUESTION_TYPES}


def test_command_refuses_invalid_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "quickstart", None)  # nothing may start
    (tmp_path / "file").write_text("")
    assert command.main(["--output", str(tmp_path / "file" / "out")]) == 1
    assert "set QUICKSTART_OUT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--seeds", "0"])
    assert "--seeds is 0" in capsys.readouterr().err


def test_output_comes_from_the_environment(tmp_path, monkeypatch):
    seen = []

    def stand_in(root, seeds, bases):
        seen.append((root, list(seeds), bases))
        return {"text": "done"}

    monkeypatch.setattr(command, "quickstart", stand_in)
    monkeypatch.setenv("QUICKSTART_OUT", str(tmp_path / "elsewhere"))
    assert command.main(["--seeds", "3"]) == 0
    monkeypatch.setattr(bases_module, "make_bases", lambda root: root / "own")
    assert command.main(["--from-scratch"]) == 0
    out = (tmp_path / "elsewhere").resolve()
    assert seen == [(out, [1, 2, 3], None), (out, [1], out / "own")]


def test_failed_stage_is_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise StageError("Teacher: SFT failed; its log is here")

    monkeypatch.setattr(command, "quickstart", fail)
    assert command.main(["--output", str(tmp_path / "out")]) == 1
    assert "Teacher: SFT failed" in capsys.readouterr().err
