"""The quickstart's held-out questions in the formats of POPE, VQAv2, MMBench and ScienceQA.

The evaluation's commands run on them as on the real ones: the quickstart is a test drive of ``scripts/eval``, too.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..eval import report as eval_report
from . import scenes
from .evaluate import QuestionSet
from .plan import EVAL_SCRIPTS, Workspace, fingerprint
from .prepare import question_set
from .runner import STARTUP_COST, Runner, is_made, read_stamp, write_stamp

BENCHMARKS = {"vqav2": "vqav2.sh", "pope": "pope.sh", "mmbench": "mmbench.sh", "scienceqa": "sqa.sh"}
"""Benchmarks that the held-out questions are written as, and the scripts that run them."""

OPEN_TYPES = ("position", "colour", "where", "read")
"""Question types that become VQAv2's open-ended ones."""

COST = len(BENCHMARKS) * STARTUP_COST
"""Of one checkpoint, in steps of plain fine-tuning."""

_ROTATION = 1_000_000  # MMBench: a rotated copy of question i has the index i + ROTATION
_ANNOTATORS = 10


def make_benchmarks(space: Workspace) -> None:
    """Write the benchmarks' data, once."""
    test = question_set(space, "test")
    mark = fingerprint(test.questions, Path(__file__).read_text(encoding="utf-8"))
    if not is_made(space.eval_dir, mark):
        shutil.rmtree(space.eval_dir, ignore_errors=True)
        write_benchmarks(test, space.eval_dir)
        write_stamp(space.eval_dir, mark)


def run_benchmarks(space: Workspace, runner: Runner, label: str, checkpoint: Path) -> None:
    """Run ``scripts/eval`` on a checkpoint, unless its scores are there.

    Raises:
        StageError: a script failed.
    """
    results = space.results / label
    mark = fingerprint([read_stamp(path)["fingerprint"] for path in (checkpoint, space.eval_dir)])
    if is_made(results, mark):
        runner.advance(COST)
        return
    for name in BENCHMARKS:
        shutil.rmtree(space.eval_dir / name / "answers" / label, ignore_errors=True)
    shutil.rmtree(results, ignore_errors=True)
    environment = {
        "EVAL_DIR": str(space.eval_dir),
        "RESULTS_DIR": str(space.results),
        "DEVICE": "cpu",
        "BATCH_SIZE": "64",
        "SPLIT": "",
    }
    for name, script in BENCHMARKS.items():
        command = ["bash", str(EVAL_SCRIPTS / script), str(checkpoint), label]
        runner.script(f"{name} of {label}", command, environment, space.logs / f"{label}-{name}.log", STARTUP_COST)
    write_stamp(results, mark)


def report_text(space: Workspace, labels: Sequence[str]) -> str:
    """What ``python -m tinyllava_switchkd.eval.report`` says of the models; its files go beside their scores.

    Raises:
        RuntimeError: it failed.
    """
    arguments = [f"{label}={space.results / label}" for label in labels]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = eval_report.main([*arguments, "--include-val", "--output-dir", str(space.results)])
    if code != 0:
        raise RuntimeError(f"The report over {space.results} failed.")
    return output.getvalue().rstrip()


def write_benchmarks(question_set: QuestionSet, root: Path) -> None:
    """Write the four folders in LLaVA's layout.

    Args:
        question_set: scenes and questions of the test split.
        root: what ``EVAL_DIR`` names.
    """
    rows = list(zip(question_set.questions, question_set.scene_of, strict=True))
    _write_vqav2([row for row in rows if row[0]["type"] in OPEN_TYPES], question_set.scenes, root / "vqav2")
    _write_pope([row for row in rows if row[0]["type"] == "yes_no"], question_set.scenes, root / "pope")
    choices = [row for row in rows if row[0]["type"] == "choice"]
    _write_mmbench(choices[0::2], question_set.scenes, root / "mmbench")
    _write_scienceqa(choices[1::2], question_set.scenes, root / "scienceqa")


Rows = Sequence[tuple[dict[str, Any], int]]


def _write_vqav2(rows: Rows, pictures: Sequence[scenes.Scene], folder: Path) -> None:
    _save_images(rows, pictures, folder / "val2014")
    _write_lines(
        folder / "llava_vqav2_mscoco_val2014.jsonl",
        (
            {"question_id": row["question_id"], "image": row["image"], "text": row["question"], "category": "default"}
            for row, _ in rows
        ),
    )
    annotations = [
        {
            "question_id": row["question_id"],
            "image_id": scene,
            "question_type": row["type"],
            "answer_type": "other" if row["type"] == "where" else "number",
            "multiple_choice_answer": row["answer"],
            "answers": [
                # The official scorer turns hyphens of predictions into spaces, but not those of unanimous annotators
                {"answer_id": number + 1, "answer": row["answer"].replace("-", " "), "answer_confidence": "yes"}
                for number in range(_ANNOTATORS)
            ],
        }
        for row, scene in rows
    ]
    scenes.write_json({"annotations": annotations}, folder / "v2_mscoco_val2014_annotations.json")


def _write_pope(rows: Rows, pictures: Sequence[scenes.Scene], folder: Path) -> None:
    """Every object asked for is drawn at random, so there is one category of POPE's three."""
    _save_images(rows, pictures, folder / "val2014")
    _write_lines(
        folder / "llava_pope_test.jsonl",
        (
            {"question_id": row["question_id"], "image": row["image"], "text": row["question"], "category": "random"}
            for row, _ in rows
        ),
    )
    _write_lines(
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
    """A question and its rotation: with two choices, guessing scores a quarter."""
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
        turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": row["answer"]}]
        conversations.append({"id": identifier, "image": row["image"], "conversations": turns})
    scenes.write_json(problems, folder / "problems.json")
    scenes.write_json({"test": list(problems)}, folder / "pid_splits.json")
    scenes.write_json(conversations, folder / "llava_test_CQM-A.json")


def _options(row: dict[str, Any]) -> tuple[str, list[str]]:
    """A choice question's stem and its options."""
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


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
