"""TextVQA (val): questions about text in pictures, asked with the reference OCR tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .base import SINGLE_WORD_SUFFIX, Answer, QuestionFileBenchmark, Score, prepare_hint, register_benchmark
from .files import ID, need_file, read_json, require
from .vqa import annotator_answers, m4c_accuracy, score_row, summarise

OCR_MARK = "Reference OCR token:"


@register_benchmark("textvqa")
class TextVQA(QuestionFileBenchmark):
    """TextVQA in LLaVA's layout.

    Its question_id is the image's id and not unique: an image has several questions. An annotation is found by
    (image, question in lower case), the question being recovered from the answer's prompt; LLaVA's own recovery fails
    on a question or an OCR token with a line feed, this one does not.
    """

    name, title, folder = "textvqa", "TextVQA", "textvqa"
    metric = "accuracy"
    paper_split = "val"
    question_files = {"val": ("llava_textvqa_val_v051_ocr.jsonl",)}  # noqa: RUF012
    image_folders = {"val": ("train_images",)}  # noqa: RUF012
    annotation_file = "TextVQA_0.5.1_val.json"

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        path = need_file(data_dir, (self.annotation_file,), "TextVQA annotations", prepare_hint(self.name))
        data = read_json(path, dict)
        require(data, {"data": list}, str(path))
        annotations, asked, by_annotation_id = {}, Counter(), {}
        for number, annotation in enumerate(data["data"]):
            require(annotation, {"image_id": ID, "question": str, "answers": list}, f"{path}, entry {number}")
            key = str(annotation["image_id"]), _fold(annotation["question"])
            annotations[key] = annotation  # of equal questions the last one counts, as in LLaVA
            asked[key] += 1
            by_annotation_id[str(annotation.get("question_id"))] = key
        rows, seen = [], Counter()
        for answer in answers:
            key = answer.question_id, _fold(question_of(answer.prompt))
            if key not in annotations:  # an instruction of the user's own, or the annotation's question_id
                first_line = answer.question_id, _fold(answer.prompt.partition("\n")[0])
                key = first_line if first_line in annotations else by_annotation_id.get(answer.question_id, key)
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
        details = summarise(rows, ("accuracy",), {})
        return self.result(
            score=details["accuracy"],
            split="val",
            total=asked.total(),
            answered=seen.total(),
            details=details,
            rows=rows,
        )

    def _row(self, key: tuple[str, str], annotation: dict, answer: Answer | None, path: Path) -> dict:
        annotators = annotator_answers(annotation, f"{path}, question {key[1]!r} about the image {key[0]}")
        row = score_row(key[0], answer, annotators, {"accuracy": m4c_accuracy})
        return row | {"question": annotation["question"]}


def question_of(prompt: str) -> str:
    """The question in a prompt of LLaVA's: with OCR tokens after it, before it, or without any."""
    body = prompt.strip()
    if body.endswith(SINGLE_WORD_SUFFIX):
        body = body[: -len(SINGLE_WORD_SUFFIX)].rstrip("\n")
    if body.startswith(OCR_MARK):
        return body.partition("\n")[2]
    return body.partition(f"\n{OCR_MARK}")[0]


def _fold(question: str) -> str:
    return " ".join(question.lower().split())
