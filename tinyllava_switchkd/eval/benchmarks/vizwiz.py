"""VizWiz: questions by blind people, ten annotators each; test by server (closed), val scored here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .base import (
    Answer,
    NoGroundTruth,
    QuestionFileBenchmark,
    Score,
    join,
    prepare_hint,
    refuse_missing,
    register_benchmark,
)
from .files import find_file, missing_file, read_json, require, write_json
from .vqa import (
    annotator_answers,
    m4c_accuracy,
    normalise_vizwiz,
    score_row,
    submission_form,
    summarise,
    vizwiz_accuracy,
    vizwiz_accuracy_ascii,
)

SCORERS = {
    "official_on_submission": vizwiz_accuracy,
    "official_raw": vizwiz_accuracy,
    "m4c": m4c_accuracy,
    "official_on_submission_ascii_contractions": vizwiz_accuracy_ascii,
    "official_raw_ascii_contractions": vizwiz_accuracy_ascii,
}


@register_benchmark("vizwiz")
class VizWiz(QuestionFileBenchmark):
    """VizWiz-VQA in LLaVA's layout, question_id being the image's file name.

    The paper's number is the test server's; val is another set and no substitute. How often a model says
    "unanswerable" decides much of the score, hence `unanswerable_rate` beside it.
    """

    name, title, folder = "vizwiz", "VizWiz", "vizwiz"
    metric = "official_on_submission"
    paper_split = "test"
    question_files = {"val": ("llava_val.jsonl",), "test": ("llava_test.jsonl",)}  # noqa: RUF012
    image_folders = {"val": ("val",), "test": ("test",)}  # noqa: RUF012
    annotation_files = ("val.json", "Annotations/val.json", "annotations/val.json")

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        path = find_file(data_dir, self.annotation_files)
        annotations = {} if path is None else self._annotations(path)
        if self.answered_split == "test" or not any(answer.question_id in annotations for answer in answers):
            if self._asks(data_dir, "test", answers):
                raise NoGroundTruth(
                    f"No ground truth for the test answers of {self.title}: write the server's file with --submission.",
                    split="test",
                    total=sum(1 for _ in self.read_questions(data_dir, "test")),
                )
            if path is None:
                raise missing_file(data_dir, self.annotation_files, "VizWiz annotations", prepare_hint(self.name))
        joined = join(answers, annotations, path)
        rows = []
        for image, annotation in annotations.items():
            where = f"{path}, image {image}"
            row = score_row(image, joined.get(image), annotator_answers(annotation, where), SCORERS)
            rows.append(row | {"answer_type": annotation.get("answer_type", "")})
        details = summarise(rows, SCORERS, {"answer_type": "answer_type"})
        details |= unanswerability(annotations, joined)
        return self.result(
            score=details[self.metric],
            split="val",
            total=len(annotations),
            answered=len(joined),
            details=details,
            rows=rows,
        )

    def write_submission(
        self, data_dir: str | Path, answers: Sequence[Answer], path: str | Path, allow_missing: bool = False
    ) -> None:
        """Write the server's JSON list of {"image", "answer"}, in the question file's order."""
        split = "test" if self._asks(data_dir, "test", answers) else "val"
        questions = {str(row["question_id"]): row["image"] for _, row in self.read_questions(data_dir, split)}
        joined = join(answers, questions, self.question_file(data_dir, split)[1])
        refuse_missing([key for key in questions if key not in joined], len(questions), allow_missing)
        rows = [
            {"image": image, "answer": submission_form(joined[key].text) if key in joined else ""}
            for key, image in questions.items()
        ]
        write_json(path, rows)

    def _asks(self, data_dir: str | Path, split: str, answers: Sequence[Answer]) -> bool:
        """Whether one of the answers is to a question of the split."""
        if find_file(data_dir, self.question_files[split]) is None:
            return False
        asked = {answer.question_id for answer in answers}
        return any(str(row["question_id"]) in asked for _, row in self.read_questions(data_dir, split))

    def _annotations(self, path: Path) -> dict[str, dict]:
        annotations = read_json(path, list)
        for number, annotation in enumerate(annotations):
            require(annotation, {"image": str}, f"{path}, annotation {number}")
        return {annotation["image"]: annotation for annotation in annotations}


def unanswerability(annotations: dict[str, dict], joined: dict[str, Answer]) -> dict[str, float | None]:
    """How often the model declines, and how well that agrees with the annotators (VizWiz API, second task).

    Average precision and F1 take "unanswerable" as the positive class and the model's word as a 0/1 score, and need
    the annotations' `answerable`; they are None without it, or without an unanswerable question.
    """
    declined = {key: normalise_vizwiz(answer.text) == "unanswerable" for key, answer in joined.items()}
    rate = 100.0 * sum(declined.values()) / len(declined) if declined else None
    result = {"unanswerable_rate": rate, "unanswerable_average_precision": None, "unanswerable_f1": None}
    if all("answerable" in annotation for annotation in annotations.values()):
        truth = {key: not annotation["answerable"] for key, annotation in annotations.items()}
        hits = sum(truth[key] and declined.get(key, False) for key in truth)
        positives, predicted = sum(truth.values()), sum(declined.values())
        if positives:
            recall = hits / positives
            precision = hits / predicted if predicted else 0.0
            # Two thresholds: "said so" with (precision, recall), and "everything" with (base rate, 1).
            average = recall * precision + (1 - recall) * positives / len(truth)
            result["unanswerable_average_precision"] = 100.0 * average
            result["unanswerable_f1"] = 100.0 * 2 * hits / (positives + predicted)
    return result
