"""Agreement with the official scorers: all figures of the fixtures, their upload files, and the join by key."""

import json
import random
import subprocess
import sys

import pytest

from tests.eval.scorers import FOLDERS, answer_rows, data_dir, expected, write_rows
from tinyllava_switchkd.eval.benchmarks import BENCHMARKS, BenchmarkFactory, Score, read_answers
from tinyllava_switchkd.eval.score import main, score_file

TOLERANCE = 1e-6


def run(name: str, file_name: str = "answers.jsonl") -> Score:
    return score_file(name, data_dir(name), data_dir(name) / file_name)


def close(figure):
    return pytest.approx(figure, abs=TOLERANCE)


def without(figures: dict, *names: str) -> dict:
    return {name: figure for name, figure in figures.items() if name not in names}


def test_the_ten_benchmarks_are_registered():
    assert set(BENCHMARKS) == set(FOLDERS)
    assert BenchmarkFactory("sqa").name == "scienceqa"
    assert all(BenchmarkFactory(name).name == name for name in BENCHMARKS)


def test_mme():
    score, official = run("mme"), expected("mme")["scores"]
    assert score.score == close(official["perception_over_20"])
    assert score.details["total"] == close(official["total"])
    assert score.details["total_over_28"] == close(official["total_over_28"])
    assert score.details["absent_subtasks"] == []
    others = 0
    for group in ("perception", "cognition"):
        assert score.details[group] == close(official[group]["total"])
        for name, figures in official[group]["tasks"].items():
            figures = {
                {"n_questions": "questions", "n_images": "images"}.get(key, key): v for key, v in figures.items()
            }
            assert score.details["subtasks"][name] == close(figures)
            others += figures["other"]
    assert score.fallback == others


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench(name):
    score, official = run(name), expected(name)
    figures, details = official["scores"], score.details
    assert score.score == details["circular"] == close(official["headline"]["circular_accuracy_vek_exact"])
    assert details["circular_human_reading"] == close(official["headline"]["circular_accuracy_human_reading"])
    assert details["circular_excluding_contested"] == close(figures["circular_excluding_contested_groups"]["accuracy"])
    assert (
        details["base_questions"] - len(details["contested"])
        == figures["circular_excluding_contested_groups"]["n_base"]
    )
    assert details["contested"] == official["contested_base_indices"]
    assert (score.total, details["base_questions"], score.split) == (official["n_rows"], official["n_base"], "dev")
    for ours, theirs, overall in (
        ("", "vek_circular", "circular"),
        ("_vanilla", "vek_vanilla_0_base_rows", "vanilla"),
        ("_vanilla_all_rows", "vek_vanilla_all_rows", "vanilla_all_rows"),
    ):
        assert details[overall] == close(figures[theirs]["Overall"])
        merged = details[f"l2_category{ours}"] | details[f"category{ours}"]
        assert merged == close(without(figures[theirs], "split", "Overall"))
    assert set(details["l2_category"]) <= {"AR", "CP", "FP-C", "FP-S", "LR", "RR"}
    for row in score.rows:
        theirs = official["rows"][str(row["question_id"])]
        assert (row["truth"], row["parsed"]) == (theirs["gt"], theirs["vek"])
        assert row["read_correct"] == theirs["human_reads_as_correct"]
    assert score.fallback == sum(row["vek"] is None for row in official["rows"].values())


def test_vqav2():
    score, official = run("vqav2"), expected("vqav2")
    assert score.split == "val"
    assert score.score == score.details["official_on_submission"]
    for ours, theirs, row_name in (
        ("official_on_submission", "vqa_official_on_llava_submission", "llava_submission"),
        ("official_raw", "vqa_official_raw", "raw"),
        ("m4c", "m4c_both_sides_normalised", "m4c"),
    ):
        suffix = "" if ours == "official_on_submission" else f"_{ours}"
        figures = official["scores"][theirs]
        assert score.details[ours] == close(figures["overall"])
        assert score.details[f"answer_type{suffix}"] == close(figures["perAnswerType"])
        if "perQuestionType" in figures:
            assert score.details[f"question_type{suffix}"] == close(figures["perQuestionType"])
        for row in score.rows:
            assert 100 * row[ours] == close(official["per_question"][row["question_id"]][row_name])


