"""VQAv2: open-ended questions with ten annotators each; a server scores test-dev, val is scored here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.eval.benchmarks.base import (
    SINGLE_WORD_SUFFIX,
    Answer,
    ExpectedFile,
    QuestionFileBenchmark,
    Score,
    join,
    question_line,
    refuse_missing,
    register_benchmark,
)
from tinyllava_switchkd.eval.benchmarks.files import ID, find_file, prepare_hint, require, write_upload
from tinyllava_switchkd.eval.benchmarks.vqa import (
    annotator_answers,
    m4c_accuracy,
    score_row,
    submission_form,
    summarise,
    vqav2_accuracy,
)
from tinyllava_switchkd.io import JsonObject, read_json, read_jsonl, write_json, write_jsonl

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build

VQA_URL = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
COCO_URL = "http://images.cocodataset.org/zips/"
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"

SCORERS = {"official_on_submission": vqav2_accuracy, "official_raw": vqav2_accuracy, "m4c": m4c_accuracy}


@register_benchmark("vqav2")
class VQAv2(QuestionFileBenchmark):
    """VQAv2 in LLaVA's layout; the official JSON files of val2014 are the ground truth.

    The paper's score is on test-dev, which only the server can score; on val the same model scores about two points
    lower.
    """

    name, title, folder = "vqav2", "VQAv2", "vqav2"
    metric = "official_on_submission"
    upload = "json"
    paper_split = "test-dev"
    question_files = {  # noqa: RUF012
        "val": ("llava_vqav2_mscoco_val2014.jsonl",),
        "test-dev": ("llava_vqav2_mscoco_test-dev2015.jsonl",),
        "test": ("llava_vqav2_mscoco_test2015.jsonl",),
    }
    image_folders = {"val": ("val2014",), "test-dev": ("test2015",), "test": ("test2015",)}  # noqa: RUF012
    annotation_files = tuple(folder + ANNOTATIONS for folder in ("", "annotations/", "Annotations/"))
    repos = ("lmms-lab-encoder/VQAv2", "lmms-lab/VQAv2")
    sources = ("hf", "official")
    prepared_splits = ("val", "test")
    by_hand = "questions and annotations from https://visualqa.org/download.html, COCO's val2014.zip and test2015.zip"

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[Path, dict[str, dict]] = {}

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        split = self._split_of(data_dir, answers)
        path = find_file(data_dir, self.annotation_files)
        if split != "val" or path is None:
            note = (
                f"No ground truth for the {split} answers of {self.title}: test-dev is scored by the server only "
                f"(write its file with --submission), and val needs {self.annotation_files[0]} in {data_dir}."
            )
            total = len(self._ids(data_dir, split))
            return self.result(split=split, total=total, answered=len(answers), details={"note": note})
        annotations = self._annotations(path)
        joined = join(answers, annotations, path)
        annotations = self.asked_of(annotations)
        rows = []
        for key, annotation in annotations.items():
            where = f"{path}, question {key}"
            row = score_row(key, joined.get(key), annotator_answers(annotation, where), SCORERS)
            row["cluster"] = annotation.get("image_id")
            rows.append(row | {column: annotation.get(column, "") for column in ("answer_type", "question_type")})
        details = summarise(rows, SCORERS, ("answer_type", "question_type"))
        return self.result(split="val", details=details, rows=rows)

    def write_submission(
        self, data_dir: str | Path, answers: Sequence[Answer], path: str | Path, allow_missing: bool = False
    ) -> None:
        """Write the server's JSON list of {"question_id", "answer"}.

        The server requires a row for each of the 447,793 test questions even if only test-dev counts. So the list
        follows `llava_vqav2_mscoco_test2015.jsonl`, and unasked questions get an empty answer.
        """
        split = self._split_of(data_dir, answers)
        expected = self._ids(data_dir, split)
        joined = join(answers, expected, self._sources(data_dir)[split])
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
        write_upload(path, rows)

    def _split_of(self, data_dir: str | Path, answers: Sequence[Answer]) -> str:
        """The split that has all answered questions: val, test-dev, or test, which contains test-dev.

        Raises:
            FileNotFoundError: there are no splits.
            ValueError: none has all of them.
        """
        sources = self._sources(data_dir)
        if self.answered_split in sources:
            return self.answered_split
        asked = {answer.question_id for answer in answers}
        known: dict[str, int] = {}
        for split in sources:
            unknown = asked - self._ids(data_dir, split).keys()
            if not unknown:
                return split
            known[split] = len(asked) - len(unknown)
        if not known:
            self.question_file(data_dir)  # raises, and names what is expected
        nearest = max(known, key=known.__getitem__)
        if not known[nearest]:
            join(answers, (), " or ".join(map(str, sources.values())))
        first = next(answer for answer in answers if answer.question_id not in self._ids(data_dir, nearest))
        raise ValueError(
            f"{first.where}: no split of {self.title} in {data_dir} has all the answered questions: {nearest} has "
            f"{known[nearest]:,} of {len(asked):,}, and not {first.question_id!r}. Name the split with --split, and "
            f"give answers to only one split."
        )

    def _sources(self, data_dir: str | Path) -> dict[str, Path]:
        """Split -> the file that lists its questions, for val preferably the annotations, which are scored."""
        names = self.question_files | {"val": (*self.annotation_files, *self.question_files["val"])}
        found = {split: find_file(data_dir, of_split) for split, of_split in names.items()}
        return {split: path for split, path in found.items() if path is not None}

    def _ids(self, data_dir: str | Path, split: str) -> dict[str, int | str]:
        """Question ids of a split in the file's order: as a string -> as in the file."""
        source = self._sources(data_dir).get(split)
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
        """Annotations by question id. They are cached, because val's file is slow to read."""
        if path not in self._read:
            data = read_json(path)
            require(data, {"annotations": list}, str(path))
            for number, annotation in enumerate(data["annotations"]):
                require(annotation, {"question_id": ID}, f"{path}, annotation {number}")
            self._read[path] = {str(annotation["question_id"]): annotation for annotation in data["annotations"]}
        return self._read[path]

    # ------------------------------------------------------------------------------------------- preparation

    def source_order(self, split: str) -> tuple[str, ...]:
        # The hub has test's 447,793 questions only with some 70 GB of images; the authors' zip is small.
        return self.sources if split == "val" else tuple(reversed(self.sources))

    def files(self, split: str) -> list[ExpectedFile]:
        if split == "val":
            names, rows = (self.question_files["val"][0], QUESTIONS.format("val2014"), ANNOTATIONS), (214_354,)
            return [ExpectedFile(name, rows) for name in names]
        return [
            ExpectedFile(self.question_files["test-dev"][0], (107_394,)),
            ExpectedFile(self.question_files["test"][0], (447_793,)),
        ]

    def images(self, root: Path, split: str) -> Iterable[str]:
        return super().images(root, "val" if split == "val" else "test-dev")

    def from_hf(self, build: Build) -> None:
        if build.split == "test":
            for part, name in (("testdev", "test-dev2015"), ("test", "test2015")):
                with_image = ("image",) if part == "testdev" else ()  # test's other images are not needed
                rows = []
                for row in build.rows(part, columns=("question_id", "image_id", "question", *with_image)):
                    if with_image:
                        build.write_image(f"test2015/{coco_image('test2015', row['image_id'])}", row["image"])
                    rows.append(row)
                self._write_questions(build, name, "test2015", rows)
            return
        questions, annotations = [], []
        keys = ("question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id")
        for row in build.rows("validation", columns=(*keys, "question", "image")):
            build.write_image(f"val2014/{coco_image('val2014', row['image_id'])}", row["image"])
            annotations.append({key: row[key] for key in keys})
            questions.append({key: row[key] for key in ("image_id", "question", "question_id")})
        head = {"data_type": "mscoco", "data_subtype": "val2014"}
        write_json(build.root / ANNOTATIONS, {**head, "annotations": annotations}, indent=None)
        write_json(build.root / QUESTIONS.format("val2014"), {**head, "questions": questions}, indent=None)
        self._write_questions(build, "val2014", "val2014", questions)

    def from_official(self, build: Build) -> None:
        kind = "Val" if build.split == "val" else "Test"
        parts = ("val2014",) if build.split == "val" else ("test-dev2015", "test2015")
        members = {name: build.root / name for name in map(QUESTIONS.format, parts)}
        build.extract(f"{VQA_URL}v2_Questions_{kind}_mscoco.zip", members)
        if build.split == "val":
            build.extract(f"{VQA_URL}v2_Annotations_Val_mscoco.zip", {ANNOTATIONS: build.root / ANNOTATIONS})
        folder = parts[-1]
        questions = {name: read_json(build.root / QUESTIONS.format(name))["questions"] for name in parts}
        images = {coco_image(folder, row["image_id"]) for row in questions[parts[0]]}
        build.extract(f"{COCO_URL}{folder}.zip", {image: build.root / folder / image for image in images})
        for name in parts:
            self._write_questions(build, name, folder, questions[name])

    def _write_questions(self, build: Build, name: str, folder: str, rows: list[JsonObject]) -> None:
        lines = (
            question_line(
                row["question_id"], coco_image(folder, row["image_id"]), f"{row['question']}\n{SINGLE_WORD_SUFFIX}"
            )
            for row in rows
        )
        write_jsonl(build.root / f"llava_vqav2_mscoco_{name}.jsonl", lines)


def coco_image(folder: str, image_id: int) -> str:
    """COCO's file name of an image: ``("val2014", 42)`` -> ``COCO_val2014_000000000042.jpg``."""
    return f"COCO_{folder}_{image_id:012d}.jpg"
