"""Check a data file for problems before training on it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from tinyllava_switchkd.data.image_files import LEAST_SHARE, ImageFolder, look_at, missing_and_outside
from tinyllava_switchkd.data.records import Records, images_of
from tinyllava_switchkd.data.template import TemplateFactory, check_template
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.io import JsonObject

if TYPE_CHECKING:  # checking a file without tokenizer and processor does not import torch
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from tinyllava_switchkd.data.collator import DataCollatorForSupervisedDataset
    from tinyllava_switchkd.data.image import ImagePreprocess
    from tinyllava_switchkd.data.template.base import Message

MISSING_IMAGES = "image(s) that do not exist"
OUTSIDE_IMAGES = "image(s) outside the image folder"
BROKEN_IMAGES = "image(s) that cannot be read"
DECODE = ("sample", "all", "none")
"""Which images are decoded: some of them, all, or none."""

_SHOWN = 10  # examples per kind in a report
_DECODED_AT_ONCE = 64
_ENCODED = 2000  # samples that are tokenised
_DECODED = 256  # images that "sample" decodes
_NEAR_IMAGE_KEYS = ("images", "image_path", "img", "picture", "video")


@dataclass
class Cases:
    """How often something was found, and the first examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, case: str) -> None:
        self.count += 1
        if len(self.examples) < _SHOWN:  # file names may contain characters that cannot be printed
            self.examples.append(case.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n"))


@dataclass
class DataReport:
    """The result of checking a data file.

    Attributes:
        counts: what was counted -> number.
        problems: kind -> cases that make training impossible.
        warnings: kind -> cases that are probably not intended.
    """

    counts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, Cases] = field(default_factory=dict)
    warnings: dict[str, Cases] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def problem(self, kind: str, case: str) -> None:
        """Add a case to `problems`."""
        self.problems.setdefault(kind, Cases()).add(case)

    def warning(self, kind: str, case: str) -> None:
        """Add a case to `warnings`."""
        self.warnings.setdefault(kind, Cases()).add(case)

    def raise_problems(self, data_path: str) -> None:
        """Raise the problems, if there are any.

        Raises:
            ValueError: with the first case of every kind.
        """
        if self.problems:
            found = "; ".join(f"{cases.count:,} {kind}: {cases.examples[0]}" for kind, cases in self.problems.items())
            raise ValueError(f"The data {data_path} cannot be used for training. It has {found}")

    def __str__(self) -> str:
        lines = [f"{count:>12,}  {name}" for name, count in self.counts.items()]
        for title, kinds in (("PROBLEM", self.problems), ("warning", self.warnings)):
            for kind, cases in kinds.items():
                lines.append(f"{title}: {cases.count:,} {kind}")
                lines += [f"    {case}" for case in cases.examples]
                if cases.count > len(cases.examples):
                    lines.append(f"    … and {cases.count - len(cases.examples):,} more")
        lines.append("The data is ready." if self.ok else "The data is not ready.")
        return "\n".join(lines)


