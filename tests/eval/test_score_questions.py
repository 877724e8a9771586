"""The questions of a run: prompts, pictures and answer rows as in LLaVA's scripts, from LLaVA's layout."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.eval.scorers import FOLDERS, answer_rows, data_dir
from tinyllava_switchkd.eval.benchmarks import (
    BenchmarkFactory,
    Question,
    QuestionFileBenchmark,
    answer_key,
    read_answers,
    register_benchmark,
)
from tinyllava_switchkd.eval.score import score_file

ONE_WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
ENDINGS = {
    "mme": ONE_WORD,
    "mmbench": LETTER,
    "mmbench_cn": "\n请直接回答选项字母。",
    "vqav2": ONE_WORD,
    "gqa": ONE_WORD,
    "scienceqa": LETTER,
    "textvqa": ONE_WORD,
    "vizwiz": f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{ONE_WORD}",
    "pope": ONE_WORD,
}


def questions(name: str) -> list[Question]:
    return list(BenchmarkFactory(name).questions(data_dir(name)))


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_questions_are_those_that_llava_asked(name):
    """LLaVA's MMBench script drops an option "None" and all after it, so only those rows may differ."""
    asked = Counter(question.key for question in questions(name))
    answered = Counter(answer_key(row) for row in answer_rows(name))
    differing = {key[0] for key in (asked - answered)}
    if name.startswith("mmbench"):
        rows = {str(question.question_id): question for question in questions(name)}
        assert differing == {key for key, question in rows.items() if "None" in question.extra["options"]}
        assert differing
    else:
        assert asked == answered


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_prompts_end_with_the_task_instruction(name):
    for question in questions(name):
        ending = ENDINGS.get(name, LETTER if "\n(A) " in question.prompt else ONE_WORD)
        assert question.prompt.endswith(ending)
        assert "<image>" not in question.prompt


@pytest.mark.parametrize(("name", "tokens"), [("mmbench", 1024), ("scienceqa", 1024), ("mmmu", 1024), ("pope", 128)])
def test_length_limits(name, tokens):
    assert BenchmarkFactory(name).max_new_tokens == tokens


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_answer_rows_have_llavas_keys_and_can_be_scored(name, tmp_path):
    path = tmp_path / "answers.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, question in enumerate(questions(name)):
            row = question.answer_row("A", answer_id=str(number), model_id="tiny")
            assert answer_key(row) == question.key
            assert set(answer_rows(name)[0]) == set(row)
            file.write(json.dumps(row) + "\n")
    score = score_file(name, data_dir(name), path)
    assert (score.answered, score.missing) == (score.total, 0)


def test_where_the_pictures_are():
    folders = {
        "vqav2": "val2014",
        "vizwiz": "val",
        "gqa": "data/images",
        "pope": "val2014",
        "textvqa": "train_images",
        "scienceqa": "images/test",
        "mmmu": "all_images",
    }
    for name, folder in folders.items():
        images = {question.image for question in questions(name)}
        if name == "scienceqa":  # questions without a picture are asked without one
            assert sum(question.image is None for question in questions(name)) == 58 - 47
        # MMMU's two questions about several pictures need their first one on disk.
        assert all(Path(image).is_relative_to(data_dir(name) / folder) for image in images if image is not None), name
    assert all(question.image.is_file() for question in questions("mme"))


@pytest.mark.parametrize("listed", [False, True])
def test_mmmu_shows_the_first_of_several_pictures_if_it_is_there(listed, tmp_path):
    """TinyLLaVA's file has a path but no image for these questions."""
    first = "validation_Art_1_1.png"
    path = [first, "validation_Art_1_2.png"] if listed else first
    sample = {"id": "validation_Art_1", "question_type": "short-answer", "prompt": "What?", "img_path": path}
    (tmp_path / "anns_for_eval.json").write_text(json.dumps([sample]))
    (tmp_path / "all_images").mkdir()
    [question] = BenchmarkFactory("mmmu").questions(tmp_path)
    assert question.image is None
    (tmp_path / "all_images" / first).write_bytes(b"")
    [question] = BenchmarkFactory("mmmu").questions(tmp_path)
    assert question.image == tmp_path / "all_images" / first


def test_scienceqa_logs_the_image_token_but_does_not_ask_it():
    with_image, without = questions("scienceqa")[0], next(q for q in questions("scienceqa") if q.image is None)
    assert with_image.key[1] == f"<image>\n{with_image.prompt}"
    assert without.key[1] == without.prompt


