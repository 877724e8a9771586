"""What is wrong with a data file, found out before training on it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from tinyllava_switchkd.data.collator import DataCollatorForSupervisedDataset
from tinyllava_switchkd.data.records import Records, images_of
from tinyllava_switchkd.data.template import TemplateFactory, check_template
from tinyllava_switchkd.data.text import TextPreprocess

MISSING_IMAGES = "image(s) that do not exist"
_SHOWN = 10  # cases of a kind that a report spells out
_FEW_FILES = 64  # wanted of a folder: fewer are looked up one by one, more by listing the folder once
_DECODED_AT_ONCE = 64
_ENCODED = 2000  # samples that are tokenised


@dataclass
class Cases:
    """How often something was found, and the first cases of it."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, case: str) -> None:
        self.count += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(case)


@dataclass
class DataReport:
    """What a look at a data file has found.

    Attributes:
        counts: figures, by what they count.
        problems: what keeps the file from being trained on, by kind.
        warnings: what is probably not meant, by kind.
    """

    counts: dict[str, int | str] = field(default_factory=dict)
    problems: dict[str, Cases] = field(default_factory=dict)
    warnings: dict[str, Cases] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def problem(self, kind: str, case: str) -> None:
        """Note a case of a problem."""
        self.problems.setdefault(kind, Cases()).add(case)

    def warning(self, kind: str, case: str) -> None:
        """Note a case of what is probably not meant."""
        self.warnings.setdefault(kind, Cases()).add(case)

    def raise_problems(self, data_path: str) -> None:
        """Raise the problems, if there are any.

        Raises:
            ValueError: in one sentence, with the first case of every kind.
        """
        if self.problems:
            found = "; ".join(f"{cases.count:,} {kind}: {cases.examples[0]}" for kind, cases in self.problems.items())
            raise ValueError(f"The data {data_path} cannot be trained on. It has {found}")

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
    """Collects the problems of records that are shown to it one by one (as the `visit` of `Records`).

    Args:
        conv_version: the conversation template that is going to be used.
    """

    def __init__(self, conv_version: str) -> None:
        self.template = TemplateFactory(conv_version)()
        self.report = DataReport(counts=dict.fromkeys(("samples", "of them text-only", "turns", "images named"), 0))
        self.names: dict[str, set[str]] = {}  # image files by folder

    def __call__(self, index: int, record: dict[str, Any]) -> None:
        """Look at one record."""
        where = f"sample {index} (id {record.get('id')!r})"
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
        text = "\n".join([turn["value"] for turn in turns])
        if not names and DEFAULT_IMAGE_TOKEN in text:
            self.report.warning(f"sample(s) without image that write {DEFAULT_IMAGE_TOKEN}; it is read as text", where)
        eos = self.template.eos
        if eos and eos in text:
            self.report.warning(f"sample(s) with the end of an answer, {eos!r}, inside a turn", where)
        for name in names:
            folder, file = os.path.split(name)
            self.names.setdefault(folder, set()).add(file)

    def finish(self, image_folder: str | None, decode: bool = False) -> DataReport:
        """Look at the images and sum up.

        Args:
            image_folder: where the names of images start from.
            decode: open every image, which takes as long as reading them all.
        """
        root = image_folder or ""
        self.report.counts["different images"] = sum(map(len, self.names.values()))
        missing = missing_files(root, self.names)
        for path in missing:
            self.report.problem(MISSING_IMAGES, path)
        if decode:
            gone = set(missing)
            paths = (os.path.join(root, folder, file) for folder, files in self.names.items() for file in files)
            for path, reason in broken_images(path for path in paths if path not in gone):
                self.report.problem("image(s) that cannot be read", f"{path} ({reason})")
        return self.report


def check_data(
    data_path: str,
    image_folder: str | None = None,
    *,
    conv_version: str = "phi",
    tokenizer: Any = None,
    num_image_tokens: int = 1,
    model_max_length: int | None = None,
    decode: bool = False,
) -> DataReport:
    """Look a data file over: its form, the order of its turns, the places of its images, and that the images exist.

    Args:
        data_path: a LLaVA JSON or JSON lines.
        image_folder: where the names of images start from.
        conv_version: the conversation template that is going to be used.
        tokenizer: if given, the template is checked against it and some samples are encoded, to see how long they are
            and what the cut leaves of them.
        num_image_tokens: tokens an image takes after the connector.
        model_max_length: where samples are cut, the tokenizer's if None.
        decode: open every image.

    Returns:
        the report; what is wrong with the data is in it and not raised.

    Raises:
        ValueError: unknown template.
    """
    checker = DataChecker(conv_version)
    report = checker.report
    try:
        records = Records(data_path, visit=checker)
    except (OSError, ValueError) as error:
        report.problem("data file that cannot be read", str(error))
        return report
    checker.finish(image_folder, decode)
    if tokenizer is not None:
        try:
            check_template(tokenizer, conv_version)
        except ValueError as error:
            report.problem("template that does not fit", str(error))
        else:
            collator = DataCollatorForSupervisedDataset(
                tokenizer, num_image_tokens=num_image_tokens, model_max_length=model_max_length
            )
            _encode_some(report, records, TextPreprocess(tokenizer, conv_version), collator)
    return report


def _encode_some(
    report: DataReport, records: Records, text: TextPreprocess, collator: DataCollatorForSupervisedDataset
) -> None:
    """Encode samples spread over the file; note their lengths and those that the cut leaves without an answer."""
    lengths, supervised = [], []
    for index in range(0, len(records), max(1, len(records) // _ENCODED)):
        record = records[index]
        where = f"sample {index} (id {record.get('id')!r})"
        images = len(images_of(record, where))
        try:
            sample = text(record["conversations"], num_images=images)
        except ValueError:
            continue  # noted when the record was read
        lengths.append(len(sample["input_ids"]) + images * (collator.num_image_tokens - 1))
        supervised.append(int((sample["labels"] != IGNORE_INDEX).sum()))
        if not (collator.truncate(sample)["labels"] != IGNORE_INDEX).any():
            report.warning(
                f"sample(s) of {_ENCODED:,} tried with no answer left after the cut to {collator.model_max_length} "
                f"tokens",
                f"{where}: {lengths[-1]} tokens",
            )
    if lengths:
        report.counts |= {
            "samples encoded": len(lengths),
            "of them cut": int((np.array(lengths) > collator.model_max_length).sum()),
            "tokens of the median sample": int(np.median(lengths)),
            "tokens of the longest": max(lengths),
            "tokens learned of the median sample": int(np.median(supervised)),
        }


def missing_files(root: str, names: dict[str, set[str]]) -> list[str]:
    """The files that are not there, sorted.

    A folder of which many files are wanted is listed once, which asks a network file system one question where a
    look-up of each would ask thousands.

    Args:
        root: folder that the others are in.
        names: file names by folder.
    """
    missing = []
    for folder, files in names.items():
        path = os.path.join(root, folder)
        if len(files) <= _FEW_FILES:
            there = {file for file in files if os.path.isfile(os.path.join(path, file))}
        else:
            there = set(os.listdir(path)) if os.path.isdir(path) else set()
        missing += [os.path.join(path, file) for file in files - there]
    return sorted(missing)


def broken_images(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Decode images, as many at a time as there are processors, and yield those that fail, with the reason."""
    rest = iter(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(rest, _DECODED_AT_ONCE * (os.cpu_count() or 1))):
            for path, reason in zip(batch, pool.map(_why_broken, batch), strict=True):
                if reason is not None:
                    yield path, reason


def _why_broken(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)
    return None
