"""VQAv2: open-ended questions, ten annotators each; test-dev by server, val scored here."""

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
from .files import ID, find_file, read_json, read_jsonl, require, write_json
from .vqa import annotator_answers, m4c_accuracy, score_row, submission_form, summarise, vqav2_accuracy

SCORERS = {"official_on_submission": vqav2_accuracy, "official_raw": vqav2_accuracy, "m4c": m4c_accuracy}


@register_benchmark("vqav2")
class VQAv2(QuestionFileBenchmark):
    """VQAv2 in LLaVA's layout; the official JSON files of val2014 are the ground truth.

    The paper's number is test-dev's, which only the server knows; val runs about two points lower for the same model.
    """

    name, title, folder = "vqav2", "VQAv2", "vqav2"
    metric = "official_on_submission"
    paper_split = "test-dev"
    question_files = {  # noqa: RUF012
        "val": ("llava_vqav2_mscoco_val2014.jsonl",),
        "test-dev": ("llava_vqav2_mscoco_test-dev2015.jsonl",),
        "test": ("llava_vqav2_mscoco_test2015.jsonl",),
    }
    image_folders = {"val": ("val2014",), "test-dev": ("test2015",), "test": ("test2015",)}  # noqa: RUF012
    annotation_files = tuple(
        folder + "v2_mscoco_val2014_annotations.json" for folder in ("", "annotations/", "Annotations/")
    )

    def __init__(self) -> None:
        self._read: tuple[Path, dict[str, dict]] | None = None

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        split = self._split_of(data_dir, answers)
        path = find_file(data_dir, self.annotation_files)
        if split != "val" or path is None:
            raise NoGroundTruth(
                f"No ground truth for the {split} answers of {self.title}: test-dev is scored by the server only "
                f"(write its file with --submission), and val needs {self.annotation_files[0]} in {data_dir}.",
                split=split,
                total=len(self._ids(data_dir, split)),
            )
        annotations = self._annotations(path)
        joined = join(answers, annotations, path)
        rows = []
        for key, annotation in annotations.items():
            where = f"{path}, question {key}"
            row = score_row(key, joined.get(key), annotator_answers(annotation, where), SCORERS)
            rows.append(row | {column: annotation.get(column, "") for column in ("answer_type", "question_type")})
        details = summarise(rows, SCORERS, {"answer_type": "answer_type", "question_type": "question_type"})
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
        """Write the server's JSON list of {"question_id", "answer"}.

        The server wants a row for each of the 447,793 test questions even where only test-dev counts, so the list
        follows `llava_vqav2_mscoco_test2015.jsonl` and unasked questions get an empty answer.
        """
        split = self._split_of(data_dir, answers)
        expected = self._ids(data_dir, split)
        joined = join(answers, expected, self._source(data_dir, split))
        refuse_missing([key for key in expected if key not in joined], len(expected), allow_missing)
        everything = expected
        if find_file(data_dir, self.question_files["test"]) is not None:
            listed = self._ids(data_dir, "test")
            if split != "val" or set(joined) <= set(listed):
                everything = listed
        elif split == "test-dev":
            raise FileNotFoundError(
                f"The server takes answers to all test questions, so {data_dir} must hold "
                f"{self.question_files['test'][0]}. {prepare_hint(self.name)}."
            )
        answered = {key: submission_form(answer.text) for key, answer in joined.items()}
        rows = [{"question_id": identifier, "answer": answered.get(key, "")} for key, identifier in everything.items()]
        write_json(path, rows)

    def _split_of(self, data_dir: str | Path, answers: Sequence[Answer]) -> str:
        """The split that all answers belong to (splits share no question)."""
        if self.answered_split is not None and self._source(data_dir, self.answered_split) is not None:
            return self.answered_split
        asked = {answer.question_id for answer in answers}
        sources = {}
        for split in self.question_files:
            source = self._source(data_dir, split)
            if source is not None:
                sources[split] = source
                if asked & set(self._ids(data_dir, split)):
                    return split
        if not sources:
            self.question_file(data_dir)  # raises, and names what is expected
        join(answers, (), " or ".join(str(source) for source in sources.values()))
        raise ValueError(f"There are no answers for {self.title}.")

    def _source(self, data_dir: str | Path, split: str) -> Path | None:
        """The file that lists a split's questions: for val rather the annotations, which are what is scored."""
        annotations = find_file(data_dir, self.annotation_files) if split == "val" else None
        return annotations or find_file(data_dir, self.question_files[split])

    def _ids(self, data_dir: str | Path, split: str) -> dict[str, int | str]:
        """Question ids of a split, as strings and as the file has them, in the file's order."""
        source = self._source(data_dir, split)
        if source is None:
            return {}
        if source.suffix == ".json":
            return {key: row["question_id"] for key, row in self._annotations(source).items()}
        ids = {}
        for where, row in read_jsonl(source, what="question file"):
            require(row, {"question_id": ID}, where)
            ids[str(row["question_id"])] = row["question_id"]
        return ids

    def _annotations(self, path: Path) -> dict[str, dict]:
        """Annotations by question id; kept, for val's file takes long to read."""
        if self._read is not None and self._read[0] == path:
            return self._read[1]
        data = read_json(path, dict)
        require(data, {"annotations": list}, str(path))
        for number, annotation in enumerate(data["annotations"]):
            require(annotation, {"question_id": ID}, f"{path}, annotation {number}")
        annotations = {str(annotation["question_id"]): annotation for annotation in data["annotations"]}
        self._read = path, annotations
        return annotations
