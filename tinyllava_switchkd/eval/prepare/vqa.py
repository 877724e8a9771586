"""VQAv2, VizWiz and TextVQA: short answers, ten annotators each.

Formats: the VQA v2 release (``v2_OpenEnded_mscoco_*_questions.json``, ``v2_mscoco_val2014_annotations.json``), VizWiz's
``val.json`` and ``test.json``, ``TextVQA_0.5.1_val.json``, and LLaVA's question files, whose prompts are part of the
protocol: VizWiz names the word "Unanswerable", TextVQA lists the Rosetta OCR tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...fetch import extract, write_json, write_jsonl
from ..benchmarks.files import read_json
from .base import (
    ONE_WORD,
    ExpectedFile,
    Job,
    Preparer,
    question,
    question_images,
    register_preparer,
)

VQA_URL = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
COCO_URL = "http://images.cocodataset.org/zips/"
VQA_QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
VQA_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


@register_preparer("vqav2")
class Vqav2(Preparer):
    """val is scored here; test (test-dev and the full id list) is what the server's upload needs."""

    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    repos = ("lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2")
    sources = ("hf", "official")
    splits = ("val", "test")
    by_hand = "questions and annotations from https://visualqa.org/download.html, COCO's val2014.zip and test2015.zip"

    def source_order(self, split: str) -> tuple[str, ...]:
        # The hub has test's 447,793 questions only together with some 70 GB of images; the authors' zip is small.
        return self.sources if split == "val" else tuple(reversed(self.sources))

    def files(self, split: str) -> list[ExpectedFile]:
        if split == "val":
            return [
                ExpectedFile("llava_vqav2_mscoco_val2014.jsonl", (214_354,)),
                ExpectedFile(VQA_QUESTIONS.format("val2014"), (214_354,)),
                ExpectedFile(VQA_ANNOTATIONS, (214_354,)),
            ]
        return [
            ExpectedFile("llava_vqav2_mscoco_test-dev2015.jsonl", (107_394,)),
            ExpectedFile("llava_vqav2_mscoco_test2015.jsonl", (447_793,)),
        ]

    def images(self, root: Path, split: str) -> Iterable[str]:
        if split == "val":
            return question_images(root, "llava_vqav2_mscoco_val2014.jsonl", "val2014")
        return question_images(root, "llava_vqav2_mscoco_test-dev2015.jsonl", "test2015")

    def from_hf(self, job: Job) -> None:
        if job.split == "test":
            for part, name in (("testdev", "test-dev2015"), ("test", "test2015")):
                with_image = ("image",) if part == "testdev" else ()  # test's other images are never looked at
                rows = []
                for row in job.rows(part, columns=("question_id", "image_id", "question", *with_image)):
                    if with_image:
                        job.write_image(f"test2015/{coco_image('test2015', row['image_id'])}", row["image"])
                    rows.append(row)
                self._write_questions(job, name, "test2015", rows)
            return
        questions, annotations = [], []
        keys = ("question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id")
        for row in job.rows("validation", columns=(*keys, "question", "image")):
            job.write_image(f"val2014/{coco_image('val2014', row['image_id'])}", row["image"])
            annotations.append({key: row[key] for key in keys})
            questions.append({key: row[key] for key in ("image_id", "question", "question_id")})
        head = {"data_type": "mscoco", "data_subtype": "val2014"}
        write_json(job.root / VQA_ANNOTATIONS, {**head, "annotations": annotations})
        write_json(job.root / VQA_QUESTIONS.format("val2014"), {**head, "questions": questions})
        self._write_questions(job, "val2014", "val2014", questions)

    def from_official(self, job: Job) -> None:
        kind = "Val" if job.split == "val" else "Test"
        parts = ("val2014",) if job.split == "val" else ("test-dev2015", "test2015")
        members = {name: job.root / name for name in map(VQA_QUESTIONS.format, parts)}
        _extract_all(job.official(f"{VQA_URL}v2_Questions_{kind}_mscoco.zip"), members)
        if job.split == "val":
            archive = job.official(f"{VQA_URL}v2_Annotations_Val_mscoco.zip")
            _extract_all(archive, {VQA_ANNOTATIONS: job.root / VQA_ANNOTATIONS})
        folder = parts[-1]
        questions = {name: read_json(job.root / VQA_QUESTIONS.format(name), dict)["questions"] for name in parts}
        images = {coco_image(folder, row["image_id"]) for row in questions[parts[0]]}
        if not all((job.root / folder / image).is_file() for image in images):
            archive = job.official(f"{COCO_URL}{folder}.zip")
            _extract_all(archive, {image: job.root / folder / image for image in images})
        for name in parts:
            self._write_questions(job, name, folder, questions[name])

    def _write_questions(self, job: Job, name: str, folder: str, rows: list[dict[str, Any]]) -> None:
        write_jsonl(
            job.root / f"llava_vqav2_mscoco_{name}.jsonl",
            (
                question(row["question_id"], coco_image(folder, row["image_id"]), f"{row['question']}\n{ONE_WORD}")
                for row in rows
            ),
        )