def test_vizwiz():
    score, official = run("vizwiz"), expected("vizwiz")
    assert score.split == "val"
    assert score.score == score.details["official_on_submission"]
    for ours, theirs, row_name in (
        ("official_on_submission", "vizwiz_official_on_llava_submission", "llava_submission"),
        ("official_raw", "vizwiz_official_raw", "raw"),
        ("m4c", "m4c_both_sides_normalised", "m4c"),
        (
            "official_on_submission_ascii_contractions",
            "vizwiz_official_on_llava_submission_ascii_contractions",
            None,
        ),
        ("official_raw_ascii_contractions", "vizwiz_official_raw_ascii_contractions", "raw_ascii"),
    ):
        suffix = "" if ours == "official_on_submission" else f"_{ours}"
        figures = official["scores"][theirs]
        assert score.details[ours] == close(figures["overall"])
        assert score.details[f"answer_type{suffix}"] == close(figures["perAnswerType"])
        for row in score.rows if row_name else ():
            assert 100 * row[ours] == close(official["per_image"][row["question_id"]][row_name])
    task = official["scores"]["unanswerability_if_answerable_means_text_not_unanswerable"]["raw"]
    assert score.details["unanswerable_average_precision"] == close(task["average_precision"])
    assert score.details["unanswerable_f1"] == close(task["f1_score"])
    declined = sum("unanswerable" in row["text"].lower() for row in answer_rows("vizwiz"))
    assert score.details["unanswerable_rate"] == close(100 * declined / 73)


def test_gqa():
    score, official = run("gqa"), expected("gqa")
    figures = official["scores"]
    assert score.score == close(figures["accuracy"])
    for name in ("binary", "open"):
        assert score.details[name] == close(figures[name])
    assert score.details["distribution"] == close(figures["distribution_lower_is_better"])
    for ours, theirs in (
        ("structural", "accuracyPerStructuralType"),
        ("semantic", "accuracyPerSemanticType"),
        ("steps", "accuracyPerSteps"),
        ("words", "accuracyPerLength"),
    ):
        assert score.details[ours] == close({name: figure["accuracy"] for name, figure in figures[theirs].items()})
    assert {row["question_id"]: row["correct"] for row in score.rows} == official["correct"]


def test_scienceqa():
    score, official = run("scienceqa"), expected("scienceqa")
    figures = official["scores"]
    assert score.score == score.details["image_accuracy"] == close(figures["img_accuracy"])
    assert score.details["accuracy"] == close(figures["accuracy"])
    assert (score.total, score.details["correct"]) == (figures["total"], figures["correct"])
    assert (score.details["image_total"], score.details["image_correct"]) == (
        figures["img_total"],
        figures["img_correct"],
    )
    ours = {
        row["question_id"]: {
            "parsed": row["parsed"],
            "gt": row["truth"],
            "correct": int(row["correct"]),
            "img": row["image"],
        }
        for row in score.rows
    }
    assert ours == official["per_question"]
    assert score.fallback == sum(row["parsed"] == "FAILED" for row in official["per_question"].values())


@pytest.mark.parametrize("file_name", ["answers.jsonl", "answers_tlf.jsonl"])
def test_mmmu(file_name):
    score, official = run("mmmu", file_name), expected("mmmu")
    figures = official["scores"]
    assert score.score == close(figures["accuracy"])
    assert score.details["correct"] == figures["correct"]
    for name in ("multiple_choice", "open"):
        assert score.details[name] == close(100 * figures[name]["correct"] / figures[name]["n"])
    assert score.details["subjects"] == close(
        {name: 100 * figure["acc"] for name, figure in figures["per_subject"].items()}
    )
    for name, accuracy in score.details["disciplines"].items():
        assert accuracy / 100 == pytest.approx(
            figures["printed_by_main_eval_only_3dp"][f"Overall-{name}"]["acc"], abs=5.1e-4
        )
    assert score.fallback == 0
    for row in score.rows:
        theirs = official["per_question"][row["question_id"]]
        assert row["correct"] == (theirs["judge"] == "Correct")
        if row["type"] == "multiple-choice":
            assert row["parsed"] == theirs["parsed"]
        elif file_name == "answers.jsonl":
            assert {str(value) for value in row["parsed"]} == {str(value) for value in theirs["parsed"]}


def test_textvqa():
    score, official = run("textvqa"), expected("textvqa")
    assert score.score == close(official["scores"]["accuracy"])
    assert score.total == official["scores"]["samples"]
    theirs = official["per_row_in_answers_order"]
    assert [(row["question_id"], 100 * row["accuracy"]) for row in score.rows] == [
        (row["question_id"], close(row["score"])) for row in theirs
    ]


