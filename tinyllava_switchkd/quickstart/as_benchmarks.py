"""Writes the quickstart's held-out questions in the formats of POPE, VQAv2, MMBench and ScienceQA.

The evaluation commands run on them as on the real benchmarks, so the quickstart also tries out ``scripts/eval``.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from tinyllava_switchkd.data.template.base import exchange
from tinyllava_switchkd.eval import report as eval_report
from tinyllava_switchkd.eval import run as eval_run
from tinyllava_switchkd.io import JsonObject, digest, write_json, write_jsonl
from tinyllava_switchkd.quickstart import scenes
from tinyllava_switchkd.quickstart.experiment import MADE, Experiment, StageError, call, once, words_of
from tinyllava_switchkd.quickstart.scenes import QuestionSet

BENCHMARKS = ("vqav2", "pope", "mmbench", "scienceqa")
"""Benchmarks in whose formats the questions are written."""

OPEN_TYPES = ("position", "colour", "where", "read")
"""Question types written as open-ended questions of VQAv2."""

SCENES = 100
"""Number of test scenes used, the first ones. They show that the commands work; they are not another score."""

_ROTATION = 1_000_000  # MMBench: the rotated copy of question i has index i + _ROTATION
_ANNOTATORS = 10


def run_benchmarks(experiment: Experiment, checkpoints: Mapping[str, Path]) -> str:
    """Run the evaluation commands on labelled checkpoints and return the text of their report.

    Answers are written to the folder ``eval``, scores and report to ``benchmarks``.

    Raises:
        StageError: a command failed.
    """
    data, results = experiment.root / "eval", experiment.root / "benchmarks"
    asked = experiment.questions("test")
    number = sum(scene < SCENES for scene in asked.scene_of)
    asked = QuestionSet(asked.scenes, asked.questions[:number], asked.scene_of[:number])
    once(data, [asked.questions, digest(__file__)], lambda folder: write_benchmarks(asked, folder))

    def answer(label: str, checkpoint: Path, folder: Path) -> None:
        for name in BENCHMARKS:
            answers = data / name / "answers" / label
            shutil.rmtree(answers, ignore_errors=True)
            flags = {
                "model_path": checkpoint,
                "model_name": label,
                "data_dir": data / name,
                "device": "cpu",
                "output_dir": answers,
                "score": folder / f"{name}.json",
                "batch_size": 64,
            }
            log = experiment.root / "logs" / f"{label}-benchmarks.log"
            call(f"{name} of {label}", eval_run.main, [name, *words_of(flags)], log)

    for label, checkpoint in checkpoints.items():
        once(results / label, [digest(checkpoint / MADE), digest(data / MADE)], partial(answer, label, checkpoint))
    arguments = [f"{label}={results / label}" for label in checkpoints]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = eval_report.main([*arguments, "--include_val", "--output_dir", str(results)])
    if code != 0:
        raise StageError(f"The report over {results} failed.")
    return output.getvalue().rstrip()


def write_benchmarks(question_set: QuestionSet, root: Path) -> None:
    """Write the four benchmark folders in LLaVA's layout.

    Args:
        question_set: scenes and questions of the test split.
        root: the folder for ``EVAL_DIR``.
    """
    rows = list(zip(question_set.questions, question_set.scene_of, strict=True))
    _write_vqav2([row for row in rows if row[0]["type"] in OPEN_TYPES], question_set.scenes, root / "vqav2")
    _write_pope([row for row in rows if row[0]["type"] == "yes_no"], question_set.scenes, root / "pope")
    choices = [row for row in rows if row[0]["type"] == "choice"]
    _write_mmbench(choices[0::2], question_set.scenes, root / "mmbench")
    _write_scienceqa(choices[1::2], question_set.scenes, root / "scienceqa")


Rows = Sequence[tuple[JsonObject, int]]


def _write_vqav2(rows: Rows, pictures: Sequence[scenes.Scene], folder: Path) -> None:
    _write_questions(rows, pictures, folder / "llava_vqav2_mscoco_val2014.jsonl", "default")
    annotations = [
        {
            "question_id": row["question_id"],
            "image_id": scene,
            "question_type": row["type"],
            "answer_type": "other" if row["type"] == "where" else "number",
            "multiple_choice_answer": row["answer"],
            "answers": [
                # The official scorer turns hyphens into spaces in predictions, but not in unanimous annotations
                {"answer_id": number + 1, "answer": row["answer"].replace("-", " "), "answer_confidence": "yes"}
                for number in range(_ANNOTATORS)
            ],
        }
        for row, scene in rows
    ]
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def _write_pope(rows: Rows, pictures: Sequence[scenes.Scene], folder: Path) -> None:
    """POPE has three categories; all objects here are drawn at random, so there is only the category "random"."""
    _write_questions(rows, pictures, folder / "llava_pope_test.jsonl", "random")
    write_jsonl(
        folder / "coco" / "coco_pope_random.json",
        (
            {
                "question_id": number + 1,
                "image": row["image"],
                "text": row["question"].replace(scenes.SHORT_ANSWER, ""),
                "label": row["answer"].lower(),
            }
            for number, (row, _) in enumerate(rows)
        ),
    )


def _write_mmbench(rows: Rows, pictures: Sequence[scenes.Scene], folder: Path) -> None:
    """Write each question and its rotation; with two choices, guessing scores 25 %."""
    header = ["index", "question", "hint", "A", "B", "answer", "category", "image", "source", "l2-category", "comment"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "mmbench_dev_20230712.tsv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow([*header, "split"])
        for row, scene in rows:
            question, options = _options(row)
            image = base64.b64encode(_png(pictures[scene])).decode()
            for turn in range(2):
                a, b = options if turn == 0 else options[::-1]
                answer = row["answer"] if turn == 0 else {"A": "B", "B": "A"}[row["answer"]]
                index = row["question_id"] + turn * _ROTATION
                kind = ["object_localization", image, "quickstart", "finegrained_perception (instance-level)", ""]
                table.writerow([index, question, "", a, b, answer, *kind, "dev"])


def _write_scienceqa(rows: Rows, pictures: Sequence[scenes.Scene], folder: Path) -> None:
    _save_images(rows, pictures, folder / "images" / "test")
    problems, conversations = {}, []
    for row, _ in rows:
        question, options = _options(row)
        identifier = str(row["question_id"])
        problems[identifier] = {
            "question": question,
            "choices": options,
            "answer": "AB".index(row["answer"]),
            "image": row["image"],
            "split": "test",
        }
        text = row["question"].replace(scenes.LETTER_ANSWER, "")
        turns = exchange(f"<image>\n{text}", row["answer"])
        conversations.append({"id": identifier, "image": row["image"], "conversations": turns})
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems)})
    write_json(folder / "llava_test_CQM-A.json", conversations)


def _write_questions(rows: Rows, pictures: Sequence[scenes.Scene], file: Path, category: str) -> None:
    """Write LLaVA's question file, and COCO's image folder beside it."""
    _save_images(rows, pictures, file.parent / "val2014")
    write_jsonl(
        file,
        (
            {"question_id": row["question_id"], "image": row["image"], "text": row["question"], "category": category}
            for row, _ in rows
        ),
    )


def _options(row: JsonObject) -> tuple[str, list[str]]:
    """The stem and the options of a multiple-choice question."""
    question, *lines = row["question"].replace(scenes.LETTER_ANSWER, "").split("\n")
    return question, [line.split(". ", 1)[1] for line in lines]


def _save_images(rows: Rows, pictures: Sequence[scenes.Scene], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in {row["image"]: scene for row, scene in rows}.items():
        (folder / name).write_bytes(_png(pictures[scene]))


def _png(scene: scenes.Scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene.pixels).save(buffer, format="PNG")
    return buffer.getvalue()
