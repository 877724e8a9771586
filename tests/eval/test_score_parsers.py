"""The parsers on single answers: expected values from the official code, one table per protocol."""

import pytest

from tinyllava_switchkd.eval.benchmarks import gqa, mme, mmmu, pope, scienceqa, textvqa, vqa
from tinyllava_switchkd.eval.benchmarks.choices import REFUSED, match_exactly, read_choice

# Prediction, annotators, then: official VQAv2 on the raw text, m4c, official VizWiz, official VQAv2 on the submission.
VQA_VECTORS = [
    ("Yes", {"yes": 10}, 0, 1, 1, 1),
    ("one", {"one": 10}, 1, 1, 0, 0),
    ("1", {"one": 10}, 0, 1, 0, 0),
    ("lay's", {"lay's": 7, "chips": 3}, 1, 1, 1, 0),
    ("a dog", {"dog": 10}, 0, 1, 1, 1),
    ("1,000", {"1,000": 6, "1000": 4}, 1, 1, 1, 1),
    ("7up", {"7-up": 5, "7up": 5}, 1, 1, 1, 1),
    ("u.s.", {"u.s.": 5, "us": 5}, 1, 1, 1, 1),
    ("T-shirt", {"t shirt": 5, "tshirt": 5}, 1, 1, 1, 1),
    ("2:30", {"2:30": 10}, 1, 1, 1, 1),
]


@pytest.mark.parametrize(("prediction", "counts", "official", "m4c", "vizwiz", "uploaded"), VQA_VECTORS)
def test_vqa_accuracy(prediction, counts, official, m4c, vizwiz, uploaded):
    annotators = [answer for answer, count in counts.items() for _ in range(count)]
    assert vqa.vqav2_accuracy(prediction, annotators) == official
    assert vqa.m4c_accuracy(prediction, annotators) == m4c
    assert vqa.vizwiz_accuracy(prediction, annotators) == vizwiz
    assert vqa.vqav2_accuracy(vqa.submission_form(prediction), annotators) == uploaded


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_leave_one_out(matches, accuracy):
    annotators = ["cat"] * matches + ["dog"] * (10 - matches)
    assert vqa.leave_one_out("cat", annotators) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "normalised", "submitted"),
    [
        ("The dog.", "dog", "dog"),
        ("red, white and blue", "red white and blue", "red white and blue"),
        ("red,white", "red white", "redwhite"),
        ("1,000", "1000", "1000"),
        ("1,,2", "1 2", "12"),
        ("3.5", "3.5", "3.5"),
        ("p.m.", "pm", "pm"),
        ("left/right", "left right", "left right"),
        ("left/ right", "left right", "left right"),
        ("stop\tsign\n", "stop sign", "stop sign"),
        ("dont", "don't", "don't"),
        ("couldn'tve", "couldn't've", "couldn't've"),
        ("couldnt've", "couldn't've", "couldn't've"),
        ("he's", "he's", "he 's"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("Ten of ONE", "10 of 1", "10 of 1"),
        ("none", "0", "0"),
        ("yes。", "yes。", "yes。"),
        ("what?", "what", "what"),
        ("a", "", ""),
        ("", "", ""),
        ("." * 40, "." * 8, "." * 8),
    ],
)
def test_vqa_normalisation(text, normalised, submitted):
    assert vqa.normalise(text) == normalised
    assert vqa.submission_form(text) == submitted


def test_contractions():
    assert len(vqa.CONTRACTIONS) == len(vqa.VIZWIZ_CONTRACTIONS) == 120
    assert vqa.CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert vqa.normalise_vizwiz("cant dont weve") == "can't don’t we've"
    assert vqa.normalise_vizwiz("couldn'tve couldnt've") == "couldn’t’ve couldnt've"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        (" yes", "yes"),
        ("nothing", "no"),
        ("None", "no"),
        ("Not sure", "no"),
        ("I note yes", "no"),
        ("Snow", "no"),
        ("A no", "no"),
        ("The yes", "other"),
        ("Yep", "other"),
        ("True", "other"),
        ("Ｙｅｓ", "other"),
        ("", "other"),
        ("noyes", "no"),
        ("nyes", "yes"),
    ],
)
def test_mme(text, answer):
    assert mme.read_yes_no(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "fallback"),
    [
        ("Yes", "yes", False),
        ("yes, there is", "yes", False),
        ("No", "no", False),
        ("no.", "no", False),
        ("No, there is.", "no", False),
        ("Yes, there is no car", "no", False),
        ("It is not there", "no", False),
        ("Yes. No.", "yes", False),
        ("NO", "yes", True),
        ("No!", "yes", True),
        ("No\nIt is", "yes", True),
        ("\nNo", "yes", True),
        ("Nope", "yes", True),
        ("", "yes", True),
        (".no", "yes", True),
        ("There isn't", "yes", True),
        ("no。", "yes", True),
    ],
)
def test_pope(text, answer, fallback):
    assert pope.read_yes_no(text) == answer
    assert pope.is_fallback(text) is fallback


def test_pope_scores_of_nothing_are_zero():
    figures = pope.score_category([{"parsed": "no", "truth": "no"}])
    assert (figures["accuracy"], figures["precision"], figures["recall"], figures["f1"]) == (100, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. dog", "B"),
        ("A. B. C.", "A"),
        ("The answer is B.", "B"),
        ("The answer is Boston.", "B"),
        ("The answer is C, since", "C"),
        ("The answer is Z!", "Z"),
        ("The answer is B", "FAILED"),
        ("The answer is A. The answer is B.", "FAILED"),
        ("the answer is C.", "FAILED"),
        ("B.", "FAILED"),
        ("(B)", "FAILED"),
        ("B) dog", "FAILED"),
        ("Answer: B", "FAILED"),
        ("b", "FAILED"),
        ("B。", "FAILED"),
        ("F", "FAILED"),
        ("B\nbecause", "FAILED"),
        ("AB", "FAILED"),
        ("", "FAILED"),
    ],
)
def test_scienceqa(text, letter):
    assert scienceqa.read_letter(text) == letter


ANIMALS = {"A": "cat", "B": "dog", "C": "bird", "D": "annual revenue"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        (" B ", "B"),
        (";B,", "B"),
        ("D!!!", "D"),
        ("'C'", "C"),
        ("(B)", "B"),
        ("Both (A) and (B)", "B"),
        ("(C) since (A) is false", "A"),
        ("A or B", "B"),
        ("B\nNo wait, (A)", "A"),
        ("A person is holding B", "B"),
        ("Option C is right because of it", "C"),
        ("what the picture shows is annual revenue", "D"),
        ("it is a cat, or maybe a dog", "B"),
        ("annual revenue", None),
        ("A. cat", None),
        ("Answer:B", None),
        ("B: dog", None),
        ("A, because it is", None),
        ("b", None),
        ("", None),
    ],
)
def test_mmmu_choice(text, letter):
    assert mmmu.read_choice(text, list(ANIMALS), ANIMALS) == letter


def test_mmmu_draw_depends_on_the_question_alone():
    ids = [f"validation_Art_{number}" for number in range(400)]
    drawn = [mmmu.draw(identifier, "ABCD") for identifier in ids]
    assert drawn == [mmmu.draw(identifier, "ABCD") for identifier in ids]
    assert all(70 < drawn.count(letter) < 130 for letter in "ABCD")


@pytest.mark.parametrize(
    ("text", "candidates"),
    [
        ("42", {42.0}),
        ("The answer is 42.", {42.0}),
        ("First 3. Then 4\nSo the total is 7", {7.0}),
        ("x = 12.974 mol", {"12.974 mol", 12.97}),
        ("x = 1\ny = 2", {2.0}),
        ("$1,000", {"$1,000", 1000.0, 0.0}),
        ("1.06e3", {1060.0, 1.0, 3.0}),
        ("C", {" c", "c "}),
        ("It is a transformation process", {"a transformation process"}),
        ("", {""}),
    ],
)
def test_mmmu_open(text, candidates):
    assert set(mmmu.read_open(text)) == candidates