def test_pope():
    score, official = run("pope"), expected("pope")["scores"]
    assert score.score == score.details["mean_f1"] == close(100 * official["mean_f1"])
    assert score.details["mean_accuracy"] == close(100 * official["mean_accuracy"])
    for name, figures in official["categories"].items():
        for figure in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
            assert score.details[name][figure] == close(100 * figures[figure])
        counts = ("TP", "FP", "TN", "FN")
        assert [score.details[name][count] for count in counts] == [figures[count] for count in counts]
        assert score.details[name]["questions"] == figures["n"]
    pooled = official["pooled"]
    assert score.details["pooled"]["accuracy"] == close(100 * pooled["accuracy"])
    assert score.details["pooled"]["f1"] == close(100 * pooled["f1"])
    assert score.details["pooled"]["TP"] == pooled["TP"]


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_rows_are_joined_by_key_and_never_by_position(name, tmp_path):
    rows = answer_rows(name)
    random.Random(1).shuffle(rows)
    shuffled = score_file(name, data_dir(name), write_rows(tmp_path / "answers.jsonl", rows))
    assert shuffled.to_dict() == run(name).to_dict()


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_missing_answers_are_counted_and_wrong(name, tmp_path):
    rows = answer_rows(name)
    whole = run(name)
    assert (whole.answered, whole.missing) == (whole.total, 0)
    part = score_file(name, data_dir(name), write_rows(tmp_path / "answers.jsonl", rows[: len(rows) // 2]))
    assert part.total == whole.total
    assert part.missing == whole.total - len(rows) // 2
    assert part.score < whole.score
    json.dumps(part.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "gqa", "mmmu"])
def test_json_submissions_equal_the_official_converters_byte_for_byte(name, tmp_path):
    path = tmp_path / "upload" / "submission.json"
    score_file(name, data_dir(name), data_dir(name) / "answers.jsonl", submission=path)
    assert path.read_text() == (data_dir(name) / "expected_submission.json").read_text()


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_mmbench_submission_has_the_official_cells(name, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    path = tmp_path / "submission.xlsx"
    score_file(name, data_dir(name), data_dir(name) / "answers.jsonl", submission=path)
    columns, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    cells = json.loads((data_dir(name) / "expected_submission.cells.json").read_text(encoding="utf-8"))
    assert list(columns) == cells["columns"]
    assert [list(row) for row in rows] == cells["rows"]


@pytest.mark.parametrize("name", ["mme", "scienceqa", "textvqa", "pope"])
def test_benchmarks_without_a_server_say_so(name, tmp_path):
    with pytest.raises(ValueError, match="no upload format"):
        score_file(name, data_dir(name), data_dir(name) / "answers.jsonl", submission=tmp_path / "upload.json")


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "gqa", "mmmu", "mmbench"])
def test_an_incomplete_submission_is_refused(name, tmp_path):
    answers = write_rows(tmp_path / "answers.jsonl", answer_rows(name)[:-2])
    path = tmp_path / ("upload.xlsx" if name == "mmbench" else "upload.json")
    with pytest.raises(ValueError, match=r"2 of \d+ questions have no answer .*--allow_missing"):
        score_file(name, data_dir(name), answers, submission=path)
    assert not path.exists()
    score_file(name, data_dir(name), answers, submission=path, allow_missing=True)
    assert path.exists()


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_command_prints_one_json_object(name, tmp_path, capsys):
    output = tmp_path / "results" / f"{name}.json"
    folder = data_dir(name)
    arguments = [name, "--data_dir", str(folder), "--answers_file", str(folder / "answers.jsonl")]
    status = main([*arguments, "--output", str(output)])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    printed = json.loads(out)
    keys = ["benchmark", "metric", "score", "split", "total", "answered", "missing", "fallback", "details"]
    assert list(printed) == keys
    assert printed["benchmark"] == name
    assert json.loads(output.read_text()) == printed == run(name).to_dict()


def test_command_imports_no_torch_and_writes_only_json_on_stdout():
    code = (
        "import sys; from tinyllava_switchkd.eval.score import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'openpyxl'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    folder = data_dir("mmbench")
    arguments = ["mmbench", "--data_dir", str(folder), "--answers_file", str(folder / "answers.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["benchmark"] == "mmbench"


def test_answers_keep_their_text(tmp_path):
    rows = [{"question_id": 7, "text": " \u2028No.\n", "prompt": [1]}]
    (answer,) = read_answers(write_rows(tmp_path / "a.jsonl", rows))
    assert (answer.question_id, answer.text, answer.prompt) == ("7", " \u2028No.\n", "")
