"""POPE: does the model see objects that are not there? Yes/no questions in three categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import (
    Answer,
    QuestionFileBenchmark,
    Score,
    join,
    prepare_hint,
    register_benchmark,
    strip_suffix,
)
from .files import missing_file, read_jsonl, require

CATEGORIES = ("random", "popular", "adversarial")


@register_benchmark("pope")
class POPE(QuestionFileBenchmark):
    """POPE in LLaVA's layout; the headline is the mean of the three F1 scores, the mean accuracy stands beside it.

    LLaVA's scorer matches answers with labels *by position*, so that its 2,910-row "random" question file against the
    newer 3,000-row labels is scored wrongly without a word. Here a label is found by (category, image, question).
    """

    name, title, folder = "pope", "POPE", "pope"
    metric = "mean_f1"
    question_files = {"test": ("llava_pope_test.jsonl",)}  # noqa: RUF012
    image_folders = {"test": ("val2014",)}  # noqa: RUF012

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        labels = self._labels(Path(data_dir))
        questions: dict[str, tuple[str, str, str]] = {}
        for where, row in self.read_questions(data_dir):
            require(row, {"category": str}, where)
            key = row["category"], row["image"], strip_suffix(row["text"])
            if key not in labels:
                raise ValueError(
                    f"{where}: no label for {key[2]!r} about {key[1]} in coco_pope_{key[0]}.json; "
                    f"the question file and the labels are of different versions of POPE."
                )
            if str(row["question_id"]) in questions:
                raise ValueError(f"{where}: the question id {row['question_id']!r} is there already.")
            questions[str(row["question_id"])] = key
        joined = join(answers, questions, self.question_file(data_dir)[1])
        rows = []
        for identifier, key in questions.items():
            answer = joined.get(identifier)
            if answer is not None and answer.prompt and key[2] not in answer.prompt:
                raise ValueError(
                    f"{answer.where}: the prompt is {answer.prompt!r}, but question {identifier} asks {key[2]!r}; "
                    f"the answers are of another version of the question file."
                )
            row = {"question_id": identifier, "category": key[0], "question": key[2], "truth": labels[key]}
            row["text"] = None if answer is None else answer.text
            row["parsed"] = None if answer is None else read_yes_no(answer.text)
            rows.append(row)
        blocks = {
            category: score_category([row for row in rows if row["category"] == category])
            for category in sorted({row["category"] for row in rows}, key=_order)
        }
        details: dict[str, Any] = dict(blocks)
        for figure in ("f1", "accuracy"):
            details[f"mean_{figure}"] = sum(block[figure] for block in blocks.values()) / len(blocks)
        details["pooled"] = score_category(rows)
        return self.result(
            score=details["mean_f1"],
            split="test",
            total=len(questions),
            answered=len(joined),
            fallback=sum(row["text"] is not None and is_fallback(row["text"]) for row in rows),
            details=details,
            rows=rows,
        )

    def _labels(self, data_dir: Path) -> dict[tuple[str, str, str], str]:
        """The label, "yes" or "no", of each (category, image, question).

        Raises:
            FileNotFoundError: there is no label file.
            ValueError: a label is neither, or a question has both.
        """
        labels: dict[tuple[str, str, str], str] = {}
        names = [f"coco/coco_pope_{category}.json" for category in CATEGORIES]
        for path in sorted((data_dir / "coco").glob("coco_pope_*.json")):
            category = path.stem.removeprefix("coco_pope_")
            for where, row in read_jsonl(path):
                require(row, {"image": str, "text": str, "label": str}, where)
                if row["label"] not in ("yes", "no"):
                    raise ValueError(f"{where}: the label is {row['label']!r}, neither 'yes' nor 'no'.")
                key = category, row["image"], strip_suffix(row["text"])
                if labels.setdefault(key, row["label"]) != row["label"]:
                    raise ValueError(f"{where}: the question {row['text']!r} has another label further up.")
        if not labels:
            raise missing_file(data_dir, names, "POPE labels", prepare_hint(self.name))
        return labels


def _words(text: str) -> list[str]:
    """Words of the first sentence, split at single spaces as the official scorer splits."""
    return text.split(".")[0].replace(",", "").split(" ")


def read_yes_no(text: str) -> str:
    """The answer "no" if the first sentence has the word No, no or not, else "yes" (LLaVA eval_pope.py = official).

    So everything else is a yes: "", "NO", "Nope", "No!" and "No\\nIt ..." included.
    """
    return "no" if {"No", "no", "not"} & set(_words(text)) else "yes"


def is_fallback(text: str) -> bool:
    """Whether the answer is a yes only because it is no recognised no."""
    words = {word.strip("!?;:\"'()").lower() for part in _words(text) for word in part.split()}
    return read_yes_no(text) == "yes" and "yes" not in words


def score_category(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Figures of a category, "yes" being positive; a question without an answer is wrong, whatever its label."""
    confusion: Counter[str] = Counter()
    for row in rows:
        correct = row["parsed"] == row["truth"]
        positive = (row["truth"] == "yes") == correct
        confusion[("T" if correct else "F") + ("P" if positive else "N")] += 1
    tp, fp, tn, fn = (confusion[cell] for cell in ("TP", "FP", "TN", "FN"))
    given = [row["parsed"] for row in rows if row["parsed"] is not None]
    return {
        "accuracy": _ratio(tp + tn, len(rows)),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": _ratio(given.count("yes"), len(given)),
        "questions": len(rows),
        **{"TP": tp, "FP": fp, "TN": tn, "FN": fn},
    }


def _ratio(part: int, whole: int) -> float:
    """On 0-100; 0 of nothing, where the official script divides by zero."""
    return 100.0 * part / whole if whole else 0.0


def _order(category: str) -> tuple[int, str]:
    return (CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES)), category
