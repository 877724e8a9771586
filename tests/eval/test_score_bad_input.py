"""Bad input: one sentence with the file and the line, and exit status 1; nothing is guessed."""

import csv
import json
import shutil

import pytest

from tests.eval.scorers import FOLDERS, answer_rows, data_dir, write_rows
from tinyllava_switchkd.eval.score import main, score_file

NAMES = sorted(FOLDERS)


def fail(capsys, *arguments) -> str:
    """Run the command, which must fail with one line on stderr and nothing on stdout."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def score_lines(capsys, name, path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return fail(capsys, name, "--data_dir", data_dir(name), "--answers_file", path)


@pytest.fixture
def copy_of(tmp_path):
    """A function that copies a fixture folder, to be damaged."""

    def copy(name):
        return shutil.copytree(data_dir(name), tmp_path / "data" / FOLDERS[name])

    return copy


def test_unknown_benchmark(capsys):
    message = fail(capsys, "mmvet", "--data_dir", ".", "--answers_file", "a.jsonl")
    assert "Unknown benchmark 'mmvet'" in message and "pope" in message


def test_missing_files(capsys, tmp_path):
    answers = data_dir("pope") / "answers.jsonl"
    assert "nowhere.jsonl does not exist" in fail(
        capsys, "pope", "--data_dir", data_dir("pope"), "--answers_file", tmp_path / "nowhere.jsonl"
    )
    assert "nowhere does not exist" in fail(
        capsys, "pope", "--data_dir", tmp_path / "nowhere", "--answers_file", answers
    )


@pytest.mark.parametrize("name", NAMES)
def test_empty_data_folder(name, capsys, tmp_path):
    answers = data_dir(name) / "answers.jsonl"
    message = fail(capsys, name, "--data_dir", tmp_path, "--answers_file", answers)
    assert str(tmp_path) in message and "expected" in message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"question_id": 1, "text": "Ye', "line 2: not valid JSON"),
        ("[1]", "line 2: a JSON list, not an object"),
        ('{"question_id": 1}', "line 2: no 'text'"),
        ('{"text": "yes"}', "line 2: no 'question_id'"),
        ('{"question_id": 1, "text": null}', "line 2: the text of question 1 is None, not a string"),
        ('{"question_id": null, "text": ""}', "line 2: the question_id None is neither"),
    ],
)
def test_malformed_answers(line, complaint, capsys, tmp_path):
    path = tmp_path / "answers.jsonl"
    first = json.dumps(answer_rows("pope")[0])
    assert f"{path}, {complaint}" in score_lines(capsys, "pope", path, first, line)


def test_empty_answers_file(capsys, tmp_path):
    assert "holds no answers" in score_lines(capsys, "pope", tmp_path / "answers.jsonl", "", "")


def test_answers_in_another_encoding(capsys, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"question_id": 1, "text": "caf\xe9"}')
    assert "is not UTF-8" in fail(capsys, "pope", "--data_dir", data_dir("pope"), "--answers_file", path)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_question(name, capsys, tmp_path):
    rows = answer_rows(name)
    rows[1] = rows[1] | {"question_id": "no/such.jpg"}
    path = write_rows(tmp_path / "answers.jsonl", rows)
    message = fail(capsys, name, "--data_dir", data_dir(name), "--answers_file", path)
    assert f"{path}, line 2" in message and "no/such.jpg" in message and "unknown" in message


@pytest.mark.parametrize("name", NAMES)
def test_second_answer(name, capsys, tmp_path):
    rows = answer_rows(name)
    path = write_rows(tmp_path / "answers.jsonl", [*rows, rows[3]])
    message = fail(capsys, name, "--data_dir", data_dir(name), "--answers_file", path)
    assert f"{path}, line {len(rows) + 1}" in message
    assert "second answer" in message or "one answer too many" in message


def test_ground_truth_that_is_no_json(capsys, copy_of):
    folder = copy_of("gqa")
    (folder / "data" / "testdev_balanced_questions.json").write_text('{"1": {}\n"2"', encoding="utf-8")
    message = fail(capsys, "gqa", "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert "testdev_balanced_questions.json, line 2: not valid JSON" in message


def test_ground_truth_without_its_fields(capsys, copy_of):
    folder = copy_of("vizwiz")
    (folder / "val.json").write_text(json.dumps([{"image": "VizWiz_val_00000000.jpg"}]), encoding="utf-8")
    rows = write_rows(folder / "answers.jsonl", answer_rows("vizwiz")[:1])
    message = fail(capsys, "vizwiz", "--data_dir", folder, "--answers_file", rows)
    assert "val.json, image VizWiz_val_00000000.jpg: no 'answers'" in message


def test_vqa_accuracy_needs_ten_annotators(capsys, copy_of):
    folder = copy_of("textvqa")
    path = folder / "TextVQA_0.5.1_val.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["data"][0]["answers"].pop()
    path.write_text(json.dumps(data), encoding="utf-8")
    message = fail(capsys, "textvqa", "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert "needs the answers of 10 annotators" in message


def test_pope_labels_of_another_version_are_noticed(capsys, copy_of):
    folder = copy_of("pope")
    path = folder / "coco" / "coco_pope_random.json"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[1:]), encoding="utf-8")
    message = fail(capsys, "pope", "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert "different versions of POPE" in message


def test_pope_answers_of_another_version_are_noticed(capsys, tmp_path):
    rows = answer_rows("pope")
    rows[0]["prompt"] = "Is there a unicorn in the image?"
    path = write_rows(tmp_path / "answers.jsonl", rows)
    message = fail(capsys, "pope", "--data_dir", data_dir("pope"), "--answers_file", path)
    assert f"{path}, line 1" in message and "another version" in message


def test_more_pope_labels_than_questions_do_no_harm(copy_of):
    """The 3,000-row labels with LLaVA's 2,910 questions: positions shift, keys do not."""
    folder = copy_of("pope")
    path = folder / "coco" / "coco_pope_random.json"
    extra = {"question_id": 0, "image": "COCO_val2014_000000063252.jpg", "text": "Is there a unicorn?", "label": "no"}
    path.write_text(json.dumps(extra) + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    score = score_file("pope", folder, folder / "answers.jsonl")
    assert score.score == score_file("pope", data_dir("pope"), data_dir("pope") / "answers.jsonl").score


def test_mme_ground_truth_line(capsys, copy_of):
    folder = copy_of("mme")
    path = folder / "MME_Benchmark_release_version" / "position" / "0020.txt"
    path.write_text("Is it left? Please answer yes or no. Yes\n", encoding="utf-8")
    message = fail(capsys, "mme", "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert f"{path}, line 1: not a question, a tab and Yes or No" in message


def test_mme_pairs_are_pictures_not_neighbours(tmp_path):
    """The official scorer pairs neighbouring lines; here the order of a picture's lines must not matter."""
    rows = answer_rows("mme")
    backwards = score_file("mme", data_dir("mme"), write_rows(tmp_path / "answers.jsonl", rows[::-1]))
    assert backwards.score == score_file("mme", data_dir("mme"), data_dir("mme") / "answers.jsonl").score


def test_mme_release_without_a_subtask_is_told(copy_of, tmp_path):
    folder = copy_of("mme")
    shutil.rmtree(folder / "MME_Benchmark_release_version" / "OCR")
    rows = [row for row in answer_rows("mme") if not row["question_id"].startswith("OCR")]
    score = score_file("mme", folder, write_rows(tmp_path / "answers.jsonl", rows))
    assert score.details["absent_subtasks"] == ["OCR"]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("index\t", "number\t", "line 1: no column index"),
        ("\n244\t", "\nx\t", "line 3: the index 'x' is not an integer"),
        ("\n244\t", "\n241\t", "line 3: the index 241 occurs twice"),
        ("\n244\tWhich animal is this?", "\n244", "line 3: 13 cells, but the header has 14"),
    ],
)
def test_mmbench_table(old, new, complaint, capsys, copy_of):
    folder = copy_of("mmbench")
    path = folder / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    message = fail(capsys, "mmbench", "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert f"{path}, {complaint}" in message


def test_mmbench_test_table_has_an_upload_but_no_score(capsys, copy_of, tmp_path):
    folder = copy_of("mmbench")
    table = folder / "mmbench_dev_20230712.tsv"
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    columns = [column for column in rows[0] if column != "answer"]
    with (folder / "MMBench_TEST_EN_legacy.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    table.unlink()
    arguments = ("mmbench", "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert "has no answers" in fail(capsys, *arguments)
    assert "xlsx" in fail(capsys, *arguments, "--submission", tmp_path / "upload.json")
    score = score_file(arguments[0], folder, folder / "answers.jsonl", submission=tmp_path / "upload.xlsx")
    assert (score.score, score.split, score.total, score.missing) == (None, "test", len(rows), 0)
    assert (tmp_path / "upload.xlsx").is_file()


def test_scienceqa_answer_beyond_the_choices(capsys, copy_of):
    folder = copy_of("scienceqa")
    path = folder / "problems.json"
    problems = json.loads(path.read_text(encoding="utf-8"))
    problems["11"]["answer"] = 4
    path.write_text(json.dumps(problems), encoding="utf-8")
    message = fail(capsys, "scienceqa", "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert "problem 11: the answer 4 is none of its 2 choices" in message


def test_vqav2_test_dev_has_an_upload_but_no_score(capsys, tmp_path):
    """The file must have every question of test2015, which contains test-dev; unasked ones get an empty answer."""
    source = data_dir("vqav2")
    listed = [json.loads(line) for line in (source / "llava_vqav2_mscoco_test2015.jsonl").read_text().splitlines()]
    answered = {row["question_id"] for row in answer_rows("vqav2")}
    asked = [row for row in listed if row["question_id"] in answered]
    write_rows(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", asked)
    arguments = ("vqav2", "--data_dir", tmp_path, "--answers_file", source / "answers.jsonl")
    assert "scored by the server only" in fail(capsys, *arguments)
    upload = tmp_path / "upload.json"
    assert "llava_vqav2_mscoco_test2015.jsonl" in fail(capsys, *arguments, "--submission", upload)
    write_rows(tmp_path / "llava_vqav2_mscoco_test2015.jsonl", listed)
    score = score_file("vqav2", tmp_path, source / "answers.jsonl", submission=upload)
    assert (score.score, score.split, score.total, score.missing) == (None, "test-dev", len(asked), 0)
    assert upload.read_text() == (source / "expected_submission.json").read_text()


def test_vizwiz_test_has_an_upload_but_no_score(capsys, tmp_path):
    rows = [json.loads(line) for line in (data_dir("vizwiz") / "llava_val.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "llava_test.jsonl", rows)
    answers = data_dir("vizwiz") / "answers.jsonl"
    arguments = ("vizwiz", "--data_dir", tmp_path, "--answers_file", answers)
    assert "No ground truth for the test answers" in fail(capsys, *arguments)
    score = score_file("vizwiz", tmp_path, answers, submission=tmp_path / "upload.json")
    assert (score.score, score.split, score.total) == (None, "test", len(rows))
    assert (tmp_path / "upload.json").read_text() == (data_dir("vizwiz") / "expected_submission.json").read_text()


def test_mmmu_draws_are_counted_and_repeatable(tmp_path):
    rows = [row | {"text": "hm"} for row in answer_rows("mmmu")]
    path = write_rows(tmp_path / "answers.jsonl", rows)
    score = score_file("mmmu", data_dir("mmmu"), path)
    assert score.fallback == 44  # its multiple-choice questions
    assert score.to_dict() == score_file("mmmu", data_dir("mmmu"), write_rows(path, rows[::-1])).to_dict()


def test_textvqa_takes_the_annotations_id_and_other_instructions(tmp_path):
    truth = json.loads((data_dir("textvqa") / "TextVQA_0.5.1_val.json").read_text(encoding="utf-8"))["data"]
    ids = {(entry["image_id"], entry["question"].lower()): entry["question_id"] for entry in truth}
    rows = answer_rows("textvqa")
    for number, row in enumerate(rows):
        question = row["prompt"].split("\n")[0]
        if number % 2:
            row |= {"question_id": ids[row["question_id"], question.lower()], "prompt": ""}
        else:
            row["prompt"] = f"{question}\nAnswer briefly."
    score = score_file("textvqa", data_dir("textvqa"), write_rows(tmp_path / "answers.jsonl", rows))
    assert score.score == score_file("textvqa", data_dir("textvqa"), data_dir("textvqa") / "answers.jsonl").score


def test_equal_textvqa_questions_may_each_have_an_answer(copy_of):
    folder = copy_of("textvqa")
    path = folder / "TextVQA_0.5.1_val.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["data"].append(data["data"][0])
    path.write_text(json.dumps(data), encoding="utf-8")
    rows = answer_rows("textvqa")
    assert score_file("textvqa", folder, folder / "answers.jsonl").missing == 1
    score = score_file("textvqa", folder, write_rows(folder / "answers.jsonl", [*rows, rows[0]]))
    assert (score.total, score.missing) == (78, 0)


def test_submission_strips_what_xlsx_cannot_hold(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    rows = answer_rows("mmbench")
    rows[0]["text"] = "=1+1\x07"
    path = tmp_path / "upload.xlsx"
    answers = write_rows(tmp_path / "answers.jsonl", rows)
    score_file("mmbench", data_dir("mmbench"), answers, submission=path)
    cell = openpyxl.load_workbook(path).active.cell(2, 7)
    assert (cell.value, cell.data_type) == ("=1+1", "s")


# ------------------------------------------------------------------------------------------- values of the wrong kind


@pytest.mark.parametrize(
    ("name", "file", "place", "value", "complaint"),
    [
        ("gqa", "data/testdev_balanced_questions.json", ("201100007", "question"), None, "'question' is None"),
        ("gqa", "data/testdev_balanced_questions.json", ("201100007", "types"), {"semantic": "x"}, "no 'structural'"),
        ("gqa", "data/testdev_balanced_questions.json", ("201100007", "semantic"), 1, "'semantic' is 1, not a list"),
        ("gqa", "data/testdev_balanced_questions.json", ("201100007", "groups"), {"global": []}, "'global' is []"),
        ("vqav2", "v2_mscoco_val2014_annotations.json", ("annotations",), None, "'annotations' is None, not a list"),
        ("vizwiz", "val.json", (0, "image"), ["a"], "annotation 0: 'image' is ['a'], not a string"),
        ("textvqa", "TextVQA_0.5.1_val.json", ("data", 0, "question"), None, "entry 0: 'question' is None"),
        ("scienceqa", "pid_splits.json", ("test",), "11", "'test' is '11', not a list"),
        ("scienceqa", "problems.json", ("11", "answer"), "B", "problem 11: 'answer' is 'B', not an integer"),
        ("mmmu", "anns_for_eval.json", (0, "all_choices"), {"a": 1}, "entry 0: 'all_choices' is {'a': 1}, not a list"),
        ("mmmu", "anns_for_eval.json", (0, "index2ans"), {}, "entry 0, index2ans: no 'A'"),
        ("mmmu", "eval/answer_dict_val.json", ("validation_Biology_1", "ground_truth"), None, "'ground_truth' is None"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(name, file, place, value, complaint, capsys, copy_of):
    folder = copy_of(name)
    data = inner = json.loads((folder / file).read_text(encoding="utf-8"))
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / file).write_text(json.dumps(data), encoding="utf-8")
    message = fail(capsys, name, "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert str(folder / file) in message and complaint in message


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("llava_pope_test.jsonl", "text", None), ("coco/coco_pope_random.json", "image", ["a.jpg"])],
)
def test_a_value_of_the_wrong_kind_is_named_by_line(file, key, value, capsys, copy_of):
    folder = copy_of("pope")
    first, second, *others = (folder / file).read_text(encoding="utf-8").split("\n")
    second = json.dumps(json.loads(second) | {key: value})
    (folder / file).write_text("\n".join([first, second, *others]), encoding="utf-8")
    message = fail(capsys, "pope", "--data_dir", folder, "--answers_file", folder / "answers.jsonl")
    assert f"{folder / file}, line 2: {key!r} is {value}, not a string." in message


@pytest.mark.parametrize("name", ["mme", "textvqa"])
@pytest.mark.parametrize("prompt", [None, [1]])
def test_answers_that_only_their_prompts_tell_apart_need_one(name, prompt, capsys, tmp_path):
    rows = answer_rows(name)
    rows[1] |= {"prompt": prompt}
    path = write_rows(tmp_path / "answers.jsonl", rows)
    message = fail(capsys, name, "--data_dir", data_dir(name), "--answers_file", path)
    assert f"{path}, line 2: no 'prompt'" in message


def test_files_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ("gqa", "--data_dir", data_dir("gqa"), "--answers_file", data_dir("gqa") / "answers.jsonl")
    assert fail(capsys, *arguments, "--output", tmp_path) == f"error: {tmp_path}: Is a directory.\n"
    message = fail(capsys, *arguments, "--submission", tmp_path / "file" / "upload.json")
    assert message.startswith(f"error: {tmp_path / 'file'}: ") and "Errno" not in message


def test_pope_yes_ratio_is_of_the_answers_given(tmp_path):
    """A question without an answer is wrong, but does not count as a yes."""
    rows = answer_rows("pope")
    [only_no] = [row for row in rows if row["question_id"] == next(r["question_id"] for r in rows if r["text"] == "No")]
    score = score_file("pope", data_dir("pope"), write_rows(tmp_path / "answers.jsonl", [only_no]))
    figures = [score.details[name] for name in ("random", "popular", "adversarial", "pooled")]
    assert {block["yes_ratio"] for block in figures} == {0.0}
    assert figures[-1]["questions"] == len(rows) and score.missing == len(rows) - 1
