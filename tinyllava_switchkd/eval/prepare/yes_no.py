"""POPE and MME: yes-or-no questions on images.

Formats: LLaVA's ``llava_pope_test.jsonl`` with AoiDragon/POPE's ``coco_pope_*.json`` (JSON lines); the MME release
(``<category>/<stem>.txt`` with two lines ``question<TAB>answer`` an image) with LLaVA's ``llava_mme.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ...fetch import SourceError, write_bytes, write_jsonl
from ..benchmarks.files import read_jsonl
from .base import (
    ONE_WORD,
    ExpectedFile,
    Job,
    Preparer,
    question,
    question_images,
    register_preparer,
)

# The commit that LLaVA pins: its "random" file has 2,910 rows, the newest (and the hub's) 3,000.
POPE_URL = "https://raw.githubusercontent.com/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco/"
POPE_CATEGORIES = ("adversarial", "popular", "random")


@register_preparer("pope")
class Pope(Preparer):
    """Labels of the authors' repository at the commit LLaVA pins, images of the hub; or everything of the hub."""

    name = "pope"
    title = "POPE"
    folder = "pope"
    repos = ("lmms-lab-encoder/POPE", "lmms-lab/POPE")
    sources = ("official", "hf")
    splits = ("test",)
    by_hand = f"coco_pope_*.json from {POPE_URL} to coco/, COCO's val2014.zip to val2014/"

    def files(self, split: str) -> list[ExpectedFile]:
        rows = {"random": (2_910, 3_000)}
        return [
            ExpectedFile("llava_pope_test.jsonl", (8_910, 9_000)),
            *(ExpectedFile(f"coco/coco_pope_{name}.json", rows.get(name, (3_000,))) for name in POPE_CATEGORIES),
        ]

    def images(self, root: Path, split: str) -> Iterable[str]:
        return question_images(root, "llava_pope_test.jsonl", "val2014")

    def from_official(self, job: Job) -> None:
        labels = {}
        for name in POPE_CATEGORIES:
            path = job.official(f"{POPE_URL}coco_pope_{name}.json")
            labels[name] = [row for _, row in read_jsonl(path)]
        wanted = {row["image"] for rows in labels.values() for row in rows}
        if not all((job.root / "val2014" / image).is_file() for image in wanted):
            for row in job.rows("test", columns=("image_source", "image")):
                if (image := _coco_file(row["image_source"])) in wanted:
                    job.write_image(f"val2014/{image}", row["image"])
        self._write(job, labels)

    def from_hf(self, job: Job) -> None:
        labels: dict[str, list[dict]] = {name: [] for name in POPE_CATEGORIES}
        columns = ("question_id", "question", "answer", "image_source", "image", "category")
        for row in job.rows("test", columns=columns):
            if row["category"] not in labels:
                raise ValueError(f"POPE has no category {row['category']!r}; it has {', '.join(labels)}.")
            image = _coco_file(row["image_source"])
            job.write_image(f"val2014/{image}", row["image"])
            labels[row["category"]].append(
                {
                    "question_id": int(row["question_id"]),
                    "image": image,
                    "text": row["question"],
                    "label": row["answer"].strip().lower(),
                }
            )
        self._write(job, labels)

    def _write(self, job: Job, labels: dict[str, list[dict]]) -> None:
        for name, rows in labels.items():
            write_jsonl(job.root / "coco" / f"coco_pope_{name}.json", rows)
        everything = [(row, name) for name, rows in labels.items() for row in rows]
        write_jsonl(
            job.root / "llava_pope_test.jsonl",
            (
                # Ids restart in every category file; LLaVA numbers the questions through.
                question(number, row["image"], f"{row['text']}\n{ONE_WORD}", name)
                for number, (row, name) in enumerate(everything, start=1)
            ),
        )


def _coco_file(name: str) -> str:
    """The hub leaves the ending out."""
    return f"{name.removesuffix('.jpg')}.jpg"


MME_RELEASE = "MME_Benchmark_release_version"
MME_IN_FOLDERS = frozenset({"artwork", "celebrity", "landmark", "posters", "scene"})
"""Categories whose release keeps ``images/`` and ``questions_answers_YN/`` apart; the hub's ids are flat for all."""
MME_REQUEST = "Please answer yes or no."


@register_preparer("mme")
class Mme(Preparer):
    """The hub's parquet files; or the release that the authors send by e-mail, unpacked in its place."""

    name = "mme"
    title = "MME"
    folder = "MME"
    repos = ("lmms-lab-encoder/MME", "lmms-lab/MME")
    sources = ("hf", "official")
    splits = ("test",)
    by_hand = f"ask the authors (BradyFU/Awesome-Multimodal-Large-Language-Models) and unpack {MME_RELEASE}/ here"

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile("llava_mme.jsonl", (2_374,))]

    def images(self, root: Path, split: str) -> Iterable[str]:
        """Images, and beside each the text file with its two questions and answers."""
        for image in question_images(root, "llava_mme.jsonl", MME_RELEASE):
            yield image
            yield mme_answer_file(image)

    def from_hf(self, job: Job) -> None:
        pairs: dict[str, list[str]] = {}
        questions = []
        for row in job.rows("test", columns=("question_id", "image", "question", "answer", "category")):
            category, file = row["category"], row["question_id"].rsplit("/", 1)[-1]
            image = f"{category}/images/{file}" if category in MME_IN_FOLDERS else f"{category}/{file}"
            job.write_image(f"{MME_RELEASE}/{image}", row["image"])
            pairs.setdefault(image, []).append(f"{row['question']}\t{row['answer']}")
            questions.append(_mme_question(image, row["question"]))
        _check_pairs(pairs)
        for image, lines in pairs.items():
            write_bytes(job.root / mme_answer_file(f"{MME_RELEASE}/{image}"), ("\n".join(lines) + "\n").encode())
        write_jsonl(job.root / "llava_mme.jsonl", questions)

    def from_official(self, job: Job) -> None:
        release = job.root / MME_RELEASE
        if not release.is_dir():
            raise SourceError(f"MME's release is not unpacked at {release}; {self.by_hand}")
        pairs = {image: _answer_lines(release / mme_answer_file(image)) for image in _release_images(release)}
        _check_pairs(pairs)
        write_jsonl(
            job.root / "llava_mme.jsonl",
            (_mme_question(image, line.split("\t")[0]) for image, lines in pairs.items() for line in lines),
        )


def mme_answer_file(image: str) -> str:
    """Where the release keeps an image's questions: ``a/1.jpg`` -> ``a/1.txt``, with folders of their own if any."""
    stem = image.rsplit(".", 1)[0]
    return f"{stem.replace('/images/', '/questions_answers_YN/')}.txt"


def _mme_question(image: str, text: str) -> dict:
    text = text.strip().removesuffix(MME_REQUEST).strip()
    return question(image, image, f"{text}\n{ONE_WORD}", image.split("/", 1)[0])


def _check_pairs(pairs: dict[str, list[str]]) -> None:
    odd = [image for image, lines in pairs.items() if len(lines) != 2]
    if odd:
        raise ValueError(f"MME asks two questions an image, but {len(pairs[odd[0]])} on {odd[0]} ({len(odd)} images).")


def _release_images(release: Path) -> Iterator[str]:
    for path in sorted(release.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.relative_to(release).parts[0] != "eval_tool":
            yield path.relative_to(release).as_posix()


def _answer_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"MME's release lacks {path}, the questions on an image; unpack it again.")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        if line.count("\t") != 1:
            raise ValueError(f"{path}, line {number} is not 'question<TAB>answer': {line!r}.")
    return lines
