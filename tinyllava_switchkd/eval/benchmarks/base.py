"""The interface of a benchmark: questions, score, upload file and preparation, in one class with one registry.

Nothing here imports torch: a benchmark reads questions and compares strings, and `python -m
tinyllava_switchkd.eval.score` must start quickly on a machine without an accelerator. To add a benchmark, write one
decorated class in one file, see docs/extend.md.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from tinyllava_switchkd.eval.benchmarks.files import ID, find_file, missing_file, picture_path, require
from tinyllava_switchkd.io import JsonObject, read_jsonl
from tinyllava_switchkd.registry import Registry

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build
    from tinyllava_switchkd.statistics import Figure, Sums

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

Image = Path | bytes | tuple[Path, ...] | None
"""A picture's path or encoded bytes (MMBench's table contains its pictures), several paths, or no picture."""

SINGLE_WORD_SUFFIX = "Answer the question using a single word or phrase."
"""Ends the prompt of every short-answer task (LLaVA, docs/Evaluation.md)."""

LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
"""Ends the prompt of every English multiple-choice task (LLaVA, docs/Evaluation.md)."""


@dataclass(frozen=True)
class Question:
    """One generation of a benchmark.

    Attributes:
        question_id: as in the question file; **not** unique in MME and TextVQA.
        prompt: the user's turn without image tokens.
        image: see `Image`; several pictures come before the prompt, in their order.
        category: from the question file.
        logged_prompt: the "prompt" that LLaVA writes to the answers file, if it is not `prompt` (MMBench's has no
            suffix, ScienceQA's has the image token).
        extra: further keys of the answer row (MMBench's round_id, options and option_char).
    """

    question_id: str | int
    prompt: str
    image: Image
    category: str = "default"
    logged_prompt: str | None = None
    extra: JsonObject = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Identifies the question in an answers file; equals `answer_key` of the row that `answer_row` returns.

        If two rows of a question file are identical (TextVQA), their keys are, too.
        """
        return str(self.question_id), self.prompt if self.logged_prompt is None else self.logged_prompt

    @cached_property
    def image_key(self) -> str | None:
        """Equal for questions about the same picture or pictures; None without a picture."""
        if isinstance(self.image, bytes):
            return hashlib.sha1(self.image).hexdigest()
        if isinstance(self.image, tuple):
            return "\n".join(map(str, self.image))
        return None if self.image is None else str(self.image)

    @property
    def images(self) -> tuple[Path | bytes, ...]:
        """The pictures, in order."""
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    def answer_row(self, text: str, *, answer_id: str, model_id: str) -> JsonObject:
        """The row of the answers file, with LLaVA's keys."""
        return {
            "question_id": self.question_id,
            "prompt": self.key[1],
            "text": text,
            **self.extra,
            "answer_id": answer_id,
            "model_id": model_id,
            "metadata": {},
        }


def answer_key(row: JsonObject) -> tuple[str, str]:
    """`Question.key` of the question that a row of an answers file answers."""
    return str(row["question_id"]), row["prompt"]


@dataclass(frozen=True)
class Answer:
    """One row of an answers file.

    Attributes:
        question_id: always as a string.
        text: the model's unmodified answer.
        prompt: the file's "prompt", or "" if that is not a string (TinyLLaVA's MMMU script writes the whole question
            list there).
        where: "FILE, line N", for messages.
        letters: letters of the choices that were shown, if the file has them (MMBench's `option_char`).
    """

    question_id: str
    text: str
    prompt: str
    where: str
    letters: tuple[str, ...] | None = None

    @property
    def key(self) -> tuple[str, str]:
        """`Question.key` of the answered question."""
        return self.question_id, self.prompt


def read_answers(path: str | Path) -> list[Answer]:
    """The answers in a JSONL file with LLaVA's keys, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is malformed, or there are no rows.
    """
    answers = []
    for where, row in read_jsonl(path, what="answers file"):
        require(row, ("question_id", "text"), where)
        identifier, text, prompt = row["question_id"], row["text"], row.get("prompt")
        if not isinstance(identifier, (str, int)) or isinstance(identifier, bool):
            raise ValueError(f"{where}: the question_id {identifier!r} is neither a string nor an integer.")
        if not isinstance(text, str):
            raise ValueError(f"{where}: the text of question {identifier!r} is {text!r}, not a string.")
        shown = row.get("option_char")
        letters = tuple(map(str, shown)) if isinstance(shown, list) else None
        answers.append(Answer(str(identifier), text, prompt if isinstance(prompt, str) else "", where, letters))
    if not answers:
        raise ValueError(f"{path} holds no answers; generate them first.")
    return answers


@dataclass
class Score:
    """The result of a benchmark. Every score and rate is on 0-100.

    Attributes:
        benchmark: registered name.
        metric: name of the figure in `score`.
        score: the headline, on the scale of the paper's tables; None if the split has no public ground truth.
        split: the data's split.
        total: number of questions to be answered.
        answered: number of these with an answer.
        fallback: number of answers that no rule of the protocol could read.
        details: further figures, depending on the benchmark.
        rows: one per question with its verdict, see `Benchmark.score`; not part of the JSON object.
        standard_error: of `score`, clustered by picture; None if unknown.
        asked: the part of the split that was asked, if not all of it.
        judge: the judge, if any, and the share of the answers that it has read.
        run: how the answers were made, if known.
    """

    benchmark: str
    metric: str
    score: float | None
    split: str
    total: int
    answered: int
    fallback: int
    details: JsonObject
    rows: list[JsonObject] = field(default_factory=list, repr=False)
    standard_error: float | None = None
    asked: JsonObject | None = None
    judge: JsonObject | None = None
    run: JsonObject | None = None

    @property
    def missing(self) -> int:
        """Questions without an answer; they count as wrong."""
        return self.total - self.answered

    def to_dict(self) -> JsonObject:
        """The JSON object that the command prints."""
        return {
            "benchmark": self.benchmark,
            "metric": self.metric,
            "score": self.score,
            "split": self.split,
            **({} if self.asked is None else {"asked": self.asked}),
            "total": self.total,
            "answered": self.answered,
            "missing": self.missing,
            "fallback": self.fallback,
            **({} if self.judge is None else {"judge": self.judge}),
            "details": self.details | ({} if self.standard_error is None else {"standard_error": self.standard_error}),
            **({} if self.run is None else {"run": self.run}),
        }


@dataclass(frozen=True)
class Option:
    """A setting of how a benchmark is asked, which becomes a flag of `eval.run`.

    Attributes:
        name: the flag without the hyphens.
        help: one line.
        choices: the values, the default first; empty for a switch that is off by default.
    """

    name: str
    help: str
    choices: tuple[str, ...] = ()

    @property
    def default(self) -> str | bool:
        return self.choices[0] if self.choices else False


@dataclass(frozen=True)
class ExpectedFile:
    """A file of a prepared folder with its official row counts, one for each release; if empty, nothing is counted."""

    path: str
    rows: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    """Other names of the same file."""


@dataclass(frozen=True)
class Reading:
    """The input of a judge: an answer that no rule of the protocol can read.

    Attributes:
        benchmark: registered name.
        question_id: as in the question file.
        prompt: the model's prompt.
        text: its answer.
        choices: possible verdicts -> their meaning ("A" -> "a red bus"; "yes" -> "yes").
    """

    benchmark: str
    question_id: str
    prompt: str
    text: str
    choices: Mapping[str, str]


JudgeFactory: Registry[Callable[[Reading], str | None]] = Registry("judge")
"""`JudgeFactory("name")` is the judge of that name, a function of a `Reading`."""

register_judge = JudgeFactory.register
"""Decorator for a judge: a callable that takes a `Reading` and returns one of its choices, or None."""


class Benchmark(ABC):
    """One benchmark in LLaVA's data layout: everything that the package knows about it.

    Class attributes:
        name: the registered name, also the "benchmark" of its scores.
        title: for messages.
        folder: name of its folder under LLaVA's playground/data/eval.
        metric: the headline's name.
        column: name of its column in the report; by default the title.
        upload: suffix of the upload file for its server ("json", "xlsx"); None if there is no server.
        answers_folder: subfolder in which the scripts keep answers; two benchmarks may share a data folder.
        paper_split: the split of the paper's score; a score on another split is a stand-in.
        max_new_tokens: length limit of LLaVA's own generation script.
        options: settings of how it is asked.
        repos: names of its data set on the Hugging Face hub, newest first; if empty, `eval.prepare` cannot build it.
        prepared_as: name of the benchmark whose folder this one uses; None for its own.
        sources: "hf" (the hub) and "official" (the authors' own files), in the order in which they are tried.
        prepared_splits: the splits that `eval.prepare` can build, the default first.
        by_hand: where to get the data without this program.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[str]
    metric: ClassVar[str]
    column: ClassVar[str | None] = None
    upload: ClassVar[str | None] = None
    answers_folder: ClassVar[str] = "answers"
    paper_split: ClassVar[str] = "test"
    max_new_tokens: ClassVar[int] = 128
    options: ClassVar[tuple[Option, ...]] = ()
    repos: ClassVar[tuple[str, ...]] = ()
    prepared_as: ClassVar[str | None] = None
    sources: ClassVar[tuple[str, ...]] = ("hf",)
    prepared_splits: ClassVar[tuple[str, ...]] = ("val",)
    by_hand: ClassVar[str] = ""

    answered_split: str | None = None
    """The split of the answers to be scored; None if it must be inferred from the answers."""
    asked: Sequence[Question] | None = None
    """The questions to score; None for the whole split."""
    judge: Callable[[Reading], str | None] | None = None
    """Reads answers that no rule can read; off by default."""

    def __init__(self) -> None:
        self.settings: dict[str, str | bool] = {option.name: option.default for option in self.options}
        self.judged = {"asked": 0, "read": 0}

    # ------------------------------------------------------------------------------------------------ asking

    def configure(self, settings: Mapping[str, str | bool | None]) -> None:
        """Set `options`; None keeps an option's default.

        Raises:
            ValueError: the benchmark has no such option, or the option no such value.
        """
        known = {option.name: option for option in self.options}
        for name, value in settings.items():
            if value is None or (name not in known and value is False):
                continue
            flag = f"--{name}"
            if name not in known:
                raise ValueError(f"{self.title} has no option {flag}; drop it.")
            if value not in (known[name].choices or (False, True)):
                raise ValueError(f"{flag} is {value!r}; it is one of {', '.join(known[name].choices)}.")
            self.settings[name] = value

    def default_of(self, option: str) -> str | bool | None:
        """An option's default; None for one that this benchmark does not have."""
        return next((known.default for known in self.options if known.name == option), None)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, if there are several to choose from."""
        return ()

    def split_of(self, data_dir: str | Path, split: str | None = None) -> str:
        """The split that `questions` asks: the given one, else the first whose file exists.

        Raises:
            FileNotFoundError: the data do not exist.
            ValueError: the split is unknown.
        """
        return split or self.paper_split

    @abstractmethod
    def questions(self, data_dir: str | Path, split: str | None = None) -> Iterator[Question]:
        """The questions of a split, in the question file's order; by default of the first split whose file exists.

        Raises:
            FileNotFoundError: the data do not exist.
            ValueError: they are malformed, or the split is unknown.
        """

    # ----------------------------------------------------------------------------------------------- scoring

    @abstractmethod
    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        """Compare answers with the ground truth, joined by key; a question without an answer counts as wrong.

        Each row of the result has the `question_id`, the `text` (None without an answer), the `truth`, and the verdict
        `value` (0 to 1), which the question adds to the mean. If questions share pictures, `cluster` names the picture.
        If the answers' split has no public ground truth, there is no score, and the details have a `note` about it.

        Raises:
            FileNotFoundError: the ground truth does not exist.
            ValueError: the data are malformed, a question id is unknown, or a question has a second answer.
        """

    def units(self, rows: Iterable[JsonObject]) -> Iterator[tuple[Hashable, Hashable, dict[str, float]]]:
        """The headline's parts: (cluster, unit, its terms of the sums) for each question or group of questions.

        Units of one cluster (the questions about one picture) are not independent of each other.
        """
        for row in rows:
            unit, cluster = row["question_id"], row.get("cluster")  # a picture may be number 0
            yield unit if cluster in (None, "") else cluster, unit, {"value": row["value"], "count": 1.0}

    def headline(self, sums: Sums) -> Figure:
        """The score (0-100) from sums over `units`, which are numbers, or arrays for many resamples at once."""
        return 100.0 * sums["value"] / sums["count"]

    def asked_of(
        self, truth: Mapping[K, V], key_of: Callable[[Answer], Hashable] = lambda answer: answer.question_id
    ) -> dict[K, V]:
        """The part of the ground truth (by key) that was asked; `key_of` as for `join`."""
        if self.asked is None:
            return dict(truth)
        keys = {key_of(Answer(question.key[0], "", question.key[1], "")) for question in self.asked}
        return {key: value for key, value in truth.items() if key in keys}

    def read_by_judge(self, answer: Answer, choices: Mapping[str, str]) -> str | None:
        """The judge's verdict on an answer that no rule can read; None without a judge, or if it gives no verdict.

        Raises:
            ValueError: the judge returns something other than a choice.
        """
        if self.judge is None:
            return None
        verdict = self.judge(Reading(self.name, answer.question_id, answer.prompt, answer.text, choices))
        if verdict is not None and verdict not in choices:
            raise ValueError(f"The judge read {verdict!r} in {answer.where}, which is none of {', '.join(choices)}.")
        self.judged["asked"] += 1
        self.judged["read"] += verdict is not None
        return verdict

    def write_submission(
        self, data_dir: str | Path, answers: Sequence[Answer], path: str | Path, allow_missing: bool = False
    ) -> None:
        """Write the file for the benchmark's server or official scorer.

        Raises:
            ValueError: there is no such format, or answers are missing and `allow_missing` is not set.
        """
        raise ValueError(f"{self.title} has no upload format: its ground truth is public and `score` is the result.")

    def result(
        self,
        *,
        split: str,
        details: JsonObject,
        rows: Sequence[JsonObject] = (),
        score: float | None = None,
        total: int | None = None,
        answered: int | None = None,
        fallback: int | None = None,
    ) -> Score:
        """A `Score` under this benchmark's name and metric.

        By default the score is the metric in the details, and the counts come from the rows. A row without a `value`
        gets it from its `correct`.
        """
        for row in rows:
            row.setdefault("value", float(row.get("correct", 0.0)))
        return Score(
            benchmark=self.name,
            metric=self.metric,
            score=details.get(self.metric) if score is None else score,
            split=split,
            total=len(rows) if total is None else total,
            answered=sum(row["text"] is not None for row in rows) if answered is None else answered,
            fallback=sum(row.get("unread", False) for row in rows) if fallback is None else fallback,
            details=details,
            rows=list(rows),
        )

    # ------------------------------------------------------------------------------------------- preparation

    def files(self, split: str) -> list[ExpectedFile]:
        """The question and ground-truth files of a prepared split, the question file first."""
        return []

    def images(self, root: Path, split: str) -> Iterable[str]:
        """Paths, relative to `root`, of the pictures that the split's questions name. The question files must exist."""
        return ()

    def source_order(self, split: str) -> tuple[str, ...]:
        """The sources in the order in which ``--source auto`` tries them."""
        return self.sources

    def from_hf(self, build: Build) -> None:
        """Build the folder from the hub's data set."""
        raise NotImplementedError("'hf' is not among its sources")

    def from_official(self, build: Build) -> None:
        """Build the folder from the authors' own files."""
        raise NotImplementedError("'official' is not among its sources")


class QuestionFileBenchmark(Benchmark):
    """A benchmark with its questions in a JSONL file, in the format of `llava/eval/model_vqa_loader.py`.

    A line is `{"question_id", "image", "text", "category"}`; the text is the whole prompt, including the suffix.

    Class attributes:
        question_files: candidate file names for each split, the default split first.
        image_folders: candidate image folders for each split; the first that exists is used.
    """

    question_files: ClassVar[Mapping[str, tuple[str, ...]]]
    image_folders: ClassVar[Mapping[str, tuple[str, ...]]]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.question_files)

    def split_of(self, data_dir: str | Path, split: str | None = None) -> str:
        return self.question_file(data_dir, split)[0]

    def question_file(self, data_dir: str | Path, split: str | None = None) -> tuple[str, Path]:
        """Split and path of the question file.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: there is no such split.
        """
        if split is not None and split not in self.question_files:
            raise ValueError(f"{self.title} has no split {split!r}, only {', '.join(self.question_files)}.")
        wanted = {split: self.question_files[split]} if split is not None else self.question_files
        for candidate, names in wanted.items():
            path = find_file(data_dir, names)
            if path is not None:
                return candidate, path
        names = tuple(name for candidates in wanted.values() for name in candidates)
        raise missing_file(data_dir, names, f"{self.title} question file", self.name)

    def read_questions(self, data_dir: str | Path, split: str | None = None) -> Iterator[tuple[str, JsonObject]]:
        """Rows of the question file, each with its "FILE, line N" for messages."""
        for where, row in read_jsonl(self.question_file(data_dir, split)[1], what="question file"):
            require(row, {"question_id": ID, "image": str, "text": str}, where)
            yield where, row

    def questions(self, data_dir: str | Path, split: str | None = None) -> Iterator[Question]:
        split, _ = self.question_file(data_dir, split)
        folder = image_folder(data_dir, self.image_folders[split])
        for where, row in self.read_questions(data_dir, split):
            image = picture_path(folder, row["image"], where)
            yield Question(row["question_id"], row["text"], image, row.get("category", "default"))

    def images(self, root: Path, split: str) -> Iterable[str]:
        return question_images(root, self.question_files[split][0], self.image_folders[split][0])


def said(answer: Answer | None) -> dict[str, str | None]:
    """The columns of a result row that come from the answer."""
    return {"prompt": None, "text": None} if answer is None else {"prompt": answer.prompt, "text": answer.text}


def question_line(question_id: int | str, image: str, text: str, category: str = "default") -> dict[str, str | int]:
    """One line of a LLaVA question file."""
    return {"question_id": question_id, "image": image, "text": text, "category": category}


def question_images(root: Path, question_file: str, folder: str) -> Iterator[str]:
    """Image paths of a LLaVA question file (JSON lines with `image`)."""
    for _, row in read_jsonl(root / question_file):
        if row.get("image"):
            yield f"{folder}/{row['image']}"


BenchmarkFactory: Registry[Benchmark] = Registry("benchmark", resolve=lambda benchmark: benchmark())
"""`BenchmarkFactory("pope")` is a new instance of the benchmark of that name."""

register_benchmark = BenchmarkFactory.register


def image_folder(data_dir: str | Path, candidates: Sequence[str]) -> Path:
    """The first folder that exists, or else the first; missing images are reported when they are opened."""
    folders = [Path(data_dir) / candidate for candidate in candidates]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def strip_suffix(prompt: str, suffix: str = SINGLE_WORD_SUFFIX) -> str:
    """The question: the prompt without its instruction and the white space before it."""
    return prompt.replace(suffix, "").strip()


def join(
    answers: Iterable[Answer],
    known: Collection[Hashable],
    source: str | Path,
    key_of: Callable[[Answer], Hashable] = lambda answer: answer.question_id,
) -> dict[Hashable, Answer]:
    """Answers by key. `known` are the keys of the questions, and `source` is their file.

    Raises:
        ValueError: a key is unknown or occurs twice.
    """
    joined: dict[Hashable, Answer] = {}
    for answer in answers:
        key = key_of(answer)
        if key not in known:
            raise ValueError(
                f"{answer.where}: the question id {answer.question_id!r} is unknown: it is not in {source}. "
                f"Score answers with the data they were generated from."
            )
        if key in joined:
            raise ValueError(
                f"{answer.where}: a second answer to the question {answer.question_id!r} (the first is "
                f"{joined[key].where}). Keep one of them."
            )
        joined[key] = answer
    return joined


def refuse_missing(missing: Sequence[object], total: int, allow_missing: bool) -> None:
    """Refuse an incomplete submission, since servers silently score missing answers as wrong.

    Raises:
        ValueError: answers are missing and `allow_missing` is not set.
    """
    if missing and not allow_missing:
        named = ", ".join(str(item) for item in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{len(missing)} of {total} questions have no answer ({named}), so no submission is written; "
            f"finish the generation, or pass --allow_missing."
        )


def percentage(values: Collection[float]) -> float | None:
    """Mean on 0-100; None without values."""
    return 100.0 * sum(values) / len(values) if values else None


def percentage_by(items: Iterable[tuple[object, float]]) -> dict[str, float]:
    """Mean on 0-100 for each group of (group, value) pairs, with the groups in the order in which they first occur."""
    groups: dict[str, list[float]] = {}
    for group, value in items:
        groups.setdefault(str(group), []).append(value)
    return {group: 100.0 * sum(values) / len(values) for group, values in groups.items()}
