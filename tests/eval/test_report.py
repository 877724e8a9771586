"""The report: unrounded averages, incomplete scores marked as such, and the paper's rows."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tinyllava_switchkd.eval.benchmarks import Score
from tinyllava_switchkd.eval.report import main
from tinyllava_switchkd.eval.results import paper_rows, read_results
from tinyllava_switchkd.visualize.paper import AVG7, AVG10, COLUMNS

# Benchmark -> score, split, questions. The scores round up, so an average of rounded cells would differ.
SCORES: dict[str, tuple[float, str, int]] = {
    "mme": (61.449, "test", 2_374),
    "mmbench": (58.849, "dev", 4_377),
    "mmbench_cn": (54.149, "dev", 4_329),
    "vqav2": (74.749, "test-dev", 107_394),
    "gqa": (58.249, "testdev", 12_578),
    "scienceqa": (59.049, "test", 4_241),
    "mmmu": (33.549, "val", 900),
    "textvqa": (49.149, "val", 5_000),
    "vizwiz": (28.849, "test", 8_000),
    "pope": (85.649, "test", 8_910),
}


def write_score(folder: Path, benchmark: str, **changes: Any) -> Path:
    score, split, total = SCORES[benchmark]
    document = {"benchmark": benchmark, "metric": "accuracy", "score": score, "split": split, "total": total}
    document |= {"answered": total, "missing": 0, "fallback": 0, "details": {}, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A folder with all ten scores."""
    for benchmark in SCORES:
        write_score(tmp_path / "student", benchmark)
    return tmp_path / "student"


def cells(text: str, label: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"{label}  ")]
    return re.split(r"\s{2,}", line)


