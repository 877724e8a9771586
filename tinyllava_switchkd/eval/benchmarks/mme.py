"""MME: two yes/no questions about each picture, fourteen subtasks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import Answer, QuestionFileBenchmark, Score, join, register_benchmark, strip_suffix
from .files import read_text

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_ASK = "Please answer yes or no."


@register_benchmark("mme")
class MME(QuestionFileBenchmark):
    """MME as released, under `MME_Benchmark_release_version`; the headline is perception / 20 (2000 -> 100).

    The official scorer pairs *consecutive lines*, so that a reordered or merged file is scored wrongly without a word.
    Here a pair is the questions about one picture, found by (subtask, picture, question).
    """

    name, title, folder = "mme", "MME", "MME"
    metric = "perception_over_20"
    question_files = {"test": ("llava_mme.jsonl",)}  # noqa: RUF012
    image_folders = {"test": ("MME_Benchmark_release_version",)}  # noqa: RUF012

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        folder = Path(data_dir) / self.image_folders["test"][0]
        truth = read_truth(folder)
        joined = join(answers, truth, folder, lambda answer: self._key(answer, truth))
        rows = []
        for key, expected in truth.items():
            subtask, picture, question = key
            answer = joined.get(key)
            row = {"subtask": subtask, "picture": picture, "question": question, "truth": expected}
            row["text"] = None if answer is None else answer.text
            row["parsed"] = None if answer is None else read_yes_no(answer.text)
            rows.append(row | {"correct": row["parsed"] == expected})
        subtasks = {}
        for subtask in PERCEPTION + COGNITION:
            of_subtask = [row for row in rows if row["subtask"] == subtask]
            if of_subtask:
                subtasks[subtask] = score_subtask(of_subtask)
        perception, cognition = (
            sum(subtasks[subtask]["score"] for subtask in group if subtask in subtasks)
            for group in (PERCEPTION, COGNITION)
        )
        details: dict[str, Any] = {
            "perception": perception,
            "cognition": cognition,
            "total": perception + cognition,
            "total_over_28": (perception + cognition) / 28,
            "subtasks": subtasks,
            "absent_subtasks": [subtask for subtask in PERCEPTION + COGNITION if subtask not in subtasks],
        }
        return self.result(
            score=perception / 20,
            split="test",
            total=len(truth),
            answered=len(joined),
            fallback=sum(row["parsed"] == "other" for row in rows),
            details=details,
            rows=rows,
        )

    @staticmethod
    def _key(answer: Answer, truth: Mapping[tuple[str, str, str], str]) -> tuple[str, str, str]:
        """Subtask, picture and question of an answer, as LLaVA's convert_answer_to_mme.py finds them.

        The release has two spaces before "Please" in some lines, which the converter tries second.

        Raises:
            ValueError: the answer has no prompt.
        """
        if not answer.prompt:
            raise ValueError(
                f"{answer.where}: no 'prompt' (or no text in it), but two questions of MME share the id "
                f"{answer.question_id!r} and only their prompts tell them apart."
            )
        subtask, picture = answer.question_id.split("/")[0], answer.question_id.split("/")[-1].split(".")[0]
        question = strip_suffix(answer.prompt)
        if _ASK not in question:
            question = f"{question} {_ASK}"
        key = subtask, picture, question
        return key if key in truth else (subtask, picture, question.replace(f" {_ASK}", f"  {_ASK}"))


def read_truth(folder: Path) -> dict[tuple[str, str, str], str]:
    """The release's "yes" or "no" for each (subtask, picture without its suffix, question).

    Raises:
        FileNotFoundError: the folder holds no subtask.
        ValueError: a line is not "question<TAB>Yes|No", or a question comes twice.
    """
    truth: dict[tuple[str, str, str], str] = {}
    for subtask in PERCEPTION + COGNITION:
        # Some subtasks keep their pictures and their texts in folders of their own.
        own = folder / subtask / "questions_answers_YN"
        for path in sorted((own if own.is_dir() else folder / subtask).glob("*.txt")):
            for number, line in enumerate(read_text(path).split("\n"), start=1):
                if not line.strip():
                    continue
                question, tab, expected = line.strip().partition("\t")
                if not tab or expected.strip().lower() not in ("yes", "no"):
                    raise ValueError(f"{path}, line {number}: not a question, a tab and Yes or No, but {line!r}.")
                key = subtask, path.stem.split(".")[0], question
                if key in truth:
                    raise ValueError(f"{path}, line {number}: the question {question!r} is there already.")
                truth[key] = expected.strip().lower()
    if not truth:
        raise FileNotFoundError(
            f"No MME ground truth in {folder}: expected <subtask>/<picture>.txt. "
            f"The release is given on request by its authors; unpack it there."
        )
    return truth


def read_yes_no(text: str) -> str:
    """What the first four characters contain, "yes" before "no", or "other" (official calculation.py)."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_subtask(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """A subtask's figures: `acc` counts questions, `acc_plus` pictures with all questions right, `score` is the sum."""
    pictures: dict[str, list[bool]] = defaultdict(list)
    confusion: Counter[str] = Counter()
    for row in rows:
        pictures[row["picture"]].append(row["correct"])
        if row["parsed"] in ("yes", "no"):
            confusion[("T" if row["correct"] else "F") + ("P" if row["parsed"] == "yes" else "N")] += 1
    acc = 100.0 * sum(row["correct"] for row in rows) / len(rows)
    acc_plus = 100.0 * sum(all(correct) for correct in pictures.values()) / len(pictures)
    return {
        "acc": acc,
        "acc_plus": acc_plus,
        "score": acc + acc_plus,
        "questions": len(rows),
        "images": len(pictures),
        **{cell: confusion[cell] for cell in ("TP", "FN", "TN", "FP")},
        "other": sum(row["parsed"] == "other" for row in rows),
    }