@pytest.mark.parametrize(
    ("truth", "text", "right"),
    [
        ("1000", "1,000", True),
        ("0.5", ".5", False),  # the official parser strips full stops first
        ("3.43", "3.429", True),
        ("C", "c", True),
        ("C", "cat", False),
        (["5", "five"], "about five", True),
        ("Transformation", "It is a transformation process", True),
        ("60", "60%", True),
        ("60", "sixty", False),
        ("Paris", "Not Paris", True),
    ],
)
def test_mmmu_open_match(truth, text, right):
    assert mmmu.matches_open(truth, mmmu.read_open(text)) is right


@pytest.mark.parametrize(
    ("identifier", "subject"),
    [("validation_Art_Theory_1", "Art_Theory"), ("validation_Math_30", "Math")],
)
def test_mmmu_subject(identifier, subject):
    assert mmmu.subject_of(identifier) == subject


@pytest.mark.parametrize(
    ("text", "prediction"),
    [("Yes.", "yes"), ("T-shirt...", "t-shirt"), ("yes. ", "yes. "), ("no。", "no。"), ("", "")],
)
def test_gqa(text, prediction):
    assert gqa.prediction(text) == prediction


@pytest.mark.parametrize(
    "prompt",
    [
        "What brand?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "What brand?\nReference OCR token: \nAnswer the question using a single word or phrase.",
        "What brand?\nReference OCR token: A\nB, C\nAnswer the question using a single word or phrase.",
        "What brand?\nAnswer the question using a single word or phrase.",
        "Reference OCR token: A, B\nWhat brand?\nAnswer the question using a single word or phrase.",
        "What brand?",
    ],
)
def test_textvqa_question_in_the_prompt(prompt):
    assert textvqa.question_of(prompt) == "What brand?"


FRUIT = {"A": "apple", "B": "banana", "C": "cherry pie", "D": "None"}
WITHOUT_NONE = {letter: option for letter, option in FRUIT.items() if option != "None"}

# Answer, VLMEvalKit's exact matching, a reader.
CHOICE_VECTORS = [
    ("B", "B", "B"),
    ("B.", "B", "B"),
    ("(B)", "B", "B"),
    ("**B**", "B", "B"),
    ("B. banana", "B", "B"),
    ("Answer: B", "B", "B"),
    ("The answer is B.", "B", "B"),
    ("The answer is apple.", "A", "A"),
    ("The answer is actually banana", "A", "B"),
    ("I think it would be option B", "B", "B"),
    ("banana", "B", "B"),
    ("It is a banana", "B", "B"),
    ("apple or banana", None, None),
    ("Both A and B", None, None),
    ("B\nbecause it is written on the sign", None, "B"),
    ("b", None, "B"),
    ("(b) yellow", None, "B"),
    ("B。", None, "B"),
    ("Ｂ", None, "B"),
    ("答案：B。", None, "B"),
    ("答案:B", "B", "B"),
    ("选项B", None, "B"),
    ("A banana is shown", "A", "B"),
    ("A is right", "A", "A"),
    ("Option A is what the picture shows", None, "A"),
    ("D", None, "D"),
    ("None", None, "D"),
    ("Cannot determine the answer", REFUSED, None),
    ("Z", REFUSED, None),
    ("Failed to obtain answer via API", None, None),
    ("", None, None),
    ("a fruit that grows on trees, which may be a banana or another fruit", None, "B"),
    ("B is not the one that I would ever choose", None, "B"),
]


@pytest.mark.parametrize(("text", "official", "reader"), CHOICE_VECTORS)
def test_choice(text, official, reader):
    assert match_exactly(text, WITHOUT_NONE) == official
    assert read_choice(text, FRUIT) == reader


def test_choice_none_is_an_option_where_the_table_has_it():
    assert match_exactly("None", FRUIT) == "D"
    assert match_exactly("D", FRUIT) == "D"


def test_reader_prefers_the_longer_option_and_a_whole_option_to_a_letter_in_it():
    assert read_choice("it says no parking", {"A": "parking", "B": "no parking"}) == "B"
    assert read_choice("it shows bananas", {"A": "NA", "B": "banana"}) == "B"
    assert read_choice("a banana, final answer", {"A": "NA", "B": "banana"}) == "B"
    assert read_choice("Vitamin C", {"A": "Vitamin C", "B": "Vitamin D", "C": "Iron"}) == "A"
