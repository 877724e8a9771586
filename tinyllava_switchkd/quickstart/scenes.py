"""Scenes of four coloured digits, with captions and questions, in LLaVA's JSON format.

A scene has 2x2 cells. Each cell contains one digit in one of six colours (all four differ), at a random position on a
noisy grey ground. The two domains differ only in the digits' strokes:

* ``handwriting``: scikit-learn's 1,797 handwritten digits, split *by digit image* into train, val and test, so that no
  digit image of a test scene occurs in training;
* ``font``: digits rendered from matplotlib's fonts, in place of the web data behind SigLIP and Qwen2.5.

Scenes depend only on (domain, split, seed, number), and on the versions of scikit-learn, matplotlib and Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinyllava_switchkd.data.template.base import Message, exchange
from tinyllava_switchkd.io import JsonObject

IMAGE_SIZE = 32
"""Side of a scene in pixels: two cells."""

CELL_SIZE = 16
"""Side of a cell in pixels. A cell is one patch of the tiny vision tower, so each digit has one visual token."""

DIGIT_SIZE = 13
"""Side of a digit in pixels; the rest of the cell leaves room for a random position."""

POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
"""Names of the four cells, in raster order (the order of the visual tokens)."""

COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 80),
    "blue": (70, 120, 255),
    "yellow": (240, 220, 60),
    "purple": (190, 80, 220),
    "cyan": (60, 220, 230),
}
"""Digit colours (RGB), bright enough for the dark ground."""

QUESTION_TYPES = ("position", "colour", "where", "read", "yes_no", "choice")
"""Kinds of questions, in the order of the printed table."""

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""LLaVA's suffix for short-answer questions (VQAv2, GQA, TextVQA, POPE)."""

LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA's suffix for multiple-choice questions (ScienceQA, MMBench)."""

CAPTION_REQUEST = "Describe the image."

DOMAINS = ("font", "handwriting")
SPLITS = ("train", "val", "test")

_SPLIT_SIZES = (1200, 250)  # handwritten digit images for train and val; the other 347 are for test
_SPLIT_SEED = 0  # the split is part of the data set, so all runs are tested on the same digits
_FONT_VARIANTS = {"train": 8, "val": 2, "test": 2}  # random slants and proportions per glyph and font
_FONT_FILES = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmss10",
    "cmtt10",
    "cmb10",
]


@dataclass(frozen=True)
class Scene:
    """One scene; its cells are in the order of `POSITIONS`.

    Attributes:
        digits: the four digit values.
        colours: the four colour names, all different.
        sources: index of each digit's image in its `digit_pool`, to check that splits are disjoint.
        pixels: uint8 [IMAGE_SIZE, IMAGE_SIZE, 3].
    """

    digits: tuple[int, ...]
    colours: tuple[str, ...]
    sources: tuple[int, ...]
    pixels: np.ndarray

    @property
    def caption(self) -> str:
        """Digits, then colours, both in raster order: ``"The digits 3 5 2 8 are red blue cyan green."``

        The form is deliberately regular. The distance in tokens between visual token i and a word about cell i is the
        same for all cells, so that a language model learns within a few hundred steps which cell a word is about.
        """
        return f"The digits {' '.join(map(str, self.digits))} are {' '.join(self.colours)}."


@cache
def handwriting_split() -> dict[str, np.ndarray]:
    """Each split's indices into ``sklearn.datasets.load_digits``; together they are all 1,797 images."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(1797)
    train, val = _SPLIT_SIZES
    return {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}


@cache
def digit_pool(domain: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digit images from which scenes of a domain and split are composed.

    Returns:
        Ink coverage, float32 [images, DIGIT_SIZE, DIGIT_SIZE] in 0..1, and the digit values, int [images].

    Raises:
        ValueError: the domain or split is unknown.
    """
    if domain not in DOMAINS or split not in SPLITS:
        raise ValueError(
            f"The domain must be one of {DOMAINS} and the split one of {SPLITS}, not {domain!r} and {split!r}."
        )
    if domain == "handwriting":
        from sklearn.datasets import load_digits

        data = load_digits()
        chosen = handwriting_split()[split]
        strokes, values = data.images[chosen] / 16.0, data.target[chosen]
    else:
        strokes, values = _font_strokes(split)
    upscaled = [
        np.asarray(
            Image.fromarray((stroke * 255).astype(np.uint8)).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC)
        )
        for stroke in strokes
    ]
    return np.stack(upscaled).astype(np.float32) / 255.0, np.asarray(values, dtype=int)


