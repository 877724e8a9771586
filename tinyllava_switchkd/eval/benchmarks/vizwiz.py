"""VizWiz: questions by blind people with ten annotators each; test has a (closed) server, val is scored here."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.eval.benchmarks.base import (
    SINGLE_WORD_SUFFIX,
    Answer,
    ExpectedFile,
    QuestionFileBenchmark,
    Score,
    join,
    percentage,
    question_line,
    refuse_missing,
    register_benchmark,
)
from tinyllava_switchkd.eval.benchmarks.files import find_file, missing_file, require, write_upload
from tinyllava_switchkd.eval.benchmarks.vqa import (
    annotator_answers,
    m4c_accuracy,
    normalise_vizwiz,
    score_row,
    submission_form,
    summarise,
    vizwiz_accuracy,
    vizwiz_accuracy_ascii,
)
from tinyllava_switchkd.io import JsonObject, read_json, write_json, write_jsonl

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build

VIZWIZ_URL = "https://vizwiz.cs.colorado.edu/VizWiz_final/"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."

SCORERS = {
    "official_on_submission": vizwiz_accuracy,
    "official_raw": vizwiz_accuracy,
    "m4c": m4c_accuracy,
    "official_on_submission_ascii_contractions": vizwiz_accuracy_ascii,
    "official_raw_ascii_contractions": vizwiz_accuracy_ascii,
}


@register_benchmark("vizwiz")
class VizWiz(QuestionFileBenchmark):
    """VizWiz-VQA in LLaVA's layout: one question per image, which the question file names.

    The paper's score is the test server's; val is another set and not a substitute. Much of the score depends on how
    often a model says "unanswerable", so the details have the `unanswerable_rate`.
    """

    name, title, folder = "vizwiz", "VizWiz", "vizwiz"
    metric = "official_on_submission"
    upload = "json"
    paper_split = "test"
    question_files = {"val": ("llava_val.jsonl",), "test": ("llava_test.jsonl",)}  # noqa: RUF012
    image_folders = {"val": ("val",), "test": ("test",)}  # noqa: RUF012
    annotation_files = ("val.json", "Annotations/val.json", "annotations/val.json")
    repos = ("lmms-lab-encoder/VizWiz-VQA", "lmms-lab/VizWiz-VQA")
    sources = ("hf", "official")
    prepared_splits = ("val", "test")
    by_hand = f"{VIZWIZ_URL}vqa_data/Annotations.zip, {VIZWIZ_URL}images/val.zip, {VIZWIZ_URL}images/test.zip"

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        path = find_file(data_dir, self.annotation_files)
        annotations = {} if path is None else self._annotations(path)
        images = self._images(data_dir, "val")

        def image_of(answer: Answer) -> str:
            named = images.get(answer.question_id, answer.question_id)
            return named if named in annotations else f"{named}.jpg" if f"{named}.jpg" in annotations else named

        known = any(image_of(answer) in annotations for answer in answers)
        if self.answered_split == "test" or path is None or not known:
            if self._asks(data_dir, "test", answers):
                note = f"No ground truth for the test answers of {self.title}: write its file with --submission."
                total = len(self._images(data_dir, "test"))
                return self.result(split="test", total=total, answered=len(answers), details={"note": note})
            if path is None:
                raise missing_file(data_dir, self.annotation_files, "VizWiz annotations", self.name)
        joined = join(answers, annotations, path, image_of)
        annotations = self.asked_of(annotations, image_of)
        rows = []
        for image, annotation in annotations.items():
            where = f"{path}, image {image}"
            row = score_row(image, joined.get(image), annotator_answers(annotation, where), SCORERS)
            rows.append(row | {"answer_type": annotation.get("answer_type", "")})
        details = summarise(rows, SCORERS, ("answer_type",))
        details |= unanswerability(annotations, joined)
        return self.result(split="val", details=details, rows=rows)

    def write_submission(
        self, data_dir: str | Path, answers: Sequence[Answer], path: str | Path, allow_missing: bool = False
    ) -> None:
        """Write the server's JSON list of {"image", "answer"}, in the question file's order."""
        split = "test" if self._asks(data_dir, "test", answers) else "val"
        questions = self._images(data_dir, split)
        joined = join(answers, questions, self.question_file(data_dir, split)[1])
        refuse_missing([key for key in questions if key not in joined], len(questions), allow_missing)
        rows = [
            {"image": image, "answer": submission_form(joined[key].text) if key in joined else ""}
            for key, image in questions.items()
        ]
        write_upload(path, rows)

    def _images(self, data_dir: str | Path, split: str) -> dict[str, str]:
        """Question id -> image of a split, from its question file; empty if there is none."""
        if find_file(data_dir, self.question_files[split]) is None:
            return {}
        return {str(row["question_id"]): row["image"] for _, row in self.read_questions(data_dir, split)}

    def _asks(self, data_dir: str | Path, split: str, answers: Sequence[Answer]) -> bool:
        """Whether any answer is to a question of the split."""
        return not self._images(data_dir, split).keys().isdisjoint(answer.question_id for answer in answers)

    def _annotations(self, path: Path) -> dict[str, dict]:
        annotations = read_json(path, list)
        for number, annotation in enumerate(annotations):
            require(annotation, {"image": str}, f"{path}, annotation {number}")
        return {annotation["image"]: annotation for annotation in annotations}

    # ------------------------------------------------------------------------------------------- preparation

    def files(self, split: str) -> list[ExpectedFile]:
        rows = (4_319,) if split == "val" else (8_000,)
        return [ExpectedFile(f"llava_{split}.jsonl", rows), ExpectedFile(f"{split}.json", rows)]

    def from_hf(self, build: Build) -> None:
        truth = []
        for row in build.rows(build.split, columns=("question_id", "image", "question", "answers", "category")):
            image = f"{row['question_id'].removesuffix('.jpg')}.jpg"
            build.write_image(f"{build.split}/{image}", row["image"])
            truth.append({"image": image, "question": row["question"]})
            if build.split == "val":
                truth[-1] |= {
                    # The hub's copy lacks the annotators' confidence, which no scorer uses.
                    "answers": [{"answer": answer} for answer in row["answers"]],
                    "answer_type": row["category"],
                    "answerable": int(row["category"] != "unanswerable"),
                }
        self._write(build, truth)

    def from_official(self, build: Build) -> None:
        path = build.downloads / "vizwiz" / f"{build.split}.json"
        build.extract(f"{VIZWIZ_URL}vqa_data/Annotations.zip", {path.name: path})
        truth = read_json(path, list)
        images = {row["image"]: build.root / build.split / row["image"] for row in truth}
        build.extract(f"{VIZWIZ_URL}images/{build.split}.zip", images)
        self._write(build, truth)

    def _write(self, build: Build, truth: list[JsonObject]) -> None:
        write_json(build.root / f"{build.split}.json", truth, indent=None)
        suffix = f"{UNANSWERABLE}\n{SINGLE_WORD_SUFFIX}"
        lines = (question_line(row["image"], row["image"], f"{row['question']}\n{suffix}") for row in truth)
        write_jsonl(build.root / f"llava_{build.split}.jsonl", lines)


def unanswerability(annotations: Mapping[str, dict], joined: Mapping[Hashable, Answer]) -> dict[str, float | None]:
    """How often the model declines, and how well that agrees with the annotators (VizWiz API, second task).

    Average precision and F1 have "unanswerable" as the positive class and the model's answer as a 0/1 score. They need
    the annotations' `answerable`, and are None without it or without an unanswerable question.
    """
    declined = {key: normalise_vizwiz(answer.text) == "unanswerable" for key, answer in joined.items()}
    result = {"unanswerable_rate": percentage(list(declined.values()))}
    result |= {"unanswerable_average_precision": None, "unanswerable_f1": None}
    if all("answerable" in annotation for annotation in annotations.values()):
        truth = {key: not annotation["answerable"] for key, annotation in annotations.items()}
        hits = sum(truth[key] and declined.get(key, False) for key in truth)
        positives, predicted = sum(truth.values()), sum(declined.values())
        if positives:
            recall = hits / positives
            precision = hits / predicted if predicted else 0.0
            # Two thresholds: the declined ones with (precision, recall), and all with (base rate, 1).
            average = recall * precision + (1 - recall) * positives / len(truth)
            result["unanswerable_average_precision"] = 100.0 * average
            result["unanswerable_f1"] = 100.0 * 2 * hits / (positives + predicted)
    return result