def run(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_averages_are_taken_over_unrounded_scores(student: Path, capsys: pytest.CaptureFixture) -> None:
    found = cells(run(capsys, student), "student")
    scores = [score for score, _, _ in SCORES.values()]
    assert found[1:11] == [f"{score:.1f}" for score in scores]
    seven = [SCORES[name][0] for name, column in COLUMNS.items() if column in AVG7]
    assert found[11:] == [f"{sum(seven) / 7:.1f}", f"{sum(scores) / 10:.1f}"]
    assert found[12] != f"{sum(round(score, 1) for score in scores) / 10:.1f}"


def test_average_without_all_scores_has_no_value(student: Path, capsys: pytest.CaptureFixture) -> None:
    (student / "pope.json").unlink()
    text = run(capsys, student)
    assert cells(text, "student")[-2:] == ["52.8", "– (9/10)"]
    assert "only k of the n benchmarks of the average have a score" in text
    (student / "mme.json").unlink()
    assert cells(run(capsys, student), "student")[-2:] == ["– (6/7)", "– (8/10)"]


def test_val_scores_enter_averages_only_with_the_flag(student: Path, capsys: pytest.CaptureFixture) -> None:
    write_score(student, "vqav2", split="val", total=214_354, answered=214_354)
    write_score(student, "vizwiz", split="val", total=4_319, answered=4_319)
    text = run(capsys, student)
    assert cells(text, "student")[-2:] == ["– (6/7)", "– (8/10)"]
    assert "74.7 val" in text and "28.8 val" in text and "left out of the averages" in text
    text = run(capsys, student, "--include_val")
    assert cells(text, "student")[-2:] == ["52.8 val", "56.4 val"]
    assert "--include_val: they are in the averages here" in text


def test_test_score_replaces_val(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_score(tmp_path / "more", "vizwiz", split="val", score=99.0, total=4_319, answered=4_319)
    for sources in ([f"S={tmp_path / 'more'}", f"S={student}"], [f"S={student}", f"S={tmp_path / 'more'}"]):
        text = run(capsys, *sources)
        assert "28.8" in text and "99.0" not in text and cells(text, "S")[-2] == "52.8"


@pytest.mark.parametrize("name", ["mmbench-test.json", "a.json"])
def test_another_split_in_the_same_folder_is_noted(student: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    other = write_score(student, "mmbench", split="test", score=11.0, total=6_666, answered=6_666)
    other.rename(student / name)  # `SPLIT=test` writes the first name
    write_score(student, "mmbench")
    text = run(capsys, student)
    assert cells(text, "student")[2] == "58.8"
    assert "Scores on another split, which the table does not use (student, MMB: 11.0 on test)." in text


def test_marks_of_scores_are_explained(student: Path, capsys: pytest.CaptureFixture) -> None:
    write_score(student, "pope", answered=8_907, missing=3, fallback=7)
    write_score(student, "gqa", total=75, answered=75)
    text = run(capsys, student)
    assert "85.6*" in text and "58.2‡" in text
    assert cells(text, "student")[-2:] == ["52.8‡", "56.4‡*"]
    assert "questions without an answer counted as wrong (student, POPE: 3 of 8,910)" in text
    assert "not the benchmark's official number of questions (student, GQA: 75)" in text
    assert "no rule of the protocol could read (student, POPE: 7)" in text


def test_a_judges_part_is_marked(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    judge = {"name": "gpt", "asked": 900, "read": 880, "share_of_answers": 20.1}
    write_score(student, "mmbench", judge=judge)
    text = run(capsys, student, "--output_dir", tmp_path / "out")
    assert cells(text, "student")[2] == "58.8¶" and cells(text, "student")[-2:] == ["52.8¶", "56.4¶"]
    note = "a judge read answers that no rule of the protocol could (student, MMB: gpt, 20.1 % of the answers)"
    assert f"¶: {note}" in text
    assert r"58.8$^{\P}$" in (tmp_path / "out" / "report.tex").read_text()
    row = {"benchmark": "mmbench", "question_id": 1, "group": 1, "cluster": "a", "correct": True}
    (student / "mmbench.rows.jsonl").write_text(json.dumps(row))
    compared = run(capsys, "--compare", f"SFT={student / 'mmbench.json'}", student / "mmbench.json")
    assert "a judge read answers that no rule of the protocol could (SFT, MMB: gpt, 20.1 %" in compared


def test_a_score_file_is_read_completely(tmp_path: Path) -> None:
    judge, asked = {"name": "gpt", "share_of_answers": 1.0}, {"questions": 3, "of": 9, "limit": 3}
    score = Score("pope", "mean_f1", 60.0, "test", 3, 2, 1, {"f1": 60.0}, [], 1.5, asked, judge, {"model_name": "s"})
    (tmp_path / "pope.json").write_text(json.dumps(score.to_dict()))
    [row] = read_results([str(tmp_path)])
    assert row.results["POPE"].to_dict() == score.to_dict()


def test_scores_of_different_checkpoints_are_noted(student: Path, capsys: pytest.CaptureFixture) -> None:
    write_score(student, "pope", run={"model": "student", "checkpoint_digest": "sha256:aa"})
    write_score(student, "gqa", run={"model": "student", "checkpoint_digest": "sha256:bb"})
    assert "student: the scores come from different checkpoints (sha256:bb, sha256:aa)" in run(capsys, student)


def test_paper_rows_beside(student: Path, capsys: pytest.CaptureFixture) -> None:
    text = run(capsys, student, "--with_paper")
    assert cells(text, "Switch-KD (Qwen2.5-0.5B)")[1:] == (
        ["66.8", "63.5", "57.8", "79.6", "61.6", "57.9", "29.8", "52.3", "44.9", "87.3", "57.8", "60.1"]
    )
    assert "Qwen-VL-Chat (Qwen-7B)" in text and "– (9/10)" in text
    assert "arXiv 2604.14629v1, Table 1" in text


@pytest.mark.parametrize("row", paper_rows(), ids=lambda row: row.label)
def test_paper_averages_agree_with_its_cells(row: Any) -> None:
    for name, columns in (("Avg7", AVG7), ("Avg10", AVG10)):
        printed = row.average(name, False)
        if printed.found < printed.wanted:
            assert printed.value is None
        else:
            assert printed.value == pytest.approx(sum(row.scores[column] for column in columns) / len(columns), abs=0.1)


def test_files_of_a_report(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = {"model": "tiny_llava/student_1", "decoding": {"do_sample": False, "max_new_tokens": 128}}
    for benchmark in SCORES:
        write_score(student, benchmark, run=settings)
    write_score(student, "vizwiz", split="val", total=4_319, answered=4_319, run=settings)
    out = tmp_path / "out"
    text = run(capsys, student, "--with_paper", "--output_dir", out)
    assert text.startswith("Model ")
    names = ["radar.png", "radar.svg", "report.csv", "report.md", "report.tex"]
    assert sorted(path.name for path in out.iterdir()) == names

    with (out / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own, paper = rows[0], {row["model"]: row for row in rows[1:]}
    assert own["model"] == "student_1" and own["source"] == "own" and len(rows) == 12
    assert float(own["MMB"]) == 58.849 and own["VizWiz split"] == "val" and own["VizWiz marks"] == "val"
    assert (own["Avg7"], own["Avg7 scores"], own["Avg10"], own["Avg10 scores"]) == ("", "6/7", "", "9/10")
    assert paper["Switch-KD (Qwen2.5-0.5B)"]["Avg10"] == "60.1"

    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert "| student\\_1 | 61.4 | 58.8 |" in markdown and "28.8 val" in markdown and "– (9/10)" in markdown
    assert "| student\\_1 | vizwiz | accuracy | 28.85 | val | 4,319 | 4,319 | 0 |" in markdown
    assert "- decoding.max\\_new\\_tokens: 128" in markdown
    widths = {line.count(" | ") for line in markdown.split("\n\n")[0].splitlines()}
    assert len(widths) == 1

    latex = (out / "report.tex").read_text(encoding="utf-8")
    assert r"student\_1 & 61.4 & 58.8" in latex and r"28.8$^{\mathrm{val}}$" in latex and r"-- (9/10) \\" in latex
    body = latex[latex.index(r"\toprule") : latex.index(r"\bottomrule")]
    assert {line.count(" & ") for line in body.splitlines() if line.endswith(r"\\")} == {12}
    drawing = (out / "radar.svg").read_text(encoding="utf-8")
    assert "<!-- student_1 -->" in drawing and "<!-- Switch-KD (Qwen2.5-0.5B), paper -->" in drawing
    assert "No axis Domain-specific: VizWiz (student_1: val" in drawing  # it enters only with the flag

    run(capsys, student, "--include_val", "--output_dir", out, "--format", "markdown")
    assert "<!-- VizWiz: val split -->" in (out / "radar.svg").read_text(encoding="utf-8")


def test_what_runs_share_is_listed_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shared = {"model_name": "vlm", "checkpoint_digest": "sha256:1", "limit": None}
    for name, split, tokens in (("gqa", "testdev", 128), ("mmmu", "val", 1024)):
        run_of = shared | {"split": split, "decoding": {"num_beams": 1, "max_new_tokens": tokens}}
        write_score(tmp_path, name, run=run_of)
    text = run(capsys, tmp_path, "--format", "markdown")
    assert text.count("sha256:1") == 1
    assert "- decoding.num\\_beams: 1\n" in text and "limit" not in text
    assert "| Benchmark | split | decoding.max\\_new\\_tokens |" in text
    assert "| GQA | testdev | 128 |\n| MMMU | val | 1024 |\n" in text


def test_formats_are_printed_without_a_folder(student: Path, capsys: pytest.CaptureFixture) -> None:
    text = run(capsys, student, "--format", "csv,latex")
    assert text.startswith("model,source,MME") and r"\begin{tabular}{lrrrrrrrrrrrr}" in text


def test_latex_escapes_a_models_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_score(tmp_path, "pope")
    text = run(capsys, f"50%_a&b\\c^={path}", "--format", "latex")
    assert r"50\%\_a\&b\textbackslash{}c\textasciicircum{}" in text


def test_few_benchmarks_make_a_table_but_no_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    write_score(tmp_path / "a", "pope")
    text = run(capsys, tmp_path / "a", "--output_dir", tmp_path / "out", "--format", "terminal")
    assert text.splitlines()[0].split() == ["Model", "POPE", "Avg7", "Avg10"]
    assert cells(text, "a") == ["a", "85.6", "– (0/7)", "– (1/10)"]
    assert "No radar chart: A radar chart needs three axes" in caplog.text and not (tmp_path / "out").exists()


def test_labels_and_order(tmp_path: Path, student: Path) -> None:
    write_score(tmp_path / "results" / "b", "pope")
    write_score(tmp_path / "results" / "a", "pope", run={"model": "checkpoints/sft/"})
    (tmp_path / "results" / "a" / "run.json").write_text("{}")  # other files are passed over
    (tmp_path / "results" / "b" / "list.json").write_text("[]")
    assert [row.label for row in read_results([str(tmp_path / "results")])] == ["sft", "b"]
    sources = [f"Teacher={student / 'pope.json'}", str(student / "gqa.json"), f"Teacher={student / 'gqa.json'}"]
    rows = read_results(sources)
    assert [row.label for row in rows] == ["Teacher", "student"]
    assert list(rows[0].scores) == ["POPE", "GQA"] and list(rows[0].results) == ["GQA", "POPE"]


def test_own_benchmark_gets_a_column(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_score(tmp_path / "a", "pope")
    path = tmp_path / "a" / "colours.json"
    path.write_text(json.dumps({"benchmark": "colours", "score": 12.5, "split": "test", "total": 8}))
    text = run(capsys, tmp_path / "a")
    assert text.splitlines()[0].split() == ["Model", "POPE", "colours", "Avg7", "Avg10"]
    assert cells(text, "a")[1:3] == ["85.6", "12.5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"pope\.json, line 1: not valid JSON"),
        ("{}", r"pope\.json is not a score file: it has no 'benchmark' and 'score'"),
        ('{"benchmark": "pope", "score": 870}', r"pope\.json: the score is 870, not a number on 0-100"),
        ('{"benchmark": "pope", "score": "87"}', r"the score is '87', not a number"),
        ('{"benchmark": "pope", "score": 8, "total": -1}', r"'total' is -1, not a count"),
        ('{"benchmark": "pope", "score": 8, "run": []}', r"'run' is a JSON list, not an object"),
    ],
)
def test_bad_score_file(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "pope.json"
    path.write_text(content)
    assert main([str(path)]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_bad_arguments(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def error(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    assert "Nothing to report" in error()
    assert "There is no score file or folder" in error(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "There is no score file in" in error(tmp_path / "empty")
    assert "--format is 'pdf'; it lists some of terminal, markdown, csv, latex" in error(student, "--format", "pdf")
    twice = error(student, student / "pope.json")
    assert twice.count("pope.json") == 2 and "both student's score on pope (test)" in twice


def test_score_file_without_a_score_is_skipped(student: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_score(student, "vizwiz", score=None)
    [row] = read_results([str(student)])
    assert "VizWiz" not in row.scores and "is not public" in caplog.text