def make_scenes(domain: str, split: str, number: int, seed: int) -> list[Scene]:
    """Compose `number` scenes from the digit images of one domain and split."""
    coverage, values = digit_pool(domain, split)
    rng = np.random.default_rng([seed, DOMAINS.index(domain), SPLITS.index(split)])
    return [_compose(coverage, values, rng) for _ in range(number)]


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One clause per cell, in random order: its colour and position in either order, then its digit.

    The first word of a clause cannot be predicted; the others have to be looked up in the image by it. So a description
    trains eight look-ups in some twenty tokens. The digit always comes last, so that it is clear what the next word has
    to be; with all three words in random order, most base models never learned some kinds of questions.
    """
    clauses = []
    for cell in rng.permutation(4):
        words = [scene.colours[cell], POSITIONS[cell]]
        if rng.random() < 0.5:
            words.reverse()
        clauses.append(" ".join([*words, str(scene.digits[cell])]))
    return ", ".join(clauses) + "."


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question of one of `QUESTION_TYPES` about a scene, and its answer.

    "Yes" and "No", and "A" and "B", are equally likely, so that a constant answer scores no better than chance.
    """
    cell = int(rng.integers(4))
    digit, colour, position = scene.digits[cell], scene.colours[cell], POSITIONS[cell]
    if kind == "position":
        return f"What digit is {position}?" + SHORT_ANSWER, str(digit)
    if kind == "colour":
        return f"What digit is {colour}?" + SHORT_ANSWER, str(digit)
    if kind == "where":
        return f"Where is the {colour} digit?" + SHORT_ANSWER, position
    if kind == "read":
        return "What are the digits?" + SHORT_ANSWER, " ".join(map(str, scene.digits))
    if rng.random() < 0.5:
        shown, pool, phrase = str(digit), [str(value) for value in range(10)], "{}"
        missing = [value for value in pool if int(value) not in scene.digits]
    else:
        shown, pool, phrase = colour, list(COLOURS), "{} digit"
        missing = [value for value in pool if value not in scene.colours]
    other = str(rng.choice(missing))
    if kind == "yes_no":
        truth = bool(rng.random() < 0.5)
        return (
            f"Is there a {phrase.format(shown if truth else other)} in the image?" + SHORT_ANSWER,
            "Yes" if truth else "No",
        )
    if kind == "choice":
        options = [shown, other] if rng.random() < 0.5 else [other, shown]
        lines = "".join(f"\n{letter}. {phrase.format(option)}" for letter, option in zip("AB", options, strict=True))
        return f"What is in the image?{lines}" + LETTER_ANSWER, "AB"[options.index(shown)]
    raise ValueError(f"Unknown question type {kind!r}; use one of {', '.join(QUESTION_TYPES)}.")


def conversation_samples(
    scenes: list[Scene], image_names: list[str], seed: int, caption_share: float = 0.1
) -> list[dict]:
    """LLaVA's fine-tuning JSON: per scene one question of every type, or for a share of the scenes a description.

    Returns:
        Samples ``{"id", "image", "conversations": [{"from", "value"}, ...]}``; ``<image>`` is in the first turn.
    """
    rng = np.random.default_rng([seed, 101])
    samples = []
    for scene, name in zip(scenes, image_names, strict=True):
        if rng.random() < caption_share:
            pairs = [(CAPTION_REQUEST, describe(scene, rng))]
        else:
            order = rng.permutation(rng.permutation(len(QUESTION_TYPES)))  # twice, or published results would change
            pairs = [ask(scene, QUESTION_TYPES[index], rng) for index in order]
        samples.append(_sample(name, pairs))
    return samples


def caption_samples(scenes: list[Scene], image_names: list[str]) -> list[dict]:
    """LLaVA's pre-training JSON: one caption per scene."""
    return [_sample(name, [(CAPTION_REQUEST, scene.caption)]) for scene, name in zip(scenes, image_names, strict=True)]


def description_samples(scenes: list[Scene], image_names: list[str], seed: int) -> list[dict]:
    """LLaVA's pre-training JSON with `describe` instead of captions."""
    rng = np.random.default_rng([seed, 404])
    return [
        _sample(name, [(CAPTION_REQUEST, describe(scene, rng))])
        for scene, name in zip(scenes, image_names, strict=True)
    ]


