"""POPE: does the model see objects that are not in the picture? Yes/no questions in three categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
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
    register_benchmark,
    said,
    strip_suffix,
)
from tinyllava_switchkd.eval.benchmarks.files import missing_file, require
from tinyllava_switchkd.io import JsonObject, read_jsonl, write_jsonl

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build
    from tinyllava_switchkd.statistics import Figure, Sums

CATEGORIES = ("random", "popular", "adversarial")
YES_NO = {"yes": "yes", "no": "no"}

# The commit that LLaVA pins: its "random" file has 2,910 rows, the newest (and the hub's) 3,000.
POPE_URL = "https://raw.githubusercontent.com/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco/"


@register_benchmark("pope")
class POPE(QuestionFileBenchmark):
    """POPE in LLaVA's layout; the headline is the mean of the three F1 scores, and the mean accuracy is in the details.

    LLaVA's scorer matches answers with labels *by position*, so it silently misjudges its 2,910-row "random" question
    file with the newer 3,000-row labels. Here a label is found by (category, image, question).
    """

    name, title, folder = "pope", "POPE", "pope"
    metric = "mean_f1"
    question_files = {"test": ("llava_pope_test.jsonl",)}  # noqa: RUF012
    image_folders = {"test": ("val2014",)}  # noqa: RUF012
    repos = ("lmms-lab-encoder/POPE", "lmms-lab/POPE")
    sources = ("official", "hf")  # labels of LLaVA's commit with the hub's images, or everything from the hub
    prepared_splits = ("test",)
    by_hand = f"coco_pope_*.json from {POPE_URL} to coco/, COCO's val2014.zip to val2014/"

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
                raise ValueError(f"{where}: the question id {row['question_id']!r} occurs twice.")
            questions[str(row["question_id"])] = key
        joined = join(answers, questions, self.question_file(data_dir)[1])
        questions = self.asked_of(questions)
        rows = []
        for identifier, key in questions.items():
            answer = joined.get(identifier)
            if answer is not None and answer.prompt and key[2] not in answer.prompt:
                raise ValueError(
                    f"{answer.where}: the prompt is {answer.prompt!r}, but question {identifier} asks {key[2]!r}; "
                    f"the answers are of another version of the question file."
                )
            row = {"question_id": identifier, "cluster": key[1], "category": key[0], "question": key[2]}
            row |= {"truth": labels[key], **said(answer), "parsed": None, "unread": False}
            if answer is not None:
                row["unread"] = is_fallback(answer.text)
                judged = self.read_by_judge(answer, YES_NO) if row["unread"] else None
                row["parsed"] = judged or read_yes_no(answer.text)
            row["correct"] = row["parsed"] == row["truth"]
            rows.append(row)
        blocks = {
            category: score_category([row for row in rows if row["category"] == category])
            for category in sorted({row["category"] for row in rows}, key=_order)
        }
        details: JsonObject = dict(blocks)
        for figure in ("f1", "accuracy"):
            details[f"mean_{figure}"] = sum(block[figure] for block in blocks.values()) / len(blocks)
        details["pooled"] = score_category(rows)
        return self.result(split="test", details=details, rows=rows)

    def units(self, rows: Iterable[JsonObject]) -> Iterator[tuple[Hashable, Hashable, dict[str, float]]]:
        for row in rows:
            yield row["cluster"], row["question_id"], {f"{row['category']}:{_cell(row)}": 1.0}

    def headline(self, sums: Sums) -> Figure:
        categories = {key.partition(":")[0] for key in sums}
        return sum(_f1(sums, category) for category in categories) / len(categories)

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
                    raise ValueError(f"{where}: the question {row['text']!r} has another label in an earlier line.")
        if not labels:
            raise missing_file(data_dir, names, "POPE labels", self.name)
        return labels

    # ------------------------------------------------------------------------------------------- preparation

    def files(self, split: str) -> list[ExpectedFile]:
        rows = {"random": (2_910, 3_000)}
        labels = [ExpectedFile(f"coco/coco_pope_{name}.json", rows.get(name, (3_000,))) for name in CATEGORIES]
        return [ExpectedFile("llava_pope_test.jsonl", (8_910, 9_000)), *labels]

    def from_official(self, build: Build) -> None:
        labels = {}
        for name in sorted(CATEGORIES):
            labels[name] = [row for _, row in read_jsonl(build.official(f"{POPE_URL}coco_pope_{name}.json"))]
        wanted = {row["image"] for rows in labels.values() for row in rows}
        if not all((build.root / "val2014" / image).is_file() for image in wanted):
            for row in build.rows("test", columns=("image_source", "image")):
                if (image := _coco_file(row["image_source"])) in wanted:
                    build.write_image(f"val2014/{image}", row["image"])
        self._write(build, labels)

    def from_hf(self, build: Build) -> None:
        labels: dict[str, list[dict]] = {name: [] for name in sorted(CATEGORIES)}
        columns = ("question_id", "question", "answer", "image_source", "image", "category")
        for row in build.rows("test", columns=columns):
            if row["category"] not in labels:
                raise ValueError(f"POPE has no category {row['category']!r}; it has {', '.join(labels)}.")
            image = _coco_file(row["image_source"])
            build.write_image(f"val2014/{image}", row["image"])
            labels[row["category"]].append(
                {
                    "question_id": int(row["question_id"]),
                    "image": image,
                    "text": row["question"],
                    "label": row["answer"].strip().lower(),
                }
            )
        self._write(build, labels)

    def _write(self, build: Build, labels: dict[str, list[dict]]) -> None:
        for name, rows in labels.items():
            write_jsonl(build.root / "coco" / f"coco_pope_{name}.json", rows)
        everything = [(row, name) for name, rows in labels.items() for row in rows]
        lines = (
            # Ids restart in every category file; LLaVA numbers all questions consecutively.
            question_line(number, row["image"], f"{row['text']}\n{SINGLE_WORD_SUFFIX}", name)
            for number, (row, name) in enumerate(everything, start=1)
        )
        write_jsonl(build.root / "llava_pope_test.jsonl", lines)


def _coco_file(name: str) -> str:
    """The file name of an image; the hub omits the suffix."""
    return f"{name.removesuffix('.jpg')}.jpg"


def _words(text: str) -> list[str]:
    """Words of the first sentence, split at single spaces as in the official scorer."""
    return text.split(".")[0].replace(",", "").split(" ")


def read_yes_no(text: str) -> str:
    """Return "no" if the first sentence has the word No, no or not, else "yes" (LLaVA eval_pope.py = official).

    So everything else is a yes, including "", "NO", "Nope", "No!" and "No\\nIt ...".
    """
    return "no" if {"No", "no", "not"} & set(_words(text)) else "yes"


def is_fallback(text: str) -> bool:
    """Whether the answer is a yes only because it is not a recognised no."""
    words = {word.strip("!?;:\"'()").lower() for part in _words(text) for word in part.split()}
    return read_yes_no(text) == "yes" and "yes" not in words


def _cell(row: JsonObject) -> str:
    """TP, FP, TN or FN."""
    correct = row["parsed"] == row["truth"]
    positive = (row["truth"] == "yes") == correct
    return ("T" if correct else "F") + ("P" if positive else "N")


def _f1(sums: Sums, category: str) -> Figure:
    tp, fp, fn = (sums.get(f"{category}:{cell}", 0.0) for cell in ("TP", "FP", "FN"))
    whole = 2 * tp + fp + fn
    return 200.0 * tp / (whole + (whole == 0))


def score_category(rows: Sequence[JsonObject]) -> dict[str, float | int]:
    """Figures of a category, with "yes" as the positive class; a question without an answer is always wrong."""
    confusion = Counter(map(_cell, rows))
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
    """On 0-100; 0 if `whole` is 0, for which the official script divides by zero."""
    return 100.0 * part / whole if whole else 0.0


def _order(category: str) -> tuple[int, str]:
    return (CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES)), category
