"""GQA (testdev_balanced): compositional questions, scored by equality of one-word answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
    percentage_by,
    question_line,
    refuse_missing,
    register_benchmark,
    said,
)
from tinyllava_switchkd.eval.benchmarks.files import need_file, require, write_upload
from tinyllava_switchkd.io import JsonObject, read_json, write_json, write_jsonl

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build

GQA_URL = "https://downloads.cs.stanford.edu/nlp/data/gqa/"
QUESTION_FILE = "llava_gqa_testdev_balanced.jsonl"
TRUTH_FILE = "testdev_balanced_questions.json"

_NO_STEP = ("exist", "query: name", "choose name")  # official eval.py: operations that are not a reasoning step


@register_benchmark("gqa")
class GQA(QuestionFileBenchmark):
    """GQA in LLaVA's layout: `data/testdev_balanced_questions.json` is the official file.

    The prediction is the text in lower case without full stops at its end (LLaVA, convert_gqa_for_eval.py). It is right
    if it equals the answer (official eval.py). That script's validity and plausibility are left out, because they need
    files that testdev does not have.
    """

    name, title, folder = "gqa", "GQA", "gqa"
    metric = "accuracy"
    paper_split = "testdev"
    question_files = {"testdev": (QUESTION_FILE,)}  # noqa: RUF012
    image_folders = {"testdev": ("data/images", "images")}  # noqa: RUF012
    truth_files = tuple(folder + TRUTH_FILE for folder in ("data/", "", "data/questions/", "questions/"))
    repos = ("lmms-lab-encoder/GQA", "lmms-lab/GQA")
    sources = ("hf", "official")
    prepared_splits = ("testdev",)
    by_hand = f"{GQA_URL}questions1.2.zip ({TRUTH_FILE} to data/) and {GQA_URL}images.zip (20 GB, to data/images/)"

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        questions, path = self._truth(data_dir)
        joined = join(answers, questions, path)
        questions = self.asked_of(questions)
        rows = []
        gold: dict[str, Counter[str]] = defaultdict(Counter)
        predicted: dict[str, Counter[str]] = defaultdict(Counter)
        for key, question in questions.items():
            parsed = prediction(joined[key].text) if key in joined else None
            correct = float(parsed == question["answer"])
            structural = question["types"]["structural"]
            rows.append(
                {
                    "question_id": key,
                    "cluster": question.get("imageId"),
                    "question": question["question"],
                    **said(joined.get(key)),
                    "parsed": parsed,
                    "truth": question["answer"],
                    "correct": correct,
                    "kind": "open" if structural == "query" else "binary",
                    "structural": structural,
                    "semantic": question["types"]["semantic"],
                    "steps": _steps(question),
                    "words": len(question["question"].split()),
                }
            )
            group = (question.get("groups") or {}).get("global")
            if group is not None:
                gold[group][question["answer"]] += 1
                if parsed is not None:
                    predicted[group][parsed] += 1
        kinds = percentage_by((row["kind"], row["correct"]) for row in rows)
        details: JsonObject = {"accuracy": percentage([row["correct"] for row in rows])}
        details |= {"binary": kinds.get("binary"), "open": kinds.get("open")}
        for column in ("structural", "semantic", "steps", "words"):
            details[column] = percentage_by((row[column], row["correct"]) for row in rows)
        details["distribution"] = distribution(gold, predicted)
        return self.result(split="testdev", details=details, rows=rows)

    def write_submission(
        self, data_dir: str | Path, answers: Sequence[Answer], path: str | Path, allow_missing: bool = False
    ) -> None:
        """Write the official scorer's JSON list of {"questionId", "prediction"}, in the answers' order."""
        questions, source = self._truth(data_dir)
        joined = join(answers, questions, source)
        refuse_missing([key for key in questions if key not in joined], len(questions), allow_missing)
        rows = [{"questionId": key, "prediction": prediction(a.text)} for key, a in joined.items()]
        write_upload(path, rows)

    def _truth(self, data_dir: str | Path) -> tuple[dict[str, dict], Path]:
        """The balanced questions by id, and their file."""
        path = need_file(data_dir, self.truth_files, "GQA ground truth", self.name)
        questions = {}
        for key, question in read_json(path).items():
            where = f"{path}, question {key}"
            require(question, {"question": str, "answer": str, "types": dict}, where)
            require(question["types"], {"structural": str, "semantic": str}, where)
            if question.get("semantic") is not None:
                require(question, {"semantic": list}, where)
                for step in question["semantic"]:
                    require(step, ("operation",), where)
            if question.get("groups") is not None:
                require(question, {"groups": dict}, where)
                if question["groups"].get("global") is not None:
                    require(question["groups"], {"global": str}, where)
            if question.get("isBalanced", True):
                questions[key] = question
        return questions, path

    # ------------------------------------------------------------------------------------------- preparation

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile(QUESTION_FILE, (12_578,)), ExpectedFile(f"data/{TRUTH_FILE}", (12_578,))]

    def from_hf(self, build: Build) -> None:
        for row in build.rows("testdev", "testdev_balanced_images", columns=("id", "image")):
            build.write_image(f"data/images/{row['id']}.jpg", row["image"])
        needed = ("id", "imageId", "question", "answer", "types")
        kept = ("fullAnswer", "isBalanced", "groups", "entailed", "equivalent", "annotations", "semantic")
        rows = build.rows("testdev", "testdev_balanced_instructions", columns=needed, optional=(*kept, "semanticStr"))
        self._write(build, {row.pop("id"): row for row in rows})

    def from_official(self, build: Build) -> None:
        path = build.downloads / "gqa" / TRUTH_FILE
        build.extract(f"{GQA_URL}questions1.2.zip", {TRUTH_FILE: path})
        truth = read_json(path)
        names = {f"{row['imageId']}.jpg" for row in truth.values()}
        build.extract(f"{GQA_URL}images.zip", {name: build.root / "data" / "images" / name for name in names})
        self._write(build, truth)

    def _write(self, build: Build, truth: dict[str, JsonObject]) -> None:
        write_json(build.root / "data" / TRUTH_FILE, truth, indent=None)
        lines = (
            question_line(key, f"{row['imageId']}.jpg", f"{row['question']}\n{SINGLE_WORD_SUFFIX}")
            for key, row in truth.items()
        )
        write_jsonl(build.root / QUESTION_FILE, lines)


def prediction(text: str) -> str:
    """The text that is compared with the answer: in lower case, without any full stops at the end."""
    return text.rstrip(".").lower()


def _steps(question: JsonObject) -> int:
    """Number of reasoning steps: operations except the last, "querying" one."""
    operations = (f"{step.get('operation')}: {step.get('argument')}" for step in question.get("semantic") or ())
    return sum(not any(mark in operation for mark in _NO_STEP) for operation in operations)


def distribution(gold: Mapping[str, Counter[str]], predicted: Mapping[str, Counter[str]]) -> float | None:
    """The official distribution score (lower is better): chi-square of answers, weighted by group size, over 100."""
    weighted, overall = 0.0, 0
    for group, expected in gold.items():
        chi_square = sum((predicted[group][answer] - count) ** 2 / count for answer, count in expected.items())
        weighted += chi_square * expected.total()
        overall += expected.total()
    return weighted / overall / 100 if overall else None
