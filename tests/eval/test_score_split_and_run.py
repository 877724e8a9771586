"""The data that the answers belong to, if a folder holds several splits, and how the answers were made."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.eval.scorers import answer_rows, data_dir, write_rows
from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory
from tinyllava_switchkd.eval.score import main, score_file

TABLES = {
    "mmbench": ("mmbench_dev_20230712.tsv", "MMBench_TEST_EN_legacy.tsv", "MMBench_DEV_EN_V11.tsv"),
    "mmbench_cn": ("mmbench_dev_cn_20231003.tsv", "MMBench_TEST_CN_legacy.tsv", "MMBench_DEV_CN_V11.tsv"),
}
SHIFT = 2000  # added to an index to make it another question's


def write_table(source: Path, target: Path, shift: int = 0, bases: int | None = None, answers: bool = True) -> Path:
    """A copy of a table with other indices, with the first questions only, or without its answers."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    kept = sorted({int(row["index"]) % 1_000_000 for row in rows})[:bases]
    rows = [row | {"index": int(row["index"]) + shift} for row in rows if int(row["index"]) % 1_000_000 in kept]
    columns = [column for column in rows[0] if answers or column != "answer"]
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | {"split": "dev" if answers else "test"} for row in rows)
    return target


@pytest.mark.parametrize("name", TABLES)
def test_mmbench_takes_the_table_that_the_answers_are_of(name, tmp_path):
    dev, test, _ = TABLES[name]
    folder = tmp_path / "data"
    shutil.copytree(data_dir(name), folder)
    write_table(folder / dev, folder / test, shift=SHIFT, answers=False)
    whole = score_file(name, data_dir(name), data_dir(name) / "answers.jsonl")
    both = score_file(name, folder, folder / "answers.jsonl")
    assert both.to_dict() == whole.to_dict()
    assert both.details["table"] == dev
    # By default dev's questions are asked.
    assert next(iter(BenchmarkFactory(name).questions(folder))).question_id < SHIFT
    assert next(iter(BenchmarkFactory(name).questions(folder, "test"))).question_id > SHIFT

    rows = [row | {"question_id": row["question_id"] + SHIFT} for row in answer_rows(name)]
    answers = write_rows(tmp_path / "test.jsonl", rows)
    with pytest.raises(ValueError, match=rf"{test} has no answers \(a test table\)"):
        score_file(name, folder, answers)
    score = score_file(name, folder, answers, submission=tmp_path / "upload.xlsx")
    assert (score.score, score.split, score.total, score.missing) == (None, "test", len(rows), 0)
    with pytest.raises(ValueError, match=rf"is unknown: it is not in .*{dev}"):
        score_file(name, folder, answers, split="dev")


def test_mmbench_answers_that_fit_both_splits(tmp_path, capsys):
    dev, test, _ = TABLES["mmbench"]
    folder = tmp_path / "data"
    shutil.copytree(data_dir("mmbench"), folder)
    write_table(folder / dev, folder / test, bases=5, answers=False)
    rows = answer_rows("mmbench")
    assert score_file("mmbench", folder, folder / "answers.jsonl").details["table"] == dev  # dev alone has them all
    first = {int(row["index"]) for row in csv.DictReader((folder / test).open(newline=""), delimiter="\t")}
    few = write_rows(tmp_path / "few.jsonl", [row for row in rows if row["question_id"] in first][:-1])
    arguments = ["mmbench", "--data_dir", str(folder), "--answers_file", str(few)]
    assert main(arguments) == 1
    assert f"The answers fit {dev} and {test} in {folder}; choose one with --split." in capsys.readouterr().err
    assert main([*arguments, "--split", "dev"]) == 0
    assert json.loads(capsys.readouterr().out)["details"]["table"] == dev
    assert main([*arguments, "--split", "val"]) == 1
    assert "MMBench has no split 'val', only dev, test." in capsys.readouterr().err


def test_mmbench_prefers_the_papers_table_among_versions(tmp_path):
    dev, _, newer = TABLES["mmbench"]
    folder = tmp_path / "data"
    shutil.copytree(data_dir("mmbench"), folder)
    write_table(folder / dev, folder / newer, bases=20)
    rows = answer_rows("mmbench")
    few = write_rows(tmp_path / "few.jsonl", rows[:8])
    assert score_file("mmbench", folder, few).details["table"] == dev
    (folder / dev).unlink()
    assert score_file("mmbench", folder, few).details["table"] == newer


def test_a_score_has_the_run_beside_its_answers(tmp_path, capsys):
    folder = tmp_path / "answers"
    folder.mkdir()
    shutil.copy(data_dir("gqa") / "answers.jsonl", folder)
    arguments = ["gqa", "--data_dir", str(data_dir("gqa")), "--answers_file", str(folder / "answers.jsonl")]
    run = {"benchmark": "gqa", "split": "testdev", "model_name": "tiny-vlm", "decoding": {"do_sample": False}}
    (folder / "run.json").write_text(json.dumps(run))
    assert main([*arguments, "--output", str(tmp_path / "score.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"] == run
    assert json.loads((tmp_path / "score.json").read_text()) == printed
    for other in ({"benchmark": "pope"}, None):  # of another benchmark, or none at all
        (folder / "run.json").write_text(json.dumps(other)) if other else (folder / "run.json").unlink()
        assert main(arguments) == 0
        assert "run" not in json.loads(capsys.readouterr().out)
    (folder / "run.json").write_text("{")
    assert main(arguments) == 1
    assert "run.json, line 1: not valid JSON" in capsys.readouterr().err


def test_the_run_says_the_split(tmp_path):
    """Answers to fewer questions than both tables have: the run knows which table was asked."""
    dev, test, _ = TABLES["mmbench"]
    folder = tmp_path / "data"
    shutil.copytree(data_dir("mmbench"), folder)
    write_table(folder / dev, folder / test, answers=False)
    answers = folder / "answers.jsonl"
    (folder / "run.json").write_text(json.dumps({"benchmark": "mmbench", "split": "test"}))
    score = score_file("mmbench", folder, answers, submission=tmp_path / "upload.xlsx")
    assert (score.score, score.split, score.run["split"]) == (None, "test", "test")
    (folder / "run.json").write_text(json.dumps({"benchmark": "mmbench", "split": "dev"}))
    assert score_file("mmbench", folder, answers).score > 0
