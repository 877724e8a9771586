"""ScienceQA: school questions with choices, half of them about a picture; the headline covers only those."""

from __future__ import annotations

import re
import string
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.eval.benchmarks.base import (
    LETTER_SUFFIX,
    Answer,
    Benchmark,
    ExpectedFile,
    Option,
    Question,
    Score,
    image_folder,
    join,
    percentage,
    register_benchmark,
    said,
)
from tinyllava_switchkd.eval.benchmarks.files import ID, need_file, picture_path, require
from tinyllava_switchkd.io import JsonObject, read_json, write_json

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build

SCIENCEQA_URL = "https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/scienceqa/"
SCIENCEQA_IMAGES_URL = "https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip"
QUESTION_FILE = "llava_test_CQM-A.json"
_KEPT = (
    *("question", "choices", "answer", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture"),
    "solution",
)

LETTERS = "ABCDE"
FAILED = "FAILED"

# The last character is required but may be anything: "The answer is B" fails, "The answer is Boston." is B.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_IMAGE_TOKEN = "<image>"


@register_benchmark("scienceqa", "sqa")
class ScienceQA(Benchmark):
    """ScienceQA's test split in LLaVA's layout (`problems.json`, `pid_splits.json`, `llava_test_CQM-A.json`).

    The problem decides whether a question is an image question, not the answer's prompt, so a missing answer stays in
    the denominator.
    """

    name, title, folder = "scienceqa", "ScienceQA-IMG", "scienceqa"
    column = "SciQA"
    metric = "image_accuracy"
    max_new_tokens = 1024
    options = (Option("image_only", "ScienceQA: ask only the questions with a picture, which make up the headline"),)
    repos = ("lmms-lab-encoder/ScienceQA", "lmms-lab/ScienceQA")
    sources = ("official", "hf")  # only the authors' files have the question ids
    prepared_splits = ("test",)
    by_hand = f"{SCIENCEQA_URL}problems.json, {SCIENCEQA_URL}pid_splits.json, {SCIENCEQA_IMAGES_URL} (to images/test/)"

    def questions(self, data_dir: str | Path, split: str | None = None) -> Iterator[Question]:
        if split not in (None, "test"):
            raise ValueError(f"{self.title} is evaluated on its test split, not on {split!r}.")
        path = need_file(data_dir, (QUESTION_FILE,), "ScienceQA question file", self.name)
        folder = image_folder(data_dir, ("images/test", "images", "test"))
        for number, item in enumerate(read_json(path, list)):
            where = f"{path}, entry {number}"
            require(item, {"id": ID, "conversations": list}, where)
            if not item["conversations"]:
                raise ValueError(f"{where}: no conversation.")
            require(item["conversations"][0], {"value": str}, where)
            text = item["conversations"][0]["value"].replace(_IMAGE_TOKEN, "").strip()
            prompt = f"{text}\n{LETTER_SUFFIX}"
            if item.get("image") is not None:
                require(item, {"image": str}, where)
                image = picture_path(folder, item["image"], where)
                yield Question(item["id"], prompt, image, logged_prompt=f"{_IMAGE_TOKEN}\n{prompt}")
            elif not self.settings["image_only"]:
                yield Question(item["id"], prompt, None)

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        problems, path = self._problems(data_dir)
        joined = join(answers, problems, path)
        problems = self.asked_of(problems)
        rows: list[JsonObject] = []
        for key, problem in problems.items():
            answer = joined.get(key)
            truth = LETTERS[problem["answer"]]
            parsed = None if answer is None else read_letter(answer.text)
            unread = parsed == FAILED
            if answer is not None and unread:
                parsed = self.read_by_judge(answer, dict(zip(LETTERS, problem["choices"], strict=False))) or FAILED
            # A letter beyond the choices is wrong, since the truth is always one of them.
            row = {"question_id": key, "question": problem.get("question"), **said(answer), "parsed": parsed}
            row |= {"truth": truth, "correct": parsed == truth, "unread": unread}
            rows.append(row | {"image": problem.get("image") is not None})
        with_image = [row for row in rows if row["image"]]
        details = {
            "image_accuracy": percentage([row["correct"] for row in with_image]),
            "accuracy": percentage([row["correct"] for row in rows]),
            "text_accuracy": percentage([row["correct"] for row in rows if not row["image"]]),
            "image_total": len(with_image),
            "image_correct": sum(row["correct"] for row in with_image),
            "image_missing": sum(row["text"] is None for row in with_image),
            "correct": sum(row["correct"] for row in rows),
        }
        return self.result(split="test", details=details, rows=rows)

    def units(self, rows: Iterable[JsonObject]) -> Iterator[tuple[Hashable, Hashable, dict[str, float]]]:
        return super().units(row for row in rows if row["image"])

    def _problems(self, data_dir: str | Path) -> tuple[dict[str, dict], Path]:
        """The test split's problems by id, and the file that lists them."""
        problems_path = need_file(data_dir, ("problems.json",), "ScienceQA problems", self.name)
        splits_path = need_file(data_dir, ("pid_splits.json",), "ScienceQA splits", self.name)
        problems, splits = read_json(problems_path), read_json(splits_path)
        require(splits, {"test": list}, str(splits_path))
        test = {}
        for identifier in map(str, splits["test"]):
            if identifier not in problems:
                raise ValueError(f"{splits_path}: the test problem {identifier!r} is not in {problems_path}.")
            problem, where = problems[identifier], f"{problems_path}, problem {identifier}"
            require(problem, {"choices": list, "answer": int}, where)
            if problem["answer"] not in range(min(len(problem["choices"]), len(LETTERS))):
                raise ValueError(
                    f"{where}: the answer {problem['answer']!r} is none of its {len(problem['choices'])} choices."
                )
            test[identifier] = problem
        return test, splits_path

    # ------------------------------------------------------------------------------------------- preparation

    def files(self, split: str) -> list[ExpectedFile]:
        return [
            ExpectedFile(QUESTION_FILE, (4_241,)),
            ExpectedFile("problems.json", (21_208, 4_241)),
            ExpectedFile("pid_splits.json", (4_241,)),
        ]

    def images(self, root: Path, split: str) -> Iterable[str]:
        return (f"images/test/{row['image']}" for row in read_json(root / QUESTION_FILE, list) if "image" in row)

    def from_official(self, build: Build) -> None:
        problems = read_json(build.official(f"{SCIENCEQA_URL}problems.json"))
        splits = read_json(build.official(f"{SCIENCEQA_URL}pid_splits.json"))
        names = {f"{pid}/{problems[pid]['image']}" for pid in splits["test"] if problems[pid]["image"]}
        build.extract(SCIENCEQA_IMAGES_URL, {name: build.root / "images" / "test" / name for name in names})
        self._write(build, problems, splits)

    def from_hf(self, build: Build) -> None:
        problems = {}
        rows = build.rows("test", "ScienceQA-FULL", columns=_KEPT[:4], optional=("image", *_KEPT[4:]))
        for number, row in enumerate(rows, start=1):
            pid = str(number)
            if row.get("image"):
                build.write_image(f"images/test/{pid}/image.png", row["image"])
            problems[pid] = {key: row[key] for key in _KEPT if key in row}
            problems[pid] |= {"image": "image.png" if row.get("image") else None, "split": "test"}
        self._write(build, problems, {"test": list(problems)})

    def _write(self, build: Build, problems: dict[str, JsonObject], splits: dict[str, list[str]]) -> None:
        write_json(build.root / "problems.json", problems, indent=None)
        write_json(build.root / "pid_splits.json", splits, indent=None)
        write_json(build.root / QUESTION_FILE, [sample(pid, problems[pid]) for pid in splits["test"]], indent=1)


def sample(pid: str, problem: JsonObject) -> JsonObject:
    """One entry of ``llava_test_CQM-A.json`` as LLaVA-1.5 was evaluated.

    LLaVA's own converter for "CQM-A" writes an older text ("Context: N/A ... Options: (A) ..."), which costs many
    points (LLaVA #1294). This is the text of the file in LLaVA's eval.zip.
    """
    context = f"Context: {problem['hint']}\n" if problem.get("hint") else ""
    letters = string.ascii_uppercase
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(letters, problem["choices"], strict=False))
    value = f"{context}{problem['question']}{choices}"
    entry: JsonObject = {"id": pid}
    if problem.get("image"):
        entry["image"] = f"{pid}/{problem['image']}"
        value += f"\n{_IMAGE_TOKEN}"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": letters[problem["answer"]]}]
    return entry | {"conversations": turns}


def read_letter(text: str) -> str:
    """The chosen letter, or FAILED (LLaVA eval_science_qa.py).

    The text must be a letter, start with a letter, a full stop and a space, or have "The answer is X." exactly once.
    """
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED
