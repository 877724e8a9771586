"""MMMU (val): college-level questions from thirty subjects, multiple choice and open."""

from __future__ import annotations

import ast
import hashlib
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.eval.benchmarks.base import (
    LETTER_SUFFIX,
    SINGLE_WORD_SUFFIX,
    Answer,
    Benchmark,
    ExpectedFile,
    Option,
    Question,
    Score,
    image_folder,
    join,
    percentage,
    percentage_by,
    refuse_missing,
    register_benchmark,
    said,
)
from tinyllava_switchkd.eval.benchmarks.files import ID, find_file, need_file, picture_path, require, write_upload
from tinyllava_switchkd.io import JsonObject, read_json, write_json

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build

QUESTION_FILE = "anns_for_eval.json"
ANSWER_FILE = "eval/answer_dict_val.json"
MOST_IMAGES = 7
"""The data set's columns are image_1 to image_7."""

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DISCIPLINE_OF = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}

MULTIPLE_CHOICE = "multiple-choice"


@register_benchmark("mmmu")
class MMMU(Benchmark):
    """MMMU's validation set in TinyLLaVA's layout: `anns_for_eval.json`, `eval/answer_dict_val.json`, `all_images/`.

    A question about several pictures is asked with the first one, as the authors do for LLaVA, unless `multi_image`
    says otherwise. If the official parser finds no choice, it draws one at random; here the draw depends only on the
    question's id, and is counted.
    """

    name, title, folder = "mmmu", "MMMU", "MMMU"
    metric = "accuracy"
    paper_split = "val"
    max_new_tokens = 1024
    options = (
        Option(
            "multi_image",
            "MMMU: ask a question about several pictures with the first one (LLaVA) or all of them, or skip it "
            "(TinyLLaVA: the choice is drawn)",
            ("first", "all", "skip"),
        ),
    )
    repos = ("lmms-lab-encoder/MMMU", "lmms-lab/MMMU", "MMMU/MMMU")
    by_hand = "https://huggingface.co/datasets/MMMU/MMMU"

    def questions(self, data_dir: str | Path, split: str | None = None) -> Iterator[Question]:
        if split not in (None, "val"):
            raise ValueError(f"{self.title} is evaluated on its val split, not on {split!r}.")
        folder = image_folder(data_dir, ("all_images", "images"))
        samples, path = self._samples(data_dir)
        for identifier, sample in samples.items():
            where = f"{path}, question {identifier}"
            require(sample, {"prompt": str}, where)
            pictures = pictures_of(sample, where)
            if self._skips(sample):
                continue
            paths = tuple(picture_path(folder, name, where) for name in pictures)
            if len(paths) > 1 and self.settings["multi_image"] == "all":
                yield Question(identifier, sample["prompt"], paths)
            else:
                # For several pictures TinyLLaVA's file has only paths; the first is used if it exists.
                there = paths and (sample.get("image") is not None or paths[0].is_file())
                yield Question(identifier, sample["prompt"], paths[0] if there else None)

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        samples, path = self._samples(data_dir)
        truths = self._truths(data_dir, samples, path)
        joined = join(answers, samples, path)
        samples = self._scored(samples)
        rows: list[JsonObject] = []
        for identifier, sample in samples.items():
            answer, truth = joined.get(identifier), truths[identifier]
            row = {"question_id": identifier, "type": sample["question_type"], "truth": truth, "drawn": False}
            row |= {"subject": subject_of(identifier), **said(answer), "skipped": self._skips(sample)}
            choices = sample.get("index2ans") or {}
            if answer is None and not row["skipped"]:
                row |= {"parsed": None, "correct": False}
            elif sample["question_type"] == MULTIPLE_CHOICE:
                parsed = None if answer is None else read_choice(answer.text, sample["all_choices"], choices)
                row["drawn"] = parsed is None
                if parsed is None and answer is not None:
                    parsed = self.read_by_judge(answer, choices)
                row["parsed"] = draw(identifier, sample["all_choices"]) if parsed is None else parsed
                row["correct"] = row["parsed"] in (truth if isinstance(truth, list) else [truth])
            else:
                row["parsed"] = [] if answer is None else read_open(answer.text)
                row["correct"] = matches_open(truth, row["parsed"])
            rows.append(row)
        details = {
            "subjects": percentage_by((row["subject"], row["correct"]) for row in rows),
            "disciplines": percentage_by(
                (_DISCIPLINE_OF[row["subject"]], row["correct"]) for row in rows if row["subject"] in _DISCIPLINE_OF
            ),
            "multiple_choice": percentage([row["correct"] for row in rows if row["type"] == MULTIPLE_CHOICE]),
            "open": percentage([row["correct"] for row in rows if row["type"] != MULTIPLE_CHOICE]),
            "correct": sum(row["correct"] for row in rows),
        }
        skipped = sum(row["skipped"] for row in rows)
        if skipped:
            details["skipped"] = skipped
        return self.result(
            score=percentage([row["correct"] for row in rows]),
            split="val",
            total=len(rows) - skipped,
            fallback=sum(row["drawn"] for row in rows),
            details=details,
            rows=rows,
        )

    def write_submission(
        self, data_dir: str | Path, answers: Sequence[Answer], path: str | Path, allow_missing: bool = False
    ) -> None:
        """Write the official scorer's JSON object: the letter, or the whole text of an open question, by id."""
        samples, source = self._samples(data_dir)
        joined = join(answers, samples, source)
        missing = [key for key, sample in samples.items() if key not in joined and not self._skips(sample)]
        refuse_missing(missing, len(samples), allow_missing)
        predictions = {}
        for identifier, sample in samples.items():
            if identifier not in joined and not self._skips(sample):
                continue
            text = joined[identifier].text if identifier in joined else ""
            if sample["question_type"] == MULTIPLE_CHOICE:
                read = read_choice(text, sample["all_choices"], sample["index2ans"])
                text = draw(identifier, sample["all_choices"]) if read is None else read
            predictions[identifier] = text
        write_upload(path, predictions)

    def _skips(self, sample: JsonObject) -> bool:
        """Whether a question is skipped because it has several pictures (TinyLLaVA's file then has no `image`)."""
        several = isinstance(sample.get("img_path"), list) or sample.get("image") is None
        return self.settings["multi_image"] == "skip" and several

    def _scored(self, samples: Mapping[str, dict]) -> dict[str, dict]:
        """The questions in the score: those asked, and the skipped ones, whose answers are drawn.

        With ``--limit``, only skipped questions before the last asked one are included.
        """
        asked = self.asked_of(samples)
        if self.settings["multi_image"] != "skip" or self.asked is None:
            return asked
        order = list(samples)
        last = max((order.index(identifier) for identifier in asked), default=-1)
        whole = len(asked) == sum(not self._skips(sample) for sample in samples.values())
        kept = order if whole else order[: last + 1]
        return {key: samples[key] for key in kept if key in asked or self._skips(samples[key])}

    def _samples(self, data_dir: str | Path) -> tuple[dict[str, dict], Path]:
        """The questions by id, and their file."""
        path = need_file(data_dir, (QUESTION_FILE,), "MMMU question file", self.name)
        samples = {}
        for number, sample in enumerate(read_json(path, list)):
            where = f"{path}, entry {number}"
            require(sample, {"id": ID, "question_type": str}, where)
            if sample["question_type"] == MULTIPLE_CHOICE:
                require(sample, {"all_choices": list, "index2ans": dict}, where)
                if not sample["all_choices"]:
                    raise ValueError(f"{where}: a multiple-choice question without choices.")
                require(sample["index2ans"], [str(choice) for choice in sample["all_choices"]], f"{where}, index2ans")
            samples[str(sample["id"])] = sample
        return samples, path

    def _truths(self, data_dir: str | Path, samples: Mapping[str, dict], path: Path) -> dict[str, str | list[str]]:
        """The right answers, from the official answer dictionary if it exists, else from the question file."""
        official = find_file(data_dir, (ANSWER_FILE, "answer_dict_val.json"))
        if official is None:
            for identifier, sample in samples.items():
                where = f"{path}, question {identifier} (there is no {ANSWER_FILE})"
                require(sample, {"answer": (str, list)}, where)
            return {identifier: sample["answer"] for identifier, sample in samples.items()}
        entries = read_json(official)
        absent = [identifier for identifier in samples if identifier not in entries]
        if absent:
            raise ValueError(f"{official}: no ground truth for {absent[0]!r} ({len(absent)} in all).")
        for identifier in samples:
            require(entries[identifier], {"ground_truth": (str, list)}, f"{official}, question {identifier}")
        return {identifier: entries[identifier]["ground_truth"] for identifier in samples}

    # ------------------------------------------------------------------------------------------- preparation

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile(QUESTION_FILE, (900,)), ExpectedFile(ANSWER_FILE, (900,))]

    def images(self, root: Path, split: str) -> Iterable[str]:
        for row in read_json(root / QUESTION_FILE, list):
            yield from (f"all_images/{name}" for name in pictures_of(row, QUESTION_FILE))

    def from_hf(self, build: Build) -> None:
        samples, answers = [], {}
        columns = ("id", "question", "options", "answer", "question_type", "image_1")
        more = tuple(f"image_{number}" for number in range(2, MOST_IMAGES + 1))
        for row in build.rows("validation", "*", columns, optional=more):
            names = []
            for number, column in enumerate(("image_1", *more), start=1):
                if number == 1 or row.get(column):
                    names.append(f"{row['id']}_{number}.png")
                    build.write_image(f"all_images/{names[-1]}", row[column])
            pictures = {"image": names[0], "img_path": names if len(names) > 1 else names[0]}
            samples.append(question_of(row) | pictures)
            kind = MULTIPLE_CHOICE if row["question_type"] == MULTIPLE_CHOICE else "short-answer"
            answers[row["id"]] = {"question_type": kind, "ground_truth": _listed(row["answer"])}
        write_json(build.root / ANSWER_FILE, answers, indent=1)
        write_json(build.root / QUESTION_FILE, samples, indent=1)