def test_questions(scenes: list[Scene], image_names: list[str], seed: int) -> list[dict]:
    """One question of every type per scene, each in its own conversation.

    Returns:
        ``{"question_id", "image", "type", "question", "answer"}`` in the order of scenes and types.
    """
    rng = np.random.default_rng([seed, 202])
    questions: list[JsonObject] = []
    for scene, name in zip(scenes, image_names, strict=True):
        for kind in QUESTION_TYPES:
            question, answer = ask(scene, kind, rng)
            questions.append(
                {"question_id": len(questions), "image": name, "type": kind, "question": question, "answer": answer}
            )
    return questions


def save_images(scenes: list[Scene], folder: Path, prefix: str) -> list[str]:
    """Write every scene as PNG; returns the file names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}_{index:05d}.png" for index in range(len(scenes))]
    for scene, name in zip(scenes, names, strict=True):
        Image.fromarray(scene.pixels).save(folder / name, compress_level=1)
    return names


@dataclass(frozen=True)
class QuestionSet:
    """Scenes and the questions about them.

    Attributes:
        scenes: the scenes.
        questions: made by `test_questions`.
        scene_of: index of each question's scene.
    """

    scenes: Sequence[Scene]
    questions: Sequence[JsonObject]
    scene_of: Sequence[int]


def question_set(domain: str, split: str, number: int, seed: int) -> QuestionSet:
    """Scenes of a domain and split, with a question of every type about each."""
    made = make_scenes(domain, split, number, seed)
    questions = test_questions(made, [f"{split}_{index:05d}.png" for index in range(number)], seed)
    return QuestionSet(made, questions, [index for index in range(number) for _ in QUESTION_TYPES])


def _sample(name: str, pairs: list[tuple[str, str]]) -> dict:
    conversations: list[Message] = []
    for question, answer in pairs:
        prefix = "<image>\n" if not conversations else ""
        conversations += exchange(prefix + question, answer)
    return {"id": name.rsplit(".", 1)[0], "image": name, "conversations": conversations}


def _compose(coverage: np.ndarray, values: np.ndarray, rng: np.random.Generator) -> Scene:
    ground = rng.uniform(15, 70)
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), ground, dtype=np.float32)
    sources = rng.integers(len(values), size=4)
    if rng.random() < 0.5:  # a repeated digit in at least half of the scenes
        same = np.flatnonzero(values == values[sources[0]])
        sources[1 + int(rng.integers(3))] = rng.choice(same)
        sources = rng.permutation(sources)
    colours = [list(COLOURS)[index] for index in rng.permutation(len(COLOURS))[:4]]
    for cell, (source, colour) in enumerate(zip(sources, colours, strict=True)):
        top, left = (rng.integers(CELL_SIZE - DIGIT_SIZE + 1, size=2) + np.array(divmod(cell, 2)) * CELL_SIZE).tolist()
        patch = canvas[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE]
        ink = np.asarray(COLOURS[colour], dtype=np.float32) * rng.uniform(0.8, 1.0)
        alpha = coverage[source][..., None]
        patch[...] = patch * (1 - alpha) + ink * alpha
    canvas += rng.normal(0, 0.08 * 255, canvas.shape)
    return Scene(
        digits=tuple(int(values[source]) for source in sources),
        colours=tuple(colours),
        sources=tuple(int(source) for source in sources),
        pixels=canvas.clip(0, 255).astype(np.uint8),
    )


def _font_strokes(split: str) -> tuple[list[np.ndarray], list[int]]:
    """Digits of matplotlib's fonts in scikit-learn's 8x8 pixels, each in several slants and proportions."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng([_SPLIT_SEED, 303, SPLITS.index(split)])
    strokes, values = [], []
    for name in _FONT_FILES:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 48)
        for value in range(10):
            for _ in range(_FONT_VARIANTS[split]):
                strokes.append(_glyph(font, str(value), shear=rng.uniform(-0.25, 0.25), stretch=rng.uniform(0.7, 1.1)))
                values.append(value)
    return strokes, values


def _glyph(font: ImageFont.FreeTypeFont, character: str, shear: float, stretch: float) -> np.ndarray:
    """One character, slanted, stretched, cropped, centred in a square and scaled to 8x8; values in 0..1."""
    page = Image.new("L", (96, 96))
    ImageDraw.Draw(page).text((48, 48), character, font=font, fill=255, anchor="mm")
    page = page.transform(
        (96, 96),
        Image.Transform.AFFINE,
        (1 / stretch, shear, 48 - 48 / stretch - 48 * shear, 0, 1, 0),
        Image.Resampling.BICUBIC,
    )
    glyph = page.crop(page.getbbox())
    side = max(glyph.size)
    square = Image.new("L", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return np.asarray(square.resize((8, 8), Image.Resampling.LANCZOS), dtype=np.float32) / 255.0