def coco_image(folder: str, image_id: int) -> str:
    """COCO's file name of an image: ``("val2014", 42)`` -> ``COCO_val2014_000000000042.jpg``."""
    return f"COCO_{folder}_{image_id:012d}.jpg"


def _extract_all(archive: Path, members: dict[str, Path]) -> None:
    lacking = extract(archive, members)
    if lacking:
        raise ValueError(f"{archive} lacks {lacking[0]} ({len(lacking)} files in all); delete it and run again.")


VIZWIZ_URL = "https://vizwiz.cs.colorado.edu/VizWiz_final/"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@register_preparer("vizwiz")
class VizWiz(Preparer):
    """val is scored here; test is what the server's upload needs."""

    name = "vizwiz"
    title = "VizWiz"
    folder = "vizwiz"
    repos = ("lmms-lab-encoder/VizWiz-VQA", "lmms-lab/VizWiz-VQA")
    sources = ("hf", "official")
    splits = ("val", "test")
    by_hand = f"{VIZWIZ_URL}vqa_data/Annotations.zip, {VIZWIZ_URL}images/val.zip, {VIZWIZ_URL}images/test.zip"

    def files(self, split: str) -> list[ExpectedFile]:
        rows = (4_319,) if split == "val" else (8_000,)
        return [ExpectedFile(f"llava_{split}.jsonl", rows), ExpectedFile(f"{split}.json", rows)]

    def images(self, root: Path, split: str) -> Iterable[str]:
        return question_images(root, f"llava_{split}.jsonl", split)

    def from_hf(self, job: Job) -> None:
        truth = []
        for row in job.rows(job.split, columns=("question_id", "image", "question", "answers", "category")):
            image = f"{row['question_id'].removesuffix('.jpg')}.jpg"
            job.write_image(f"{job.split}/{image}", row["image"])
            truth.append({"image": image, "question": row["question"]})
            if job.split == "val":
                truth[-1] |= {
                    # The hub's copy leaves out how sure the annotators were; no scorer asks for it.
                    "answers": [{"answer": answer} for answer in row["answers"]],
                    "answer_type": row["category"],
                    "answerable": int(row["category"] != "unanswerable"),
                }
        self._write(job, truth)

    def from_official(self, job: Job) -> None:
        annotations = job.downloads / "vizwiz"
        archive = job.official(f"{VIZWIZ_URL}vqa_data/Annotations.zip")
        _extract_all(archive, {f"{job.split}.json": annotations / f"{job.split}.json"})
        truth = read_json(annotations / f"{job.split}.json", list)
        images = {row["image"]: job.root / job.split / row["image"] for row in truth}
        if not all(path.is_file() for path in images.values()):
            _extract_all(job.official(f"{VIZWIZ_URL}images/{job.split}.zip"), images)
        self._write(job, truth)

    def _write(self, job: Job, truth: list[dict[str, Any]]) -> None:
        write_json(job.root / f"{job.split}.json", truth)
        write_jsonl(
            job.root / f"llava_{job.split}.jsonl",
            (question(row["image"], row["image"], f"{row['question']}\n{UNANSWERABLE}\n{ONE_WORD}") for row in truth),
        )