def question_of(row: JsonObject) -> JsonObject:
    """The text part of one entry of ``anns_for_eval.json``, with the prompt of MMMU's ``llava1.5.yaml``.

    Raises:
        ValueError: the options are not a list.
    """
    sample = {"id": row["id"], "question_type": row["question_type"], "all_choices": [], "index2ans": {}}
    if row["question_type"] == MULTIPLE_CHOICE:
        options = _listed(row["options"])
        if not isinstance(options, list):
            raise ValueError(f"MMMU question {row['id']}: the options are not a list: {row['options']!r}.")
        sample["index2ans"] = dict(zip(string.ascii_uppercase, map(str, options), strict=False))
        sample["all_choices"] = list(sample["index2ans"])
        lines = "".join(f"({letter}) {text}\n" for letter, text in sample["index2ans"].items())
        sample["prompt"] = f"{row['question']}\n{lines}\n{LETTER_SUFFIX}"
    else:
        sample["prompt"] = f"{row['question']}\n{SINGLE_WORD_SUFFIX}"
    sample["answer"] = row["answer"]
    return sample


def _listed(text: str) -> object:
    """The list that a text represents (``"['24/7', '3.429']"``); any other text is returned unchanged."""
    if not (text.startswith("[") and text.endswith("]")):
        return text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return value if isinstance(value, list) else text


