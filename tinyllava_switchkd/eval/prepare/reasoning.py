"""GQA, ScienceQA and MMMU: compositional questions, school science, college exams.

Formats: GQA's ``testdev_balanced_questions.json``; ScienceQA's ``problems.json`` and ``pid_splits.json`` with
LLaVA-1.5's ``llava_test_CQM-A.json``; TinyLLaVA's ``MMMU/anns_for_eval.json`` with MMMU's ``answer_dict_val.json``.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...fetch import extract, write_json, write_jsonl
from ..benchmarks.files import read_json
from .base import (
    LETTER,
    ONE_WORD,
    ExpectedFile,
    Job,
    Preparer,
    question,
    question_images,
    register_preparer,
)

GQA_URL = "https://downloads.cs.stanford.edu/nlp/data/gqa/"
GQA_TRUTH = "testdev_balanced_questions.json"


@register_preparer("gqa")
class Gqa(Preparer):
    """The balanced test-dev split: 12,578 questions on 398 images."""

    name = "gqa"
    title = "GQA"
    folder = "gqa"
    repos = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
    sources = ("hf", "official")
    splits = ("testdev",)
    by_hand = f"{GQA_URL}questions1.2.zip ({GQA_TRUTH} to data/) and {GQA_URL}images.zip (20 GB, to data/images/)"

    def files(self, split: str) -> list[ExpectedFile]:
        return [
            ExpectedFile("llava_gqa_testdev_balanced.jsonl", (12_578,)),
            ExpectedFile(f"data/{GQA_TRUTH}", (12_578,)),
        ]

    def images(self, root: Path, split: str) -> Iterable[str]:
        return question_images(root, "llava_gqa_testdev_balanced.jsonl", "data/images")

    def from_hf(self, job: Job) -> None:
        for row in job.rows("testdev", "testdev_balanced_images", columns=("id", "image")):
            job.write_image(f"data/images/{row['id']}.jpg", row["image"])
        needed = ("id", "imageId", "question", "answer", "types")
        kept = (
            "fullAnswer",
            "isBalanced",
            "groups",
            "entailed",
            "equivalent",
            "annotations",
            "semantic",
            "semanticStr",
        )
        rows = job.rows("testdev", "testdev_balanced_instructions", columns=needed, optional=(*kept, "semanticStr"))
        self._write(job, {row.pop("id"): row for row in rows})

    def from_official(self, job: Job) -> None:
        path = job.downloads / "gqa" / GQA_TRUTH
        if extract(job.official(f"{GQA_URL}questions1.2.zip"), {GQA_TRUTH: path}):
            raise ValueError(f"questions1.2.zip in {job.downloads} lacks {GQA_TRUTH}; delete it and run again.")
        truth = read_json(path, dict)
        names = {f"{row['imageId']}.jpg" for row in truth.values()}
        images = {name: job.root / "data" / "images" / name for name in names}
        if not all(target.is_file() for target in images.values()):
            lacking = extract(job.official(f"{GQA_URL}images.zip"), images)
            if lacking:
                raise ValueError(f"images.zip in {job.downloads} lacks {lacking[0]} and {len(lacking) - 1} others.")
        self._write(job, truth)

    def _write(self, job: Job, truth: dict[str, dict[str, Any]]) -> None:
        write_json(job.root / "data" / GQA_TRUTH, truth)
        write_jsonl(
            job.root / "llava_gqa_testdev_balanced.jsonl",
            (question(key, f"{row['imageId']}.jpg", f"{row['question']}\n{ONE_WORD}") for key, row in truth.items()),
        )


SCIENCEQA_URL = "https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/scienceqa/"
SCIENCEQA_IMAGES_URL = "https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip"
SCIENCEQA_KEYS = (
    "question",
    "choices",
    "answer",
    "hint",
    "task",
    "grade",
    "subject",
    "topic",
    "category",
    "skill",
    "lecture",
    "solution",
)


@register_preparer("scienceqa")
class ScienceQa(Preparer):
    """The test split: 4,241 questions, of which 2,017 have an image and make the score.

    The authors' files carry the question ids; the hub's copy has none, so its rows are numbered.
    """

    name = "scienceqa"
    title = "ScienceQA"
    folder = "scienceqa"
    repos = ("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA")
    sources = ("official", "hf")
    splits = ("test",)
    by_hand = f"{SCIENCEQA_URL}problems.json, {SCIENCEQA_URL}pid_splits.json, {SCIENCEQA_IMAGES_URL} (to images/test/)"

    def files(self, split: str) -> list[ExpectedFile]:
        return [
            ExpectedFile("llava_test_CQM-A.json", (4_241,)),
            ExpectedFile("problems.json", (21_208, 4_241)),
            ExpectedFile("pid_splits.json", (4_241,)),
        ]

    def images(self, root: Path, split: str) -> Iterable[str]:
        rows = read_json(root / "llava_test_CQM-A.json", list)
        return (f"images/test/{row['image']}" for row in rows if "image" in row)

    def from_official(self, job: Job) -> None:
        problems = read_json(job.official(f"{SCIENCEQA_URL}problems.json"), dict)
        splits = read_json(job.official(f"{SCIENCEQA_URL}pid_splits.json"), dict)
        names = {f"{pid}/{problems[pid]['image']}" for pid in splits["test"] if problems[pid]["image"]}
        images = {name: job.root / "images" / "test" / name for name in names}
        if not all(target.is_file() for target in images.values()):
            lacking = extract(job.official(SCIENCEQA_IMAGES_URL), images)
            if lacking:
                raise ValueError(f"test.zip in {job.downloads} lacks {lacking[0]} and {len(lacking) - 1} others.")
        self._write(job, problems, splits)

    def from_hf(self, job: Job) -> None:
        problems = {}
        rows = job.rows("test", "ScienceQA-FULL", columns=SCIENCEQA_KEYS[:4], optional=("image", *SCIENCEQA_KEYS[4:]))
        for number, row in enumerate(rows, start=1):
            pid = str(number)
            if row.get("image"):
                job.write_image(f"images/test/{pid}/image.png", row["image"])
            problems[pid] = {key: row[key] for key in SCIENCEQA_KEYS if key in row}
            problems[pid] |= {"image": "image.png" if row.get("image") else None, "split": "test"}
        self._write(job, problems, {"test": list(problems)})

    def _write(self, job: Job, problems: dict[str, dict[str, Any]], splits: dict[str, list[str]]) -> None:
        write_json(job.root / "problems.json", problems)
        write_json(job.root / "pid_splits.json", splits)
        rows = [scienceqa_sample(pid, problems[pid]) for pid in splits["test"]]
        write_json(job.root / "llava_test_CQM-A.json", rows, indent=1)


def scienceqa_sample(pid: str, problem: dict[str, Any]) -> dict[str, Any]:
    """One entry of ``llava_test_CQM-A.json`` as LLaVA-1.5 was evaluated.

    LLaVA's own converter, asked for "CQM-A", writes an older text ("Context: N/A ... Options: (A) ...") that costs
    many points (LLaVA #1294); the file in its eval.zip has this one.
    """
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    letters = string.ascii_uppercase
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, problem["choices"], strict=False))
    value = f"{context}{problem['question']}{options}"
    sample: dict[str, Any] = {"id": pid}
    if problem.get("image"):
        sample["image"] = f"{pid}/{problem['image']}"
        value += "\n<image>"
    sample["conversations"] = [
        {"from": "human", "value": value},
        {"from": "gpt", "value": letters[problem["answer"]]},
    ]
    return sample


@register_preparer("mmmu")
class Mmmu(Preparer):
    """The validation split: 900 questions of 30 subjects.

    A question with several images gets the first one, as in the authors' code for LLaVA (MMMU #9). TinyLLaVA's file has
    none for those, and its evaluation guesses.
    """

    name = "mmmu"
    title = "MMMU"
    folder = "MMMU"
    repos = ("lmms-lab-encoder/MMMU", "lmms-lab/MMMU", "MMMU/MMMU")
    by_hand = "https://huggingface.co/datasets/MMMU/MMMU"

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile("anns_for_eval.json", (900,)), ExpectedFile("eval/answer_dict_val.json", (900,))]

    def images(self, root: Path, split: str) -> Iterable[str]:
        return (f"all_images/{row['image']}" for row in read_json(root / "anns_for_eval.json", list) if "image" in row)

    def from_hf(self, job: Job) -> None:
        samples, answers = [], {}
        columns = ("id", "question", "options", "answer", "question_type", "image_1")
        for row in job.rows("validation", "*", columns):
            name = f"{row['id']}_1.png"
            job.write_image(f"all_images/{name}", row["image_1"])
            samples.append(mmmu_sample(row) | {"image": name, "img_path": name})
            kind = "multiple-choice" if row["question_type"] == "multiple-choice" else "short-answer"
            answers[row["id"]] = {"question_type": kind, "ground_truth": _listed(row["answer"])}
        write_json(job.root / "eval" / "answer_dict_val.json", answers, indent=1)
        write_json(job.root / "anns_for_eval.json", samples, indent=1)


def mmmu_sample(row: dict[str, Any]) -> dict[str, Any]:
    """The text part of one entry of ``anns_for_eval.json``; prompts as MMMU's ``llava1.5.yaml`` builds them.

    Raises:
        ValueError: the options are not a list.
    """
    sample = {"id": row["id"], "question_type": row["question_type"], "all_choices": [], "index2ans": {}}
    if row["question_type"] == "multiple-choice":
        options = _listed(row["options"])
        if not isinstance(options, list):
            raise ValueError(f"MMMU question {row['id']}: the options are not a list: {row['options']!r}.")
        sample["index2ans"] = dict(zip(string.ascii_uppercase, map(str, options), strict=False))
        sample["all_choices"] = list(sample["index2ans"])
        lines = "".join(f"({letter}) {text}\n" for letter, text in sample["index2ans"].items())
        sample["prompt"] = f"{row['question']}\n{lines}\n{LETTER}"
    else:
        sample["prompt"] = f"{row['question']}\n{ONE_WORD}"
    sample["answer"] = row["answer"]
    return sample


def _listed(text: str) -> Any:
    """Lists are stored as text (``"['24/7', '3.429']"``); anything else is itself."""
    if not (text.startswith("[") and text.endswith("]")):
        return text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return value if isinstance(value, list) else text