class DataChecker:
    """Collects the problems of the records that it is called with, as the `visit` of `Records`.

    Args:
        template: name of the conversation template of the training.
    """

    def __init__(self, template: str) -> None:
        self.template = TemplateFactory(template)()
        self._keeps_questions = TemplateFactory.name_of(template) != "pretrain"
        self.report = DataReport(counts=dict.fromkeys(("samples", "of them text-only", "turns", "images named"), 0))
        self.names: dict[str, set[str]] = {}  # image files by folder
        self._ids: set[int] = set()
        self._without_answer = 0

    def __call__(self, index: int, record: JsonObject) -> None:
        """Check one record."""
        where = f"sample {index} (id {str(record.get('id'))[:80]!a})"
        names, turns = images_of(record, where), record["conversations"]
        counts = self.report.counts
        counts["samples"] += 1
        counts["of them text-only"] += not names
        counts["turns"] += len(turns)
        counts["images named"] += len(names)
        try:
            self.template.check(turns, len(names))
        except ValueError as error:
            self.report.problem("sample(s) that cannot be encoded", f"{where}: {error}")
        else:
            self._look_at_turns(turns, where)
        self._look_at_keys(record, names, where)
        text = "\n".join([turn["value"] for turn in turns])
        if not names and DEFAULT_IMAGE_TOKEN in text:
            self.report.warning(f"sample(s) without image that write {DEFAULT_IMAGE_TOKEN}; it is read as text", where)
        eos = self.template.eos
        if eos and eos in text:
            self.report.warning(f"sample(s) with the end of an answer, {eos!r}, inside a turn", where)
        for name in names:
            folder, file = os.path.split(name)
            self.names.setdefault(folder, set()).add(file)

    def _look_at_turns(self, turns: Sequence[Message], where: str) -> None:
        """Warn about turns that v1 accepts silently but that are probably mistakes."""
        questions, answers = self.template.get_list_from_message(turns)
        if len(turns) % 2:
            self.report.warning(
                "sample(s) whose first turn is not the human's and is dropped (as in v1)",
                f"{where}, from {turns[0]['from']!r}",
            )
        if not any(answer and answer.strip() for answer in answers):
            self._without_answer += 1
            self.report.warning("sample(s) whose answers are all empty, which teaches the model to say nothing", where)
        if len(questions) > 1 and not self._keeps_questions:
            self.report.warning(
                "sample(s) with several rounds; the template pretrain drops their questions and joins their answers",
                where,
            )
        if any(answer and DEFAULT_IMAGE_TOKEN in answer for answer in answers):
            self.report.warning(f"sample(s) with {DEFAULT_IMAGE_TOKEN} in an answer; it is read as text", where)

    def _look_at_keys(self, record: JsonObject, names: list[str], where: str) -> None:
        identity = record.get("id")
        if identity is not None and not isinstance(identity, str | int):
            self.report.warning("sample(s) whose id is neither a string nor an integer", where)
        elif identity is not None:
            known = len(self._ids)
            self._ids.add(hash(str(identity)))
            if len(self._ids) == known:
                self.report.warning("sample(s) with the id of an earlier one", where)
        near = [key for key in _NEAR_IMAGE_KEYS if key in record]
        if near and not names:
            self.report.warning(f"sample(s) with {near[0]!r}, which is not read: the key of images is 'image'", where)

    def finish(
        self,
        image_folder: str | None,
        decode: str = "sample",
        preprocess: ImagePreprocess | None = None,
        allow_outside: bool = False,
    ) -> DataReport:
        """Check the images and return the report.

        Args:
            image_folder: folder to which image names are relative.
            decode: which images are decoded: "sample" (some, evenly spread), "all" (as slow as reading them all) or
                "none".
            preprocess: preprocessing of the images; if given, images that lose more than a quarter are counted.
            allow_outside: see `ImageFolder`.

        Raises:
            ValueError: `decode` is something else.
        """
        if decode not in DECODE:
            raise ValueError(f"decode must be one of {', '.join(DECODE)}, not {decode!r}.")
        counts, report = self.report.counts, self.report
        if counts["samples"] and self._without_answer == counts["samples"]:
            report.problem("samples (all of them) without an answer to learn", "every answer is empty")
        counts["different images"] = sum(map(len, self.names.values()))
        folder = ImageFolder(image_folder, allow_outside)
        unreadable = dict(sorted(missing_and_outside(folder, self.names)))
        for path, outside in unreadable.items():
            if outside is None:
                report.problem(MISSING_IMAGES, path)
            else:
                report.problem(OUTSIDE_IMAGES, f"{path}: {outside}")
        if decode != "none":
            paths = [
                path
                for parent in sorted(self.names)
                for file in sorted(self.names[parent])
                if (path := os.path.join(folder.root, parent, file)) not in unreadable
            ]
            if decode == "sample" and len(paths) > _DECODED:
                paths = [paths[index * len(paths) // _DECODED] for index in range(_DECODED)]
            counts["images decoded"] = len(paths)
            for path, look in _look_at_all(paths):
                if isinstance(look, str):
                    report.problem(BROKEN_IMAGES, f"{path}: {look}")
                    continue
                size, odd = look
                if odd is not None:
                    report.warning(f"image(s) {odd}", path)
                share = 1.0 if preprocess is None else preprocess.kept_share(size)
                if share < LEAST_SHARE:
                    report.warning(
                        "image(s) that lose more than a quarter by the processor's crop; image_aspect_ratio 'pad' "
                        "keeps all",
                        f"{path}, {size[0]} x {size[1]}: {share:.0%} is seen",
                    )
        return report


def check_data(
    data_path: str,
    image_folder: str | None = None,
    *,
    template: str = "phi",
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: BaseImageProcessor | None = None,
    image_aspect_ratio: str | None = None,
    num_image_tokens: int | None = None,
    model_max_length: int | None = None,
    decode: str = "sample",
    allow_outside_images: bool = False,
) -> DataReport:
    """Check a data file: its format, the order of its turns, the placeholders of its images, and the images.

    Args:
        data_path: a LLaVA JSON or JSON lines.
        image_folder: folder to which image names are relative.
        template: name of the conversation template of the training.
        tokenizer: if given, the template is checked against it, and some samples are encoded to measure their lengths
            and what truncation leaves of them.
        image_processor: if given, images that lose more than a quarter by its crop are counted.
        image_aspect_ratio: "square" or "pad", see `ImagePreprocess`.
        num_image_tokens: tokens per image after the connector, 1 if None.
        model_max_length: length to which samples are truncated, the tokenizer's if None.
        decode: which images are decoded, see `DataChecker.finish`.
        allow_outside_images: see `ImageFolder`.

    Returns:
        the report; problems of the data are not raised.

    Raises:
        ValueError: unknown template, aspect ratio or `decode`.
    """
    checker = DataChecker(template)
    report = checker.report
    preprocess = None
    if image_processor is not None:
        from tinyllava_switchkd.data.image import ImagePreprocess

        preprocess = ImagePreprocess(image_processor, SimpleNamespace(image_aspect_ratio=image_aspect_ratio))
    try:
        records = Records(data_path, visit=checker)
    except (OSError, ValueError) as error:
        report.problem("data file that cannot be read", str(error))
        return report
    checker.finish(image_folder, decode, preprocess, allow_outside_images)
    if tokenizer is not None:
        try:
            check_template(tokenizer, template)
        except ValueError as error:
            report.problem("template that does not fit", str(error))
        else:
            from tinyllava_switchkd.data.collator import DataCollatorForSupervisedDataset

            collator = DataCollatorForSupervisedDataset(
                tokenizer, num_image_tokens=num_image_tokens or 1, model_max_length=model_max_length
            )
            tried = encode_some(records, TextPreprocess(tokenizer, template), collator, _ENCODED)
            _note_lengths(report, records, tried, collator.model_max_length)
    return report


def _note_lengths(
    report: DataReport, records: Records, tried: Sequence[tuple[int, int, int, int]], longest: int
) -> None:
    """Add the results of `encode_some` to a report, and warn of samples that truncation leaves without an answer."""
    for index, tokens, _, kept in tried:
        if not kept:
            report.warning(
                f"sample(s) of {_ENCODED:,} tried with no answer left after truncation to {longest} tokens",
                f"sample {index} (id {records[index].get('id')!r}): {tokens} tokens",
            )
    if tried:
        _, lengths, learned, _ = zip(*tried, strict=True)
        report.counts |= {
            "samples encoded": len(tried),
            "of them cut": sum(tokens > longest for tokens in lengths),
            "tokens of the median sample": int(np.median(lengths)),
            "tokens of the longest": max(lengths),
            "tokens learned of the median sample": int(np.median(learned)),
        }


def encode_some(
    records: Records, text: TextPreprocess, collator: DataCollatorForSupervisedDataset, count: int
) -> list[tuple[int, int, int, int]]:
    """Encode samples that are evenly spread over the file; skips invalid ones, which `DataChecker` reports.

    Returns:
        for each sample its index, its tokens, how many of these are supervised, and how many after truncation.
    """
    found = []
    for index in range(0, len(records), max(1, len(records) // count)):
        record = records[index]
        images = len(images_of(record, f"sample {index}"))
        try:
            sample = text(record["conversations"], num_images=images)
        except ValueError:
            continue
        learned, kept = (int((one["labels"] != IGNORE_INDEX).sum()) for one in (sample, collator.truncate(sample)))
        tokens = len(sample["input_ids"]) + images * (collator.num_image_tokens - 1)
        found.append((index, tokens, learned, kept))
    return found


def _look_at_all(paths: Iterable[str]) -> Iterator[tuple[str, tuple[tuple[int, int], str | None] | str]]:
    """Decode images in parallel; yields each path with the result of `look_at`, or its error as a string."""
    rest = iter(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(rest, _DECODED_AT_ONCE * (os.cpu_count() or 1))):
            yield from zip(batch, pool.map(_look, batch), strict=True)


def _look(path: str) -> tuple[tuple[int, int], str | None] | str:
    try:
        return look_at(path)
    except (OSError, ValueError) as error:
        return str(error)
