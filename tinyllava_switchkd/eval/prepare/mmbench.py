"""MMBench in English and Chinese: one TSV each, with the images inside and a row for every rotation of the options.

Formats: OpenMMLab's ``mmbench_dev_20230712.tsv`` and ``mmbench_dev_cn_20231003.tsv``, which LLaVA and the paper use.
"""

from __future__ import annotations

import base64
import csv
import io
import logging
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ...fetch import atomic_file, image_problem
from ..benchmarks.files import read_tsv
from .base import (
    ExpectedFile,
    Job,
    Preparer,
    register_preparer,
)

logger = logging.getLogger(__name__)

OFFICIAL_URL = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"
OPTIONS = ("A", "B", "C", "D")
COLUMNS = ("index", "question", "hint", *OPTIONS, "answer", "category", "image", "source", "l2-category", "comment")
ROTATION = 1_000_000
"""A rotation of question `i` has the index ``i + k * ROTATION``."""


class MMBench(Preparer):
    """The TSV itself, or the hub's parquet files turned back into it."""

    sources = ("official", "hf")
    splits = ("dev",)
    file_name: str
    legacy_name: str
    """VLMEvalKit's name for the file."""
    rows: tuple[int, ...]
    config: str | None = None

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile(self.file_name, self.rows, (self.legacy_name,))]

    def images(self, root: Path, split: str) -> Iterable[str]:
        return ()

    def from_official(self, job: Job) -> None:
        path = job.official(OFFICIAL_URL + self.file_name)
        read_tsv(path, ("index", "question", "A", "B", "answer", "image"))  # refuse an error page under its name
        with open(path, "rb") as source, atomic_file(job.root / self.file_name) as target:
            shutil.copyfileobj(source, target)

    def from_hf(self, job: Job) -> None:
        columns = ("index", "question", "hint", *OPTIONS, "answer", "category", "image", "source", "comment")
        # The English set has "l2-category", the Chinese one "L2-category"; "split" is the same for all.
        wanted = ("dev", self.config)
        rotations = Counter(int(row["index"]) % ROTATION for row in job.rows(*wanted, columns=("index",)))
        recovered = 0
        with atomic_file(job.root / self.file_name) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            writer = csv.DictWriter(text, (*COLUMNS, "split"), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            for row in job.rows(*wanted, columns=columns, optional=("l2-category", "L2-category")):
                index = int(row["index"])
                data = row["image"]["bytes"]
                if problem := image_problem(data):
                    job.undecodable[f"{self.file_name}, index {index}"] = problem
                line = {name: _present(row[name]) for name in columns if name not in ("index", "image")}
                for position, letter in enumerate(OPTIONS):
                    if not line[letter] and position < rotations[index % ROTATION]:
                        line[letter] = "None"
                        recovered += 1
                line |= {
                    "index": index,
                    "image": base64.b64encode(data).decode(),
                    "l2-category": _present(row.get("l2-category") or row.get("L2-category")),
                    "split": "dev",
                }
                writer.writerow(line)
            text.detach()
        if recovered:
            logger.warning(
                "%s: the hub's copy lost the text of %d options that read like missing values; they are written as "
                "'None'. The official file (--source official) has them as they were.",
                self.title,
                recovered,
            )


def _present(text: str | None) -> str:
    """The hub's copies went through pandas, which turned empty cells and the words None, NA, null into "nan"."""
    return "" if text is None or text == "nan" else text


@register_preparer("mmbench")
class MMBenchEnglish(MMBench):
    """MMBench, dev split in English (the release of 12 July 2023)."""

    name = "mmbench"
    title = "MMBench"
    folder = "mmbench"
    repos = ("lmms-lab-encoder/MMBench_EN", "lmms-lab/MMBench_EN")
    file_name = "mmbench_dev_20230712.tsv"
    legacy_name = "MMBench_DEV_EN_legacy.tsv"
    rows = (4_377,)
    by_hand = f"{OFFICIAL_URL}{file_name}"


@register_preparer("mmbench_cn")
class MMBenchChinese(MMBench):
    """MMBench, dev split in Chinese (the release of 3 October 2023)."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    folder = "mmbench_cn"
    repos = ("lmms-lab-encoder/MMBench", "lmms-lab/MMBench")
    config = "cn"
    file_name = "mmbench_dev_cn_20231003.tsv"
    legacy_name = "MMBench_DEV_CN_legacy.tsv"
    rows = (4_329,)
    by_hand = f"{OFFICIAL_URL}{file_name}"