def test_mmbench_prompt_is_hint_question_options_and_suffix():
    question = next(question for question in questions("mmbench") if question.question_id == 247)
    assert question.key == ("247", "Look at the picture.\nWhich of these is shown?\nA. apple\nB. banana\nC. cherry")
    assert question.prompt == question.key[1] + LETTER
    assert dict(question.extra) == {
        "round_id": 0,
        "options": ["apple", "banana", "cherry"],
        "option_char": ["A", "B", "C"],
    }


def test_mmbench_pictures_are_decoded_once_and_shared_by_rotations():
    rows = questions("mmbench")
    assert all(question.image.startswith(b"\xff\xd8") for question in rows)
    first, rotated = (next(q for q in rows if q.question_id == index) for index in (241, 1000241))
    assert first.image is rotated.image
    assert first.image_key == rotated.image_key


def test_mmbench_picture_may_be_another_rows_index(tmp_path):
    table = tmp_path / "MMBench_DEV_EN_legacy.tsv"
    table.write_text(
        "index\tquestion\tA\tB\tanswer\timage\n1\tWhat?\tx\ty\tA\tAAAA\n1000001\tWhat?\ty\tx\tB\t1\n", encoding="utf-8"
    )
    assert [question.image for question in BenchmarkFactory("mmbench").questions(tmp_path)] == [b"\0\0\0"] * 2
    table.write_text("index\tquestion\tA\tB\tanswer\timage\n1\tWhat?\tx\ty\tA\tno base64\n", encoding="utf-8")
    with pytest.raises(ValueError, match="image of question 1 is not base64"):
        list(BenchmarkFactory("mmbench").questions(tmp_path))


def test_mmbench_quoted_cells_and_missing_options(tmp_path):
    (tmp_path / "mmbench_dev_20230712.tsv").write_text(
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n"
        '1\t"Which ""word""\nis it?"\tnan\tnone\tNA\tnull\tnan\tA\tAAAA\n',
        encoding="utf-8",
    )
    (question,) = BenchmarkFactory("mmbench").questions(tmp_path)
    assert question.key[1] == 'Which "word"\nis it?\nA. none\nB. NA\nC. null'


def test_split_is_chosen_by_name_or_by_what_is_there(tmp_path):
    source = data_dir("vqav2") / "llava_vqav2_mscoco_test2015.jsonl"
    shutil.copy(source, tmp_path / source.name)
    vqav2 = BenchmarkFactory("vqav2")
    assert len(list(vqav2.questions(tmp_path))) == 91
    shutil.copy(source, tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl")
    assert next(vqav2.questions(tmp_path)).image.parent.name == "test2015"
    assert len(list(vqav2.questions(data_dir("vqav2")))) == 85
    assert len(list(vqav2.questions(data_dir("vqav2"), split="test"))) == 91
    with pytest.raises(FileNotFoundError, match=r"llava_vqav2_mscoco_val2014.jsonl.*prepare vqav2"):
        list(vqav2.questions(tmp_path, split="val"))
    with pytest.raises(ValueError, match="no split 'dev'"):
        list(vqav2.questions(tmp_path, split="dev"))


@pytest.fixture
def no_leftovers():
    with BenchmarkFactory.scope():
        yield


@pytest.mark.usefixtures("no_leftovers")
def test_a_third_party_adds_a_benchmark_with_one_class(tmp_path):
    @register_benchmark("colours")
    class Colours(QuestionFileBenchmark):
        name, title, folder, metric = "colours", "Colours", "colours", "accuracy"
        question_files = {"test": ("questions.jsonl",)}  # noqa: RUF012
        image_folders = {"test": ("images",)}  # noqa: RUF012

        def score(self, data_dir, answers):
            truth = {str(row["question_id"]): row["colour"] for _, row in self.read_questions(data_dir)}
            right = sum(truth[answer.question_id] == answer.text for answer in answers)
            return self.result(
                score=100 * right / len(truth), split="test", total=len(truth), answered=len(answers), details={}
            )

    row = {"question_id": 1, "image": "a.png", "text": "Which colour?", "colour": "red"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (question,) = BenchmarkFactory("colours").questions(tmp_path)
    assert question.image == tmp_path / "images" / "a.png"
    (tmp_path / "answers.jsonl").write_text(json.dumps(question.answer_row("red", answer_id="", model_id="")))
    assert read_answers(tmp_path / "answers.jsonl")[0].text == "red"
    assert score_file("colours", tmp_path, tmp_path / "answers.jsonl").score == 100