def pictures_of(sample: JsonObject, where: str) -> tuple[str, ...]:
    """File names of a question's pictures: `img_path` has all of several, `image` a single one."""
    listed = sample.get("img_path")
    if isinstance(listed, list) and listed:
        return tuple(map(str, listed))
    if sample.get("image") is not None:
        require(sample, {"image": str}, where)
        return (sample["image"],)
    return (listed,) if isinstance(listed, str) else ()


def subject_of(identifier: str) -> str:
    """The subject in an id: "validation_Art_Theory_1" -> "Art_Theory"."""
    return "_".join(identifier.split("_")[1:-1])


def draw(identifier: str, choices: Sequence[str]) -> str:
    """A random choice that depends only on the question's id, so it is the same on every machine and in any order."""
    return choices[int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") % len(choices)]


def read_choice(response: str, choices: Sequence[str], texts: Mapping[str, str]) -> str | None:
    """The chosen letter, or None if the official parser would draw (MMMU eval_utils.py).

    It looks for "(B)" anywhere; else for " B " as a word, ignoring punctuation at the response's ends; else, in more
    than five words, for a choice's text. Of several matches the last counts.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    lowered = response.lower()
    places = {choice: response.rfind(f"({choice})") for choice in choices}
    if max(places.values(), default=-1) < 0:
        places = {choice: response.rfind(f" {choice} ") for choice in choices}
    if max(places.values(), default=-1) < 0 and len(response.split()) > 5:
        places = {choice: lowered.rfind(str(text).lower()) for choice, text in texts.items()}
    best = max(places, key=places.__getitem__, default=None)
    return None if best is None or places[best] < 0 else best


_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")  # the first branch never fires: the text is in lower case by then
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def read_open(response: str) -> list[str | float]:
    """Candidate answers in a response to an open question, normalised (MMMU eval_utils.py)."""
    keys = _key_parts(response)
    numbers = [n for part in keys for p in (_THOUSANDS, _SCIENTIFIC, _PLAIN) for n in p.findall(part)]
    return list(dict.fromkeys(value for candidate in keys + numbers for value in normalise(candidate)))


def _key_parts(response: str) -> list[str]:
    """For each line, the shortest tail after a word that announces an answer; the whole response if there is none."""
    response = response.strip().strip(".").lower()
    lines = _SENTENCE_END.split(response)
    parts = []
    for number, line in enumerate(lines):
        # "=" only counts in the last line.
        indicators = _INDICATORS + (("=",) if number == len(lines) - 1 else ())
        tails = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        tail = _shortest(tails)
        if tail and tail not in {":", ",", ".", "!", "?", ";", "'"}:
            parts.append(tail)
    return parts or [response]


def _shortest(tails: Sequence[str]) -> str:
    """The first of the shortest; as in the official loop, any tail replaces an empty one before it."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def normalise(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text in lower case. A single letter is padded against chance matches."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def matches_open(truth: str | Sequence[str], candidates: Sequence[str | float]) -> bool:
    """Whether a candidate contains a right text or equals a right number."""
    right = [value for answer in ([truth] if isinstance(truth, str) else truth) for value in normalise(str(answer))]
    texts = [value for value in right if isinstance(value, str)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in right
        for candidate in candidates
    )
