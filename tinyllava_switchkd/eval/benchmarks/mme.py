"""MME: two yes/no questions about each picture, fourteen subtasks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
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
from tinyllava_switchkd.io import JsonObject, read_text, write_jsonl, write_text

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build
    from tinyllava_switchkd.statistics import Figure, Sums

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

RELEASE = "MME_Benchmark_release_version"
IN_FOLDERS = frozenset({"artwork", "celebrity", "landmark", "posters", "scene"})
"""Subtasks with subfolders `images/` and `questions_answers_YN/` in the release; the hub's ids are flat for all."""
_ASK = "Please answer yes or no."
_YES_NO = {"yes": "yes", "no": "no"}


@register_benchmark("mme")
class MME(QuestionFileBenchmark):
    """MME as released, under `MME_Benchmark_release_version`; the headline is perception / 20 (2000 -> 100).

    The official scorer pairs *consecutive lines*, so it silently misjudges a reordered or merged file. Here a pair is
    the questions about one picture, found by (subtask, picture, question).
    """

    name, title, folder = "mme", "MME", "MME"
    metric = "perception_over_20"
    question_files = {"test": ("llava_mme.jsonl",)}  # noqa: RUF012
    image_folders = {"test": (RELEASE,)}  # noqa: RUF012
    repos = ("lmms-lab-encoder/MME", "lmms-lab/MME")
    sources = ("hf", "official")
    prepared_splits = ("test",)
    by_hand = f"ask the authors (BradyFU/Awesome-Multimodal-Large-Language-Models) and unpack {RELEASE}/ here"

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        folder = Path(data_dir) / self.image_folders["test"][0]
        truth = read_truth(folder)
        joined = join(answers, truth, folder, lambda answer: self._key(answer, truth))
        truth = self.asked_of(truth, lambda answer: self._key(answer, truth))
        rows = []
        for key, expected in truth.items():
            subtask, picture, question = key
            answer = joined.get(key)
            row: JsonObject = {"question_id": f"{subtask}/{picture}" if answer is None else answer.question_id}
            row |= {"cluster": f"{subtask}/{picture}", "subtask": subtask, "picture": picture, "question": question}
            row |= {"truth": expected, **said(answer), "parsed": None}
            if answer is not None:
                row["parsed"] = read_yes_no(answer.text)
                if row["parsed"] == "other":
                    row["parsed"] = self.read_by_judge(answer, _YES_NO) or "other"
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
        details: JsonObject = {
            "perception": perception,
            "cognition": cognition,
            "total": perception + cognition,
            "total_over_28": (perception + cognition) / 28,
            "subtasks": subtasks,
            "absent_subtasks": [subtask for subtask in PERCEPTION + COGNITION if subtask not in subtasks],
        }
        hundredth = self._hundredth(sum(subtask in subtasks for subtask in PERCEPTION))
        return self.result(
            score=perception / hundredth if hundredth else None,
            split="test",
            fallback=sum(row["parsed"] == "other" for row in rows),
            details=details,
            rows=rows,
        )

    def _hundredth(self, subtasks: int) -> int:
        """A hundredth of the highest perception score: 2,000, or 200 per subtask if only a part was asked."""
        return 20 if self.asked is None else 2 * subtasks

    def units(self, rows: Iterable[JsonObject]) -> Iterator[tuple[Hashable, Hashable, dict[str, float]]]:
        pictures: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for row in rows:
            pictures[row["subtask"], row["picture"]].append(row["correct"])
        for (subtask, picture), correct in pictures.items():
            parts = {"right": sum(correct), "questions": len(correct), "all": all(correct), "pictures": 1}
            yield (subtask, picture), (subtask, picture), {f"{subtask}:{key}": float(v) for key, v in parts.items()}

    def headline(self, sums: Sums) -> Figure:
        found = [subtask for subtask in PERCEPTION if f"{subtask}:pictures" in sums]
        total: Figure = 0.0
        for subtask in found:
            right, questions, whole, pictures = (
                sums[f"{subtask}:{key}"] for key in ("right", "questions", "all", "pictures")
            )
            total = total + 100.0 * (right / (questions + (questions == 0)) + whole / (pictures + (pictures == 0)))
        return total / self._hundredth(len(found))

    # ------------------------------------------------------------------------------------------- preparation

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile("llava_mme.jsonl", (2_374,))]

    def images(self, root: Path, split: str) -> Iterable[str]:
        """Images, each with the text file of its two questions and answers."""
        for image in super().images(root, split):
            yield image
            yield answer_file(image)

    def from_hf(self, build: Build) -> None:
        pairs: dict[str, list[str]] = {}
        questions = []
        for row in build.rows("test", columns=("question_id", "image", "question", "answer", "category")):
            category, file = row["category"], row["question_id"].rsplit("/", 1)[-1]
            image = f"{category}/images/{file}" if category in IN_FOLDERS else f"{category}/{file}"
            build.write_image(f"{RELEASE}/{image}", row["image"])
            pairs.setdefault(image, []).append(f"{row['question']}\t{row['answer']}")
            questions.append(_question(image, row["question"]))
        _check_pairs(pairs)
        for image, lines in pairs.items():
            write_text(build.inside(answer_file(f"{RELEASE}/{image}")), "\n".join(lines) + "\n")
        write_jsonl(build.root / "llava_mme.jsonl", questions)

    def from_official(self, build: Build) -> None:
        release = build.root / RELEASE
        if not release.is_dir():
            raise FileNotFoundError(f"MME's release is not unpacked at {release}; {self.by_hand}")
        images = (path for path in sorted(release.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        names = [name for path in images if not (name := path.relative_to(release).as_posix()).startswith("eval_tool/")]
        pairs = {image: [question for question, _ in read_pairs(release / answer_file(image))] for image in names}
        _check_pairs(pairs)
        questions = (_question(image, question) for image, both in pairs.items() for question in both)
        write_jsonl(build.root / "llava_mme.jsonl", questions)

    @staticmethod
    def _key(answer: Answer, truth: Mapping[tuple[str, str, str], str]) -> tuple[str, str, str]:
        """Subtask, picture and question of an answer, as in LLaVA's convert_answer_to_mme.py.

        Some lines of the release have two spaces before "Please"; like the converter, this tries one space first.

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
        ValueError: a file is malformed, or has a question twice.
    """
    truth: dict[tuple[str, str, str], str] = {}
    for subtask in PERCEPTION + COGNITION:
        # Some subtasks have subfolders for pictures and texts.
        own = folder / subtask / "questions_answers_YN"
        for path in sorted((own if own.is_dir() else folder / subtask).glob("*.txt")):
            for question, expected in read_pairs(path):
                key = subtask, path.stem.split(".")[0], question
                if key in truth:
                    raise ValueError(f"{path}: the question {question!r} occurs twice.")
                truth[key] = expected
    if not truth:
        raise FileNotFoundError(
            f"No MME ground truth in {folder}: expected <subtask>/<picture>.txt. "
            f"Ask its authors for the release and unpack it there."
        )
    return truth


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The questions about a picture with their answers, "yes" or "no".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not "question<TAB>Yes|No".
    """
    if not path.is_file():
        raise FileNotFoundError(f"MME's release lacks {path}, the questions about an image; unpack it again.")
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            question, tab, expected = line.strip().partition("\t")
            if not tab or expected.strip().lower() not in ("yes", "no"):
                raise ValueError(f"{path}, line {number}: not a question, a tab and Yes or No, but {line!r}.")
            yield question, expected.strip().lower()


def read_yes_no(text: str) -> str:
    """Return "yes" or else "no" if the first four characters contain it, or "other" (official calculation.py)."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_subtask(rows: Sequence[JsonObject]) -> dict[str, float | int]:
    """A subtask's figures: `acc` is over questions, `acc_plus` over pictures (all right), and `score` is their sum."""
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


def answer_file(image: str) -> str:
    """The release's file with an image's questions: ``a/1.jpg`` -> ``a/1.txt``, or in the subtask's subfolder."""
    stem = image.rsplit(".", 1)[0]
    return f"{stem.replace('/images/', '/questions_answers_YN/')}.txt"


def _question(image: str, text: str) -> dict[str, str | int]:
    text = text.strip().removesuffix(_ASK).strip()
    return question_line(image, image, f"{text}\n{SINGLE_WORD_SUFFIX}", image.split("/", 1)[0])


def _check_pairs(pairs: Mapping[str, list[str]]) -> None:
    odd = [image for image, lines in pairs.items() if len(lines) != 2]
    if odd:
        raise ValueError(f"MME asks two questions per image, but {len(pairs[odd[0]])} on {odd[0]} ({len(odd)} images).")
