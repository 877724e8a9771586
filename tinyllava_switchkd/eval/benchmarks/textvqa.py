"""TextVQA (val): questions about text in pictures, with or without the reference OCR tokens in the prompt."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.eval.benchmarks.base import (
    SINGLE_WORD_SUFFIX,
    Answer,
    ExpectedFile,
    Question,
    QuestionFileBenchmark,
    Score,
    question_line,
    register_benchmark,
)
from tinyllava_switchkd.eval.benchmarks.files import ID, need_file, require
from tinyllava_switchkd.eval.benchmarks.vqa import annotator_answers, m4c_accuracy, score_row, summarise
from tinyllava_switchkd.io import JsonObject, read_json, write_json, write_jsonl

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build

OCR_MARK = "Reference OCR token:"
TEXTVQA_URL = "https://dl.fbaipublicfiles.com/textvqa/"
QUESTION_FILE = "llava_textvqa_val_v051_ocr.jsonl"
TRUTH_FILE = "TextVQA_0.5.1_val.json"
OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_val.json"
_KEPT = (
    *("question", "image_id", "image_classes", "flickr_original_url", "flickr_300k_url", "image_width"),
    *("image_height", "answers", "question_tokens", "question_id", "set_name"),
)


@register_benchmark("textvqa")
class TextVQA(QuestionFileBenchmark):
    """TextVQA in LLaVA's layout.

    Its question_id is the image's id and not unique, since an image has several questions. An annotation is found by
    (image, question in lower case), and the question is taken from the answer's prompt. Unlike LLaVA's code, this also
    works if a question or an OCR token has a line feed.
    """

    name, title, folder = "textvqa", "TextVQA", "textvqa"
    metric = "accuracy"
    paper_split = "val"
    question_files = {"val": (QUESTION_FILE,)}  # noqa: RUF012
    image_folders = {"val": ("train_images",)}  # noqa: RUF012
    repos = ("lmms-lab-encoder/textvqa", "lmms-lab/textvqa")
    sources = ("hf", "official")
    by_hand = f"{TEXTVQA_URL}data/{TRUTH_FILE}, {TEXTVQA_URL}data/{OCR_FILE}, {TEXTVQA_URL}images/train_val_images.zip"

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        path = need_file(data_dir, (TRUTH_FILE,), "TextVQA annotations", self.name)
        data = read_json(path)
        require(data, {"data": list}, str(path))
        annotations, by_annotation_id = {}, {}
        asked: Counter[tuple[str, str]] = Counter()
        for number, annotation in enumerate(data["data"]):
            require(annotation, {"image_id": ID, "question": str, "answers": list}, f"{path}, entry {number}")
            key = str(annotation["image_id"]), _fold(annotation["question"])
            annotations[key] = annotation  # of equal questions the last counts, as in LLaVA
            asked[key] += 1
            by_annotation_id[str(annotation.get("question_id"))] = key

        def key_of(answer: Answer) -> tuple[str, str]:
            key = answer.question_id, _fold(question_of(answer.prompt))
            if key not in annotations:  # the prompt has another instruction, or the id is the annotation's question_id
                first_line = answer.question_id, _fold(answer.prompt.partition("\n")[0])
                key = first_line if first_line in annotations else by_annotation_id.get(answer.question_id, key)
            return key

        if self.asked is not None:
            asked = Counter(key_of(Answer(question.key[0], "", question.key[1], "")) for question in self.asked)
        rows: list[JsonObject] = []
        seen: Counter[tuple[str, str]] = Counter()
        for answer in answers:
            key = key_of(answer)
            if key not in annotations and not answer.prompt:
                raise ValueError(
                    f"{answer.where}: no 'prompt' (or no text in it), but the id {answer.question_id!r} is an image's, "
                    f"and only their prompts tell its questions apart."
                )
            if key not in annotations:
                raise ValueError(
                    f"{answer.where}: unknown question: {path} has no question {key[1]!r} for the image "
                    f"{answer.question_id!r}. Score answers with the data they were generated from."
                )
            seen[key] += 1
            if seen[key] > asked[key]:
                raise ValueError(
                    f"{answer.where}: one answer too many to the question {key[1]!r} about the image "
                    f"{answer.question_id!r}, which is asked {asked[key]} time(s). Remove it."
                )
            rows.append(self._row(key, annotations[key], answer, path))
        for key in (asked - seen).elements():
            rows.append(self._row(key, annotations[key], None, path))
        return self.result(split="val", details=summarise(rows, ("accuracy",)), rows=rows)

    def _row(self, key: tuple[str, str], annotation: dict, answer: Answer | None, path: Path) -> dict:
        annotators = annotator_answers(annotation, f"{path}, question {key[1]!r} about the image {key[0]}")
        row = score_row(key[0], answer, annotators, {"accuracy": m4c_accuracy})
        return row | {"cluster": key[0], "question": annotation["question"]}

    def units(self, rows: Iterable[JsonObject]) -> Iterator[tuple]:
        for row in rows:  # question ids are image ids, so not unique
            yield row["cluster"], (row["cluster"], row["question"]), {"value": row["value"], "count": 1.0}

    # ------------------------------------------------------------------------------------------- preparation

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile(QUESTION_FILE, (5_000,)), ExpectedFile(TRUTH_FILE, (5_000,))]

    def from_hf(self, build: Build) -> None:
        truth, tokens = [], []
        needed = ("question", "image_id", "question_id", "answers", "ocr_tokens", "image")
        for row in build.rows("validation", columns=needed, optional=_KEPT):
            build.write_image(f"train_images/{row['image_id']}.jpg", row["image"])
            tokens.append(row["ocr_tokens"] or [])
            truth.append({key: row[key] for key in _KEPT if key in row})
        head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        self._write(build, {**head, "data": truth}, tokens)

    def from_official(self, build: Build) -> None:
        document = read_json(build.official(f"{TEXTVQA_URL}data/{TRUTH_FILE}"))
        ocr = read_json(build.official(f"{TEXTVQA_URL}data/{OCR_FILE}"))["data"]
        names = {f"{row['image_id']}.jpg" for row in document["data"]}
        images = {name: build.root / "train_images" / name for name in names}
        build.extract(f"{TEXTVQA_URL}images/train_val_images.zip", images)
        tokens = {row["image_id"]: row["ocr_tokens"] for row in ocr}
        self._write(build, document, [tokens.get(row["image_id"], []) for row in document["data"]])

    def _write(self, build: Build, document: JsonObject, tokens: Sequence[Sequence[str]]) -> None:
        write_json(build.root / TRUTH_FILE, document, indent=None)
        lines = (
            # As in LLaVA, the id is the image's and repeats; the scorer joins by image and question.
            question_line(row["image_id"], f"{row['image_id']}.jpg", prompt_of(row["question"], ocr))
            for row, ocr in zip(document["data"], tokens, strict=True)
        )
        write_jsonl(build.root / QUESTION_FILE, lines)


@register_benchmark("textvqa_noocr")
class TextVQANoOCR(TextVQA):
    """The same questions, file and score without the OCR tokens in the prompt, as in lmms-eval and VLMEvalKit."""

    name, title = "textvqa_noocr", "TextVQA without OCR"
    column = "TextVQA (no OCR)"
    answers_folder = "answers_noocr"
    prepared_as = "textvqa"

    def questions(self, data_dir: str | Path, split: str | None = None) -> Iterator[Question]:
        for question in super().questions(data_dir, split):
            yield dataclasses.replace(question, prompt=f"{question_of(question.prompt)}\n{SINGLE_WORD_SUFFIX}")


def question_of(prompt: str) -> str:
    """The question in one of LLaVA's prompts, with OCR tokens after it, before it, or without any."""
    body = prompt.strip()
    if body.endswith(SINGLE_WORD_SUFFIX):
        body = body[: -len(SINGLE_WORD_SUFFIX)].rstrip("\n")
    if body.startswith(OCR_MARK):
        return body.partition("\n")[2]
    return body.partition(f"\n{OCR_MARK}")[0]


def prompt_of(text: str, ocr_tokens: Iterable[str]) -> str:
    """LLaVA's three lines: the question with a capital letter, the OCR tokens, the request for one word.

    White space is normalised, since a line break in the question or a token would break the format: scorers find the
    question by its line.
    """
    ocr = ", ".join(" ".join(token.split()) for token in ocr_tokens)
    return f"{' '.join(text.split()).capitalize()}\n{OCR_MARK} {ocr}\n{SINGLE_WORD_SUFFIX}"


def _fold(question: str) -> str:
    return " ".join(question.lower().split())
