"""Questions about images on which an export is held against its checkpoint."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tinyllava_switchkd.io import read_text


@dataclass(frozen=True)
class Question:
    """A question and its image: a file's path, or the image itself."""

    text: str
    image: Path | Image.Image

    def open(self) -> Image.Image:
        """The image in RGB."""
        if isinstance(self.image, Image.Image):
            return self.image
        from tinyllava_switchkd.data.image_files import read_image

        return read_image(self.image)


def read_questions(
    file: str | os.PathLike, image_folder: str | os.PathLike | None, limit: int | None
) -> list[Question]:
    """Read a question file of LLaVA's: a JSON object a line, with ``image`` and ``text``.

    Args:
        file: the question file.
        image_folder: where the images are; the file's own folder if None.
        limit: so many questions, drawn the same each time; None takes all.

    Raises:
        FileNotFoundError: there is no such file, or an image is missing.
        ValueError: a line has no image or text.
    """
    file = Path(file)
    folder = file.parent if image_folder is None else Path(image_folder)
    questions = []
    for number, line in enumerate(read_text(file, what="question file").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, name = row["text"], row["image"]
            image = folder / name
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}, line {number}: not a JSON object with image and text.") from None
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise ValueError(f"{file}, line {number}: the image {name!r} lies outside {folder}; pass --image_folder.")
        if not image.is_file():
            raise FileNotFoundError(f"{file}, line {number}: there is no image {image}.")
        questions.append(Question(text, image))
    if not questions:
        raise ValueError(f"{file} holds no question.")
    if limit is not None and limit < len(questions):  # drawn, not every n-th: kinds of questions often take turns
        questions = random.Random(0).sample(questions, limit)
    return questions


def default_questions() -> Sequence[Question]:
    """Four questions about images of noise and of colours, of several shapes, drawn the same each time."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, 97).astype(np.uint8)
    colours = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, ::-1], ramp[48]), axis=-1)
    blocks = np.repeat(np.repeat(noise[:4, :3], 60, axis=0), 50, axis=1)
    images = [Image.fromarray(np.ascontiguousarray(pixels)) for pixels in (noise, colours, blocks, noise[:50])]
    texts = (
        "What is shown in this picture? Answer briefly.",
        "Which colour is at the top?",
        "How many objects are there?",
        "Is there a dog? Answer yes or no.",
    )
    return [Question(text, image) for text, image in zip(texts, images, strict=True)]
