"""A tiny checkpoint on disk and miniatures of the ten benchmarks, for real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.eval.scorers import FOLDERS, data_dir
from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory
from tinyllava_switchkd.model import TinyLlavaForConditionalGeneration, save_pretrained_model

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDE ,."


def legible_model(seed: int = 0, **kwargs: Any) -> TinyLlavaForConditionalGeneration:
    """A random model whose answers are letters, differ from question to question and mostly end by themselves.

    Phi is the one language model whose head has a bias; the bias does it.
    """
    tokenizer = tiny_tokenizer("phi")
    text = {"eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.3}
    model = tiny_llava("phi", tower="clip", text=text, seed=seed, **kwargs)
    with torch.no_grad():
        bias = model.language_model.lm_head.bias
        bias.fill_(-50)
        bias[tokenizer(LETTERS).input_ids] = 0
        bias[tokenizer.eos_token_id] = 1.5
    return model


def write_checkpoint(folder: Path, template: str | None = "phi", **kwargs: Any) -> str:
    """`legible_model` on disk."""
    model = legible_model(**kwargs)
    save_pretrained_model(model, tiny_tokenizer("phi"), model.vision_tower.image_processor, folder, template=template)
    return str(folder)


def picture(path: Path, seed: int) -> None:
    """Write a noisy picture whose content and size depend on the seed; the suffix gives its format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    height, width = 20 + seed % 7, 20 + seed % 5
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def write_benchmark(name: str, eval_dir: Path) -> Path:
    """A copy of the scorers' fixture with pictures for all its questions; returns the benchmark's folder."""
    folder = eval_dir / FOLDERS[name]
    shutil.copytree(data_dir(name), folder, ignore=shutil.ignore_patterns("README.txt", "answers*", "expected*"))
    for number, question in enumerate(BenchmarkFactory(name).questions(folder)):
        if isinstance(question.image, Path) and not question.image.is_file():
            picture(question.image, number)
    return folder


def write_pope(folder: Path, images: int = 4, words: tuple[str, ...] = ("cat", "very old steam engine", "cup")) -> Path:
    """A POPE of our own: every question is asked in each of the three categories."""
    rows = []
    for category in ("random", "popular", "adversarial"):
        labels = []
        for image in range(images):
            picture(folder / "val2014" / f"{image}.png", image)
            for word in words:
                text = f"Is there a {word} in the image?"
                labels.append({"question_id": len(labels) + 1, "image": f"{image}.png", "text": text, "label": "yes"})
                text += "\nAnswer the question using a single word or phrase."
                rows.append({"question_id": len(rows), "image": f"{image}.png", "text": text, "category": category})
        write_lines(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", rows)
    return folder


def write_lines(path: Path, rows: list[dict]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
