"""Scenes: splits by digit image, reproducibility, and correct answers to every question."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from tinyllava_switchkd.io import write_json
from tinyllava_switchkd.quickstart import scenes
from tinyllava_switchkd.quickstart.scenes import POSITIONS, QUESTION_TYPES, ask, describe, digit_pool, make_scenes

RNG = np.random.default_rng


def test_handwriting_is_split_by_digit_image():
    split = scenes.handwriting_split()
    everything = np.concatenate(list(split.values()))
    assert sorted(everything.tolist()) == list(range(1797))  # a partition: no digit image in two splits
    assert {name: len(indices) for name, indices in split.items()} == {"train": 1200, "val": 250, "test": 347}


def test_digit_images_come_from_the_split():
    from sklearn.datasets import load_digits

    values = load_digits().target
    for name, indices in scenes.handwriting_split().items():
        coverage, digits = digit_pool("handwriting", name)
        assert digits.tolist() == values[indices].tolist()
        assert coverage.shape == (len(indices), scenes.DIGIT_SIZE, scenes.DIGIT_SIZE)
        assert coverage.min() >= 0 and 0.9 < coverage.max() <= 1


def test_fonts_differ_between_splits():
    train, val = digit_pool("font", "train"), digit_pool("font", "val")
    assert set(train[1]) == set(val[1]) == set(range(10))
    seen = {stroke.tobytes() for stroke in train[0]}
    assert not any(stroke.tobytes() in seen for stroke in val[0])


def test_unknown_pool():
    with pytest.raises(ValueError, match="'photos' and 'train'"):
        digit_pool("photos", "train")


def test_scenes_depend_only_on_seed_and_split():
    first, again = make_scenes("handwriting", "train", 5, seed=3), make_scenes("handwriting", "train", 5, seed=3)
    assert all((a.pixels == b.pixels).all() and a.digits == b.digits for a, b in zip(first, again, strict=True))
    assert make_scenes("handwriting", "train", 3, seed=3)[2].digits == first[2].digits  # a prefix of more scenes
    others = [make_scenes("handwriting", "train", 5, seed=4), make_scenes("handwriting", "val", 5, seed=3)]
    assert all(other[0].pixels.tolist() != first[0].pixels.tolist() for other in others)


def test_a_scene_shows_its_digits_in_their_colours():
    for scene in make_scenes("font", "train", 20, seed=0):
        assert len(set(scene.colours)) == 4 and scene.pixels.shape == (32, 32, 3) and scene.pixels.dtype == np.uint8
        for cell, colour in enumerate(scene.colours):
            row, column = divmod(cell, 2)
            patch = scene.pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1, 3).astype(float)
            brightest = patch[patch.sum(axis=1).argsort()[-12:]].mean(axis=0)
            ink = {name: np.asarray(value) / np.linalg.norm(value) for name, value in scenes.COLOURS.items()}
            cosine = {name: brightest @ value / np.linalg.norm(brightest) for name, value in ink.items()}
            assert max(cosine, key=cosine.get) == colour


@pytest.mark.parametrize("kind", QUESTION_TYPES)
def test_answers_are_correct(kind):
    rng = RNG(0)
    answers = []
    for scene in make_scenes("handwriting", "test", 100, seed=1):
        question, answer = ask(scene, kind, rng)
        answers.append(answer)
        cells = list(zip(scene.digits, scene.colours, POSITIONS, strict=True))
        if kind == "position":
            place = re.search(r"is (\S+)\?", question)[1]
            assert [str(digit) for digit, _, position in cells if position == place] == [answer]
        elif kind == "colour":
            ink = re.search(r"is (\S+)\?", question)[1]
            assert [str(digit) for digit, colour, _ in cells if colour == ink] == [answer]
        elif kind == "where":
            ink = re.search(r"the (\S+) digit", question)[1]
            assert [position for _, colour, position in cells if colour == ink] == [answer]
        elif kind == "read":
            assert answer == " ".join(str(digit) for digit in scene.digits)
        else:
            present = {str(digit) for digit in scene.digits} | {f"{colour} digit" for colour in scene.colours}
            if kind == "yes_no":
                asked = re.search(r"Is there a (.+) in the image", question)[1]
                assert answer == ("Yes" if asked in present else "No")
            else:
                options = dict(re.findall(r"([AB])\. (.+)", question))
                assert [letter for letter, option in options.items() if option in present] == [answer]
    if kind in ("yes_no", "choice"):  # no constant answer scores above chance
        assert 35 <= answers.count(answers[0]) <= 65


def test_unknown_question_type():
    with pytest.raises(ValueError, match="'rhyme'"):
        ask(make_scenes("font", "val", 1, 0)[0], "rhyme", RNG(0))


def test_descriptions_are_correct_for_every_cell():
    for scene in make_scenes("font", "val", 30, seed=0):
        cells = {frozenset(cell) for cell in zip(map(str, scene.digits), scene.colours, POSITIONS, strict=True)}
        clauses = describe(scene, RNG(scene.digits[0])).removesuffix(".").split(", ")
        assert {frozenset(clause.split()) for clause in clauses} == cells
        assert not any(clause.split()[0].isdigit() for clause in clauses)  # because a digit may occur twice
        assert scene.caption == f"The digits {' '.join(map(str, scene.digits))} are {' '.join(scene.colours)}."


def test_training_json_has_llavas_format(tmp_path):
    made = make_scenes("handwriting", "train", 12, seed=0)
    names = scenes.save_images(made, tmp_path / "images", "x")
    samples = scenes.conversation_samples(made, names, seed=0, caption_share=0.5)
    write_json(tmp_path / "data.json", samples)
    assert json.loads((tmp_path / "data.json").read_text()) == samples
    assert not list(tmp_path.glob("*.partial"))
    lengths = set()
    for sample, scene in zip(samples, made, strict=True):
        with Image.open(tmp_path / "images" / sample["image"]) as image:
            assert (np.asarray(image) == scene.pixels).all()
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
        lengths.add(len(turns))
    assert lengths == {2, 12}  # descriptions, and six questions each
    assert samples == scenes.conversation_samples(made, names, seed=0, caption_share=0.5)
    assert [sample["conversations"][1]["value"] for sample in scenes.caption_samples(made, names)] == [
        scene.caption for scene in made
    ]


def test_test_questions_have_every_type_for_every_scene():
    made = make_scenes("handwriting", "test", 3, seed=0)
    questions = scenes.test_questions(made, ["a.png", "b.png", "c.png"], seed=0)
    assert [row["type"] for row in questions] == list(QUESTION_TYPES) * 3
    assert [row["question_id"] for row in questions] == list(range(18))
    assert [row["image"] for row in questions[::6]] == ["a.png", "b.png", "c.png"]
