"""ScienceQA: school questions with choices, half of them about a picture; the headline is over those."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .base import (
    LETTER_SUFFIX,
    Answer,
    Benchmark,
    Question,
    Score,
    image_folder,
    join,
    percentage,
    prepare_hint,
    register_benchmark,
)
from .files import ID, need_file, read_json, require

LETTERS = "ABCDE"
FAILED = "FAILED"

# The last character is any character, and must be there: "The answer is B" fails, "The answer is Boston." is B.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")
_IMAGE_TOKEN = "<image>"


@register_benchmark("scienceqa", "sqa")
class ScienceQA(Benchmark):
    """ScienceQA's test split in LLaVA's layout (`problems.json`, `pid_splits.json`, `llava_test_CQM-A.json`).

    Whether a question counts as an image question is read from the problem, not from the answer's prompt, so that a
    missing answer stays in the denominator.
    """

    name, title, folder = "scienceqa", "ScienceQA-IMG", "scienceqa"
    metric = "image_accuracy"
    max_new_tokens = 1024

    def questions(self, data_dir: str | Path, split: str | None = None) -> Iterator[Question]:
        if split not in (None, "test"):
            raise ValueError(f"{self.title} is evaluated on its test split, not on {split!r}.")
        path = need_file(data_dir, ("llava_test_CQM-A.json",), "ScienceQA question file", prepare_hint(self.name))
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
                yield Question(item["id"], prompt, folder / item["image"], logged_prompt=f"{_IMAGE_TOKEN}\n{prompt}")
            else:
                yield Question(item["id"], prompt, None)

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        problems, path = self._problems(data_dir)
        joined = join(answers, problems, path)
        rows: list[dict[str, Any]] = []
        for key, problem in problems.items():
            answer = joined.get(key)
            truth = LETTERS[problem["answer"]]
            parsed = None if answer is None else read_letter(answer.text)
            rows.append(
                {
                    "question_id": key,
                    "text": None if answer is None else answer.text,
                    "parsed": parsed,
                    "truth": truth,
                    # A letter beyond the choices is none of them; the truth is always one of them.
                    "correct": parsed == truth,
                    "image": problem.get("image") is not None,
                }
            )
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
        return self.result(
            score=details["image_accuracy"],
            split="test",
            total=len(rows),
            answered=len(joined),
            fallback=sum(row["parsed"] == FAILED for row in rows),
            details=details,
            rows=rows,
        )

    def _problems(self, data_dir: str | Path) -> tuple[dict[str, dict], Path]:
        """The test split's problems by id, and the file that lists them."""
        hint = prepare_hint(self.name)
        problems_path = need_file(data_dir, ("problems.json",), "ScienceQA problems", hint)
        splits_path = need_file(data_dir, ("pid_splits.json",), "ScienceQA splits", hint)
        problems, splits = read_json(problems_path, dict), read_json(splits_path, dict)
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


def read_letter(text: str) -> str:
    """The chosen letter, or FAILED (LLaVA eval_science_qa.py).

    The text is a letter; or it starts with a letter, a full stop and a space; or it has "The answer is X." once.
    """
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED
