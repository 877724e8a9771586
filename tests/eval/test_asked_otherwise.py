"""Runs that differ from the default: limits, options, splits, judges, other runs' answers, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys

import pytest

from tests.eval.miniature import picture, read_lines, write_benchmark, write_checkpoint, write_lines, write_pope
from tests.eval.scorers import answer_rows, data_dir, write_rows
from tinyllava_switchkd.eval.benchmarks import BENCHMARKS, BenchmarkFactory, JudgeFactory, names, read_answers
from tinyllava_switchkd.eval.benchmarks.choices import read_choice
from tinyllava_switchkd.eval.cache import ResponseCache
from tinyllava_switchkd.eval.generate import Answerer
from tinyllava_switchkd.eval.run import main
from tinyllava_switchkd.eval.score import main as score_main
from tinyllava_switchkd.eval.score import score_file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-vlm")


def command(checkpoint, name, data, out, *more):
    common = [name, "--model_path", str(checkpoint), "--data_dir", str(data), "--output_dir", str(out)]
    return [*common, "--max_new_tokens", "2", *more]


def run_file(folder, name, **fields):
    (folder / "run.json").write_text(json.dumps({"benchmark": name, **fields}))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_limit_scores_the_questions_asked(name, tmp_path):
    """The score equals that of a folder with only these questions: questions that were not asked are not wrong."""
    folder = shutil.copytree(data_dir(name), tmp_path / "data")
    whole = score_file(name, folder, folder / "answers.jsonl")
    options = {"prompt_protocol": "llava"} if name.startswith("mmbench") else {}  # the fixture's prompts
    benchmark = BenchmarkFactory(name)
    benchmark.configure(options)
    questions = list(benchmark.questions(folder))
    limit = len(questions) // 2
    run_file(folder, name, split=whole.split, limit=limit, options=options)
    part = score_file(name, folder, folder / "answers.jsonl")
    assert part.asked == {"questions": limit, "of": len(questions), "limit": limit, **options}
    assert part.to_dict()["asked"] == part.asked and part.total == limit
    answered = {answer.key for answer in read_answers(folder / "answers.jsonl")}
    assert part.missing == sum(question.key not in answered for question in questions[:limit])
    kept = {(str(row["question_id"]), row["text"]) for row in part.rows}
    assert kept <= {(str(row["question_id"]), row["text"]) for row in whole.rows}
    run_file(folder, name, split=whole.split, limit=len(questions), options=options)
    assert score_file(name, folder, folder / "answers.jsonl").asked is None


def test_scienceqa_image_only(tmp_path):
    folder = shutil.copytree(data_dir("scienceqa"), tmp_path / "data")
    whole = score_file("scienceqa", folder, folder / "answers.jsonl")
    benchmark = BenchmarkFactory("scienceqa")
    benchmark.configure({"image_only": True})
    asked = list(benchmark.questions(folder))
    assert asked and all(question.images for question in asked) and len(asked) == whole.details["image_total"]
    run_file(folder, "scienceqa", split="test", options={"image_only": True})
    part = score_file("scienceqa", folder, folder / "answers.jsonl")
    assert part.score == whole.score and part.total == len(asked) and part.asked["image_only"] is True
    with pytest.raises(ValueError, match="POPE has no option --image_only"):
        BenchmarkFactory("pope").configure({"image_only": True})


@pytest.mark.parametrize("name", ["mmbench", "mmbench_cn"])
def test_the_option_none_is_an_option_unless_llava_asked(name, tmp_path):
    folder = shutil.copytree(data_dir(name), tmp_path / "data")
    official = score_file(name, folder, folder / "answers.jsonl")  # its rows say that "None" was not shown
    rows = [{key: value for key, value in row.items() if key != "option_char"} for row in answer_rows(name)]
    write_rows(folder / "answers.jsonl", rows)
    default = score_file(name, folder, folder / "answers.jsonl")
    assert default.score > official.score and default.details["options_named_none"] > 0
    run_file(folder, name, split="dev", options={"prompt_protocol": "llava"})
    assert score_file(name, folder, folder / "answers.jsonl").score == official.score
    benchmark = BenchmarkFactory(name)
    benchmark.configure({"prompt_protocol": "llava"})
    shown = {str(question.question_id): question.extra["option_char"] for question in benchmark.questions(folder)}
    llava = {str(row["question_id"]): row["option_char"] for row in answer_rows(name)}
    assert shown == llava  # the fixture's were made by LLaVA's own script


@pytest.mark.parametrize("missing", ["", "none", "None", "NONE", "nan", "NaN", "NA", "null"])
def test_llavas_prompt_stops_at_what_llava_takes_for_missing(tmp_path, missing):
    cells = {"index": "1", "hint": missing, "question": "How many?", "A": "one", "B": "no", "C": missing, "D": "two"}
    cells |= {"answer": "A", "image": "aW1hZ2U="}
    table = "".join("\t".join(line) + "\n" for line in (cells.keys(), cells.values()))
    (tmp_path / "mmbench_dev_20230712.tsv").write_text(table)
    benchmark = BenchmarkFactory("mmbench")
    benchmark.configure({"prompt_protocol": "llava"})
    [question] = benchmark.questions(tmp_path)
    assert question.logged_prompt == "How many?\nA. one\nB. no"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Option d", "D"),
        ("Choice: d", "D"),
        ("Answer is d", "D"),
        ("The correct option is c.", "C"),
        ("Not B", None),
        ("It is not A", None),
        ("It isn't (C).", None),
        ("Not A, but B", "B"),
        ("It is a dog", None),
    ],
)
def test_a_careful_reader(text, letter):
    assert read_choice(text, {"A": "red", "B": "blue", "C": "green", "D": "pink"}) == letter


def test_vqav2_is_of_the_split_that_has_all_answers(tmp_path):
    rows = [{"question_id": n, "image": f"{n}.jpg", "text": "What?"} for n in range(6)]
    write_lines(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", rows)
    write_lines(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2])
    upload = tmp_path / "upload.json"
    for count, split in ((6, "test"), (2, "test-dev")):
        answers = write_rows(tmp_path / "a.jsonl", [{"question_id": n, "text": "Yes"} for n in range(count)])
        score = score_file("vqav2", tmp_path, answers, submission=upload)
        assert (score.split, len(json.loads(upload.read_text()))) == (split, 6)
    answers = write_rows(tmp_path / "a.jsonl", [{"question_id": n, "text": "Yes"} for n in (1, 5, 9)])
    with pytest.raises(ValueError, match=r"test has 2 of 3, and not '9'. Name the split with --split"):
        score_file("vqav2", tmp_path, answers, submission=upload)


def test_vizwiz_finds_the_image_by_the_question_file(tmp_path):
    folder = shutil.copytree(data_dir("vizwiz"), tmp_path / "data")
    whole = score_file("vizwiz", folder, folder / "answers.jsonl")
    lines = read_lines(folder / "llava_val.jsonl")
    ids = {row["question_id"]: 1000 + number for number, row in enumerate(lines)}
    write_rows(folder / "llava_val.jsonl", [row | {"question_id": ids[row["question_id"]]} for row in lines])
    rows = [row | {"question_id": ids[row["question_id"]]} for row in answer_rows("vizwiz")]
    assert score_file("vizwiz", folder, write_rows(folder / "answers.jsonl", rows)).score == whole.score
    stems = [row | {"question_id": row["question_id"].removesuffix(".jpg")} for row in answer_rows("vizwiz")]
    assert score_file("vizwiz", folder, write_rows(folder / "answers.jsonl", stems)).score == whole.score


def test_textvqa_without_its_tokens():
    with_tokens = list(BenchmarkFactory("textvqa").questions(data_dir("textvqa")))
    without = list(BenchmarkFactory("textvqa_noocr").questions(data_dir("textvqa")))
    assert "textvqa_noocr" in names() and len(without) == len(with_tokens)
    assert all("Reference OCR token" not in question.prompt for question in without)
    assert without[0].prompt.split("\n") == [
        with_tokens[0].prompt.split("\n")[0],
        with_tokens[0].prompt.split("\n")[-1],
    ]


def test_mmmu_with_several_pictures(checkpoint, tmp_path):
    data = write_benchmark("mmmu", tmp_path)
    samples = json.loads((data / "anns_for_eval.json").read_text())
    [sample] = [sample for sample in samples if sample["id"] == "validation_Psychology_3"]
    sample["img_path"] = ["p1.png", "p2.png"]
    (data / "anns_for_eval.json").write_text(json.dumps(samples))
    for number, name in enumerate(sample["img_path"]):
        picture(data / "all_images" / name, number)

    def asked(mode):
        benchmark = BenchmarkFactory("mmmu")
        benchmark.configure({"multi_image": mode})
        return {question.question_id: question for question in benchmark.questions(data)}

    assert [path.name for path in asked("first")[sample["id"]].images] == ["p1.png"]
    assert [path.name for path in asked("all")[sample["id"]].images] == ["p1.png", "p2.png"]
    assert sample["id"] not in asked("skip")
    scores = {}
    for mode in ("all", "skip"):
        flags = ("--multi_image", mode, "--score", str(tmp_path / f"{mode}.json"))
        assert main(command(checkpoint, "mmmu", data, tmp_path / mode, *flags)) == 0
        scores[mode] = json.loads((tmp_path / f"{mode}.json").read_text())
    assert scores["all"]["missing"] == scores["skip"]["missing"] == 0
    assert scores["skip"]["details"]["skipped"] == len(asked("all")) - len(asked("skip")) > 0
    assert scores["skip"]["fallback"] > 0 and scores["all"]["run"]["options"] == {"multi_image": "all"}
    with pytest.raises(SystemExit):
        main(command(checkpoint, "mmmu", data, tmp_path / "x", "--multi_image", "none"))


def test_a_judge_reads_what_no_rule_can(tmp_path):
    folder = data_dir("scienceqa")
    plain = score_file("scienceqa", folder, folder / "answers.jsonl")
    seen = []

    def first_choice(reading):
        seen.append(reading)
        return next(iter(reading.choices))

    with JudgeFactory.override("first", first_choice):
        judged = score_file("scienceqa", folder, folder / "answers.jsonl", judge="first")
    assert judged.fallback == plain.fallback == len(seen) == judged.judge["read"] > 0
    assert judged.judge["share_of_answers"] == pytest.approx(100 * len(seen) / judged.answered)
    assert "judge" not in plain.to_dict() and judged.to_dict()["judge"]["name"] == "first"
    with (
        JudgeFactory.override("odd", lambda reading: "?"),
        pytest.raises(ValueError, match=r"The judge read '\?' in .*, which is none of A, B"),
    ):
        score_file("scienceqa", folder, folder / "answers.jsonl", judge="odd")
    with pytest.raises(ValueError, match="Unknown judge 'gpt'"):
        score_file("scienceqa", folder, folder / "answers.jsonl", judge="gpt")


def test_answers_of_another_folder_are_not_generated_again(checkpoint, tmp_path, monkeypatch, caplog):
    data = write_pope(tmp_path / "pope", images=2)
    cache = ("--response_cache", str(tmp_path / "cache"))
    assert main(command(checkpoint, "pope", data, tmp_path / "a", *cache)) == 0
    copy = shutil.copytree(data, tmp_path / "elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "load", None)  # nothing is loaded
        assert main(command(checkpoint, "pope", copy, tmp_path / "b", *cache)) == 0
    texts = [[row["text"] for row in read_lines(tmp_path / folder / "answers.jsonl")] for folder in "ab"]
    assert texts[0] == texts[1]
    other = write_checkpoint(tmp_path / "other", seed=1)
    caplog.clear()
    assert main(command(other, "pope", data, tmp_path / "c", *cache)) == 0
    assert "are taken from" not in caplog.text
    picture(copy / "val2014" / "0.png", 5)  # another picture under the same name
    assert main(command(checkpoint, "pope", copy, tmp_path / "d", *cache)) == 0
    assert "3 of 6 answers are taken from" in caplog.text


def test_a_response_cache_without_room_does_not_end_the_evaluation(checkpoint, tmp_path, monkeypatch, caplog, capsys):
    data = write_pope(tmp_path / "pope", images=2)
    cache = ("--response_cache", str(tmp_path / "cache"))
    connect = sqlite3.connect

    def small(*args, **kwargs):  # the file may not grow beyond what is in it
        file = connect(*args, **kwargs)
        file.execute("CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, text TEXT NOT NULL)")
        file.execute("PRAGMA max_page_count = 3")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        patch.setattr(ResponseCache, "_key", lambda self, task: task.prompt * 100)
        assert main(command(checkpoint, "pope", data, tmp_path / "a", *cache, "--batch_size", "1")) == 0
    assert "is no longer written to: database or disk is full" in caplog.text
    assert len(read_lines(tmp_path / "a" / "answers.jsonl")) == 18
    (tmp_path / "folder" / "responses.sqlite").mkdir(parents=True)
    for name, reason in (("folder", "unable to open"), ("text", "is not a response cache")):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / "responses.sqlite").write_text("no data base, but a text" * 50)
        assert main(command(checkpoint, "pope", data, tmp_path / "b", "--response_cache", str(tmp_path / name))) == 1
        said = capsys.readouterr().err
        assert reason in said and "name another folder" in said


def test_the_checkpoint_is_read_once_and_warns_once(checkpoint, tmp_path, monkeypatch, caplog):
    from tinyllava_switchkd.eval import generate

    calls = []
    read = generate.read_config
    monkeypatch.setattr(generate, "read_config", lambda folder: calls.append(folder) or read(folder))
    data = write_pope(tmp_path / "pope", images=1)
    assert (
        main(command(checkpoint, "pope", data, tmp_path / "out", "--conv_mode", "llama", "--batch_size", "auto")) == 0
    )
    assert len(calls) == 1
    assert caplog.text.count("was trained with the conversation template") == 1


def test_a_garbage_line_is_named_with_its_remedy(checkpoint, tmp_path, capsys):
    data = write_pope(tmp_path / "pope", images=1)
    out = tmp_path / "out"
    assert main(command(checkpoint, "pope", data, out, "--limit", "2")) == 0
    (out / "answers.part-0.jsonl").write_text("oops\n")
    assert main(command(checkpoint, "pope", data, out)) == 1
    error = capsys.readouterr().err
    assert "answers.part-0.jsonl, line 1: not valid JSON" in error and "delete the line" in error


def test_a_folder_for_a_file(tmp_path, capsys):
    folder = data_dir("pope")
    assert score_main(["pope", "--data_dir", str(folder), "--answers_file", str(folder)]) == 1
    assert f"The answers file {folder} is a folder; name a file." in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly():
    folder = data_dir("vqav2")
    words = [sys.executable, "-m", "tinyllava_switchkd.eval.score", "vqav2", "--data_dir", str(folder)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*words, "--answers_file", str(folder / "answers.jsonl")], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.stderr == ""
