"""Questions about images, on which an export is compared with its checkpoint."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tinyllava_switchkd.data.image_files import BadImageError, ImageFolder, read_image
from tinyllava_switchkd.io import read_json, read_jsonl, read_text


@dataclass(frozen=True)
class Question:
    """A question and its image, a path or a PIL image."""

    text: str
    image: Path | Image.Image

    def open(self) -> Image.Image:
        """The image in RGB."""
        if isinstance(self.image, Image.Image):
            return self.image
        return read_image(self.image)


def read_questions(
    file: str | os.PathLike, image_folder: str | os.PathLike | None, limit: int | None = None
) -> list[Question]:
    """Read questions from a file in LLaVA's format (JSON lines) or a JSON list.

    Args:
        file: has objects with ``image`` and ``text`` (or ``question``).
        image_folder: folder with the images; the file's own folder if None.
        limit: draw this many questions with a fixed seed; None takes all.

    Raises:
        FileNotFoundError: there is no such file, or an image is missing.
        ValueError: an entry has no image or text, or its image is outside the folder.
    """
    file = Path(file)
    folder = ImageFolder(str(file.parent if image_folder is None else image_folder))
    if read_text(file, what="question file").lstrip().startswith("["):
        rows = [(f"{file}, entry {number}", row) for number, row in enumerate(read_json(file, list), start=1)]
    else:
        rows = list(read_jsonl(file))
    questions = []
    for where, row in rows:
        try:
            asked, name = row.get("question") or row["text"], row["image"]
            image = Path(folder.path(name))
        except BadImageError:
            raise ValueError(f"{where}: the image {name!r} lies outside {folder.root}; pass --image_folder.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{where}: not a JSON object with image and text.") from None
        if not image.is_file():
            raise FileNotFoundError(f"{where}: there is no image {image}.")
        questions.append(Question(asked, image))
    if not questions:
        raise ValueError(f"{file} holds no question.")
    if limit is not None and limit < len(questions):  # at random, because kinds of questions often alternate
        questions = random.Random(0).sample(questions, limit)
    return questions


def default_questions() -> Sequence[Question]:
    """Four questions about images of noise and colours in several shapes, the same each time."""
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