TEXTVQA_URL = "https://dl.fbaipublicfiles.com/textvqa/"
TEXTVQA_TRUTH = "TextVQA_0.5.1_val.json"
TEXTVQA_OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"
TEXTVQA_KEYS = (
    "question",
    "image_id",
    "image_classes",
    "flickr_original_url",
    "flickr_300k_url",
    "image_width",
    "image_height",
    "answers",
    "question_tokens",
    "question_id",
    "set_name",
)


@register_preparer("textvqa")
class TextVqa(Preparer):
    """The validation split with LLaVA's prompt, which lists the OCR tokens."""

    name = "textvqa"
    title = "TextVQA"
    folder = "textvqa"
    repos = ("lmms-lab-encoder/textvqa", "lmms-lab/textvqa")
    sources = ("hf", "official")
    by_hand = (
        f"{TEXTVQA_URL}data/{TEXTVQA_TRUTH}, {TEXTVQA_URL}data/{TEXTVQA_OCR}, {TEXTVQA_URL}images/train_val_images.zip"
    )

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile("llava_textvqa_val_v051_ocr.jsonl", (5_000,)), ExpectedFile(TEXTVQA_TRUTH, (5_000,))]

    def images(self, root: Path, split: str) -> Iterable[str]:
        return question_images(root, "llava_textvqa_val_v051_ocr.jsonl", "train_images")

    def from_hf(self, job: Job) -> None:
        truth, tokens = [], []
        needed = ("question", "image_id", "question_id", "answers", "ocr_tokens", "image")
        for row in job.rows("validation", columns=needed, optional=TEXTVQA_KEYS):
            job.write_image(f"train_images/{row['image_id']}.jpg", row["image"])
            tokens.append(row["ocr_tokens"] or [])
            truth.append({key: row[key] for key in TEXTVQA_KEYS if key in row})
        head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        write_json(job.root / TEXTVQA_TRUTH, {**head, "data": truth})
        self._write_questions(job, truth, tokens)

    def from_official(self, job: Job) -> None:
        document = read_json(job.official(f"{TEXTVQA_URL}data/{TEXTVQA_TRUTH}"), dict)
        ocr = read_json(job.official(f"{TEXTVQA_URL}data/{TEXTVQA_OCR}"), dict)["data"]
        names = {f"{row['image_id']}.jpg" for row in document["data"]}
        images = {name: job.root / "train_images" / name for name in names}
        if not all(path.is_file() for path in images.values()):
            _extract_all(job.official(f"{TEXTVQA_URL}images/train_val_images.zip"), images)
        write_json(job.root / TEXTVQA_TRUTH, document)
        tokens = {row["image_id"]: row["ocr_tokens"] for row in ocr}
        self._write_questions(job, document["data"], [tokens.get(row["image_id"], []) for row in document["data"]])

    def _write_questions(self, job: Job, truth: list[dict[str, Any]], tokens: list[list[str]]) -> None:
        write_jsonl(
            job.root / "llava_textvqa_val_v051_ocr.jsonl",
            (
                # LLaVA's id is the image's, so it repeats; its scorer joins by image and question.
                question(row["image_id"], f"{row['image_id']}.jpg", textvqa_prompt(row["question"], ocr))
                for row, ocr in zip(truth, tokens, strict=True)
            ),
        )


def textvqa_prompt(text: str, ocr_tokens: Iterable[str]) -> str:
    """LLaVA's three lines: the question with a capital letter, the OCR tokens, the request for one word.

    A line break inside the question or a token would break the format (scorers find the question by its line), so
    white space is normalised.
    """
    ocr = ", ".join(" ".join(token.split()) for token in ocr_tokens)
    return f"{' '.join(text.split()).capitalize()}\nReference OCR token: {ocr}\n{ONE_WORD}"
