"""MMBench and MMBench-CN: multiple choice, each question asked once for every rotation of its choices."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import logging
import shutil
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.eval.benchmarks.base import (
    LETTER_SUFFIX,
    Answer,
    Benchmark,
    ExpectedFile,
    Option,
    Question,
    Score,
    join,
    percentage,
    percentage_by,
    refuse_missing,
    register_benchmark,
    said,
)
from tinyllava_switchkd.eval.benchmarks.choices import match_exactly, read_choice
from tinyllava_switchkd.eval.benchmarks.files import missing_file, read_tsv
from tinyllava_switchkd.io import JsonObject, atomic_file

if TYPE_CHECKING:
    from tinyllava_switchkd.eval.benchmarks.build import Build

logger = logging.getLogger(__name__)

LETTERS = "ABCDEFGH"
LETTER_SUFFIX_CN = "请直接回答选项字母。"
ROTATION = 1_000_000
"""A rotated copy of question i has the index i + k * ROTATION."""

L2_CATEGORIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
"""Names in the table -> names in MMBench's and VLMEvalKit's reports."""

# Texts that pandas (>= 2.0) reads as missing values, so VLMEvalKit and LLaVA's converter do not see them.
_PANDAS_MISSING = frozenset(
    ["", "NA", "N/A", "n/a", "<NA>", "#N/A", "#N/A N/A", "#NA", "NULL", "null", "None", "nan", "NaN", "-nan", "-NaN"]
) | {"1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}
# Truly missing: an empty cell, or the "nan" that the Hugging Face copies have instead.
_MISSING = frozenset({"", "nan"})

OFFICIAL_URL = "https://download.openmmlab.com/mmclassification/datasets/mmbench/"
_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"),
    "comment",
)

_DROPPED_ON_UPLOAD = frozenset({"hint", "category", "source", "image", "comment", "l2-category"})
_PREDICTION_COLUMN = 6

Row = JsonObject


class _MMBench(Benchmark):
    """The part that both languages share.

    The headline is CircularEval (a question counts if every rotation in the table is right) with VLMEvalKit's exact
    matching, which leaves answers unread that it cannot match. The details also have the score that a careful reader
    would give (`circular_human_reading`), and the questions on which the two differ.

    An option with the text "None" is an option in the prompt and in the matching. LLaVA and VLMEvalKit read their
    tables with pandas, which reads this word as a missing cell: LLaVA's prompt stops before it, and VLMEvalKit's
    matching does not know its letter. ``--prompt_protocol llava`` asks and matches this way. Answers from elsewhere
    that were asked this way are recognised by their `option_char` and matched this way. `options_named_none` counts the
    questions with such an option.
    """

    metric = "circular"
    upload = "xlsx"
    paper_split = "dev"
    max_new_tokens = 1024
    options = (
        Option(
            "prompt_protocol",
            'MMBench: full shows an option with the text "None"; llava stops before it, as LLaVA does',
            ("full", "llava"),
        ),
    )
    sources = ("official", "hf")
    prepared_splits = ("dev",)
    rows_of_table: int
    config: str | None = None
    """Configuration of the hub's data set."""
    tables: Mapping[str, tuple[str, ...]]
    suffix = LETTER_SUFFIX

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.tables)

    def split_of(self, data_dir: str | Path, split: str | None = None) -> str:
        return next(iter(self._tables(data_dir, split)))[0]

    def questions(self, data_dir: str | Path, split: str | None = None) -> Iterator[Question]:
        pictures: dict[str, bytes] = {}  # the rotations of a question share one copy of its picture
        table, *others = self._tables(data_dir, split).values()
        if others:
            names = ", ".join(other.name for other in others)
            logger.info("%s is asked from %s; there is also %s (--split chooses).", self.title, table.name, names)
        rows = self._rows(table)
        encoded = _pictures(rows)
        for row in rows:
            text, hint = row["question"], row.get("hint", "")
            as_llava = self.settings["prompt_protocol"] == "llava"
            options = llavas_options_of(row) if as_llava else options_of(row, _MISSING)
            if not (is_none_to_llava(hint) if as_llava else hint in _MISSING):
                text = f"{hint}\n{text}"
            for letter, option in options.items():
                text += f"\n{letter}. {option}"
            yield Question(
                row["index"],
                f"{text}\n{self.suffix}",
                self._decoded(encoded[row["index"]], row, pictures),
                category=row.get("category", "default"),
                logged_prompt=text,
                extra={"round_id": 0, "options": list(options.values()), "option_char": list(options)},
            )

    def score(self, data_dir: str | Path, answers: Sequence[Answer]) -> Score:
        (split, path), table, joined = self._joined(data_dir, answers)
        asked = self.asked_of({str(row["index"]): row for row in table}).values()
        clusters = {index: hashlib.sha1(cell.encode()).hexdigest()[:16] for index, cell in _pictures(table).items()}
        rows = [
            self._judge(row, joined.get(str(row["index"])), split) | {"cluster": clusters[row["index"]]}
            for row in asked
            if row.get("answer", "") not in _MISSING
        ]
        if not rows:
            note = f"{path} has no answers (a test table): write the upload file with --submission, or use a dev table."
            return self.result(split=split, total=len(table), answered=len(answers), details={"note": note})
        groups = _groups(rows)
        base = [row for row in rows if row["question_id"] == row["group"]]
        hits = {row["group"]: all(copy["correct"] for copy in groups[row["group"]]) for row in base}
        read = {row["group"]: all(copy["read_correct"] for copy in groups[row["group"]]) for row in base}
        contested = [group for group in hits if hits[group] != read[group]]
        details: JsonObject = {
            "circular": percentage(list(hits.values())),
            "vanilla": percentage([row["correct"] for row in base]),
            "vanilla_all_rows": percentage([row["correct"] for row in rows]),
            "circular_human_reading": percentage(list(read.values())),
            "circular_excluding_contested": percentage([hits[group] for group in hits if group not in contested]),
            "contested": contested,
            "base_questions": len(base),
            "table": path.name,
            "options_named_none": sum(row["none"] for row in base),
        }
        for column in ("l2_category", "category"):
            details[column] = percentage_by((row[column], hits[row["group"]]) for row in base)
            details[f"{column}_vanilla"] = percentage_by((row[column], row["correct"]) for row in base)
            details[f"{column}_vanilla_all_rows"] = percentage_by((row[column], row["correct"]) for row in rows)
        return self.result(split="+".join(sorted({row["split"] for row in base})), details=details, rows=rows)

    def units(self, rows: Iterable[JsonObject]) -> Iterator[tuple[Hashable, Hashable, dict[str, float]]]:
        for group, copies in _groups(rows).items():
            value = float(all(row["correct"] for row in copies))
            yield copies[0]["cluster"], group, {"value": value, "count": 1.0}

    def write_submission(
        self, data_dir: str | Path, answers: Sequence[Answer], path: str | Path, allow_missing: bool = False
    ) -> None:
        """Write the upload table (LLaVA, convert_mmbench_for_submission.py), with the raw texts as `prediction`.

        A cell that pandas reads as missing ("None", "NA") is empty, as in the server's tables.

        Raises:
            ValueError: answers are missing, or the path does not end in ".xlsx".
        """
        if Path(path).suffix.lower() != ".xlsx":
            raise ValueError(f"{self.title} is uploaded as an .xlsx table, so the submission cannot be {path}.")
        _, table, joined = self._joined(data_dir, answers)
        refuse_missing([row["index"] for row in table if str(row["index"]) not in joined], len(table), allow_missing)
        columns = [column for column in table[0] if column not in _DROPPED_ON_UPLOAD]
        columns.insert(min(_PREDICTION_COLUMN, len(columns)), "prediction")
        rows = []
        for row in table:
            cells = {column: None if cell in _PANDAS_MISSING else cell for column, cell in row.items()}
            answer = joined.get(str(row["index"]))
            cells["prediction"] = None if answer is None else answer.text
            rows.append([cells[column] for column in columns])
        write_xlsx(path, columns, rows)

    def _tables(self, data_dir: str | Path, split: str | None = None) -> dict[tuple[str, str], Path]:
        """The known tables that exist (ignoring case), by (split, name): dev before test, the paper's first."""
        if split is not None and split not in self.tables:
            raise ValueError(f"{self.title} has no split {split!r}, only {', '.join(self.tables)}.")
        known = [(key, name) for key, names in self.tables.items() if split in (None, key) for name in names]
        folder = Path(data_dir)
        present = {path.name.lower(): path for path in sorted(folder.glob("*.tsv"))} if folder.is_dir() else {}
        found = {(key, name): present[name.lower()] for key, name in known if name.lower() in present}
        if not found:
            raise missing_file(data_dir, [name for _, name in known], f"{self.title} table", self.name)
        return found

    def _joined(
        self, data_dir: str | Path, answers: Sequence[Answer]
    ) -> tuple[tuple[str, Path], list[Row], dict[Hashable, Answer]]:
        """The table of the answers with its split, its rows, and the answers by index.

        If there are several tables, it is the first that has all the answered questions.

        Raises:
            ValueError: there is none, or the answers fit tables of both splits.
        """
        tables = self._tables(data_dir, self.answered_split)
        rows = {key: self._rows(path) for key, path in tables.items()}
        fitting = list(tables)
        if len(tables) > 1:
            asked = {answer.question_id for answer in answers}
            fitting = [key for key in tables if asked <= {str(row["index"]) for row in rows[key]}]
            if len({split for split, _ in fitting}) > 1:  # the number of answers of a complete run decides
                fitting = [key for key in fitting if len(rows[key]) == len(asked)] or fitting
            if len({split for split, _ in fitting}) > 1:
                names = " and ".join(tables[key].name for key in fitting)
                raise ValueError(f"The answers fit {names} in {data_dir}; choose one with --split.")
        chosen = (fitting or list(tables))[0]
        path, table = tables[chosen], rows[chosen]
        return (chosen[0], path), table, join(answers, {str(row["index"]) for row in table}, path)

    def _rows(self, path: Path) -> list[Row]:
        """The table's rows, with `index` as an integer."""
        rows: list[Row] = []
        seen: set[int] = set()
        for where, cells in read_tsv(path, ("index", "question", "A", "B", "image")):
            try:
                index = int(cells["index"])
            except ValueError:
                raise ValueError(f"{where}: the index {cells['index']!r} is not an integer.") from None
            if index in seen:
                raise ValueError(f"{where}: the index {index} occurs twice.")
            seen.add(index)
            rows.append({**cells, "index": index})
        if not rows:
            raise ValueError(f"{path} has a header but no rows.")
        return rows

    def _judge(self, row: Row, answer: Answer | None, split: str) -> Row:
        """Both readings of one row's answer. `split` is the table's, for rows that do not name their own."""
        options = options_of(row, _MISSING)
        without_none = options_of(row, _PANDAS_MISSING)
        as_llava = self.settings["prompt_protocol"] == "llava" or _asked_without(answer, options)
        shown = without_none if as_llava else options
        parsed = reading = None
        if answer is not None:
            parsed = match_exactly(answer.text, shown)
            reading = read_choice(answer.text, options)
        unread = answer is not None and parsed is None
        if answer is not None and unread:
            parsed = self.read_by_judge(answer, shown)
        l2_category = next((row[name] for name in ("l2-category", "L2-category") if name in row), "")
        return {
            "question_id": row["index"],
            "group": int(row.get("g_index") or row["index"] % ROTATION),
            "question": row["question"],
            **said(answer),
            "truth": row["answer"],
            "parsed": parsed,
            "unread": unread,
            "correct": parsed == row["answer"],
            "read": reading,
            "read_correct": reading == row["answer"],
            "l2_category": L2_CATEGORIES.get(l2_category, l2_category),
            "category": row.get("category", ""),
            "split": row.get("split") or split,
            "none": without_none != options,
        }

    @staticmethod
    def _decoded(picture: str, row: Row, pictures: dict[str, bytes]) -> bytes:
        """The row's image file."""
        if picture not in pictures:
            try:
                pictures[picture] = base64.b64decode(picture, validate=True)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"The image of question {row['index']} is not base64 ({error}).") from None
        return pictures[picture]

    # ------------------------------------------------------------------------------------------- preparation

    @property
    def file_name(self) -> str:
        """OpenMMLab's table, which LLaVA and the paper use; the next name in `tables` is VLMEvalKit's for it."""
        return self.tables["dev"][0]

    def files(self, split: str) -> list[ExpectedFile]:
        return [ExpectedFile(self.file_name, (self.rows_of_table,), self.tables["dev"][1:2])]

    def from_official(self, build: Build) -> None:
        path = build.official(OFFICIAL_URL + self.file_name)
        read_tsv(path, ("index", "question", "A", "B", "answer", "image"))  # refuse an error page
        with open(path, "rb") as source, atomic_file(build.root / self.file_name) as target:
            shutil.copyfileobj(source, target)

    def from_hf(self, build: Build) -> None:
        letters = LETTERS[:4]
        columns = ("index", "question", "hint", *letters, "answer", "category", "image", "source", "comment")
        # The English set has "l2-category", the Chinese one "L2-category"; "split" is the same for all.
        wanted = ("dev", self.config)
        rotations = Counter(int(row["index"]) % ROTATION for row in build.rows(*wanted, columns=("index",)))
        recovered = 0
        with atomic_file(build.root / self.file_name) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            writer = csv.DictWriter(text, (*_COLUMNS, "split"), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            for row in build.rows(*wanted, columns=columns, optional=("l2-category", "L2-category")):
                index = int(row["index"])
                build.check_image(f"{self.file_name}, index {index}", row["image"])
                line: JsonObject = {name: _present(row[name]) for name in columns if name not in ("index", "image")}
                for position, letter in enumerate(letters):
                    if not line[letter] and position < rotations[index % ROTATION]:
                        line[letter] = "None"
                        recovered += 1
                line |= {
                    "index": index,
                    "image": base64.b64encode((row["image"] or {}).get("bytes") or b"").decode(),
                    "l2-category": _present(row.get("l2-category") or row.get("L2-category")),
                    "split": "dev",
                }
                writer.writerow(line)
            text.detach()
        if recovered:
            logger.warning(
                "%s: the hub's copy lost the text of %d options that look like missing values; they are written as "
                "'None'. The official file (--source official) has the original texts.",
                self.title,
                recovered,
            )


def _tables(*names: str) -> dict[str, tuple[str, ...]]:
    """Split -> file names of its tables."""
    return {split: tuple(name.format(split, split.upper()) for name in names) for split in ("dev", "test")}


@register_benchmark("mmbench")
class MMBench(_MMBench):
    """MMBench in English; the paper's row is the dev set of the legacy tables."""

    name, title, folder = "mmbench", "MMBench", "mmbench"
    column = "MMB"
    repos = ("lmms-lab-encoder/MMBench_EN", "lmms-lab/MMBench_EN")
    rows_of_table = 4_377
    by_hand = f"{OFFICIAL_URL}mmbench_dev_20230712.tsv"
    tables = _tables(
        *("mmbench_{0}_20230712.tsv", "MMBench_{1}_EN_legacy.tsv", "mmbench_{0}_en_20231003.tsv"),
        *("MMBench_{1}_EN.tsv", "MMBench_{1}_EN_V11.tsv"),
    )


@register_benchmark("mmbench_cn")
class MMBenchCN(_MMBench):
    """MMBench in Chinese; the paper's row is the dev set of the legacy tables."""

    name, title, folder = "mmbench_cn", "MMBench-CN", "mmbench_cn"
    column = "MMB-CN"
    repos = ("lmms-lab-encoder/MMBench", "lmms-lab/MMBench")
    config = "cn"
    rows_of_table = 4_329
    by_hand = f"{OFFICIAL_URL}mmbench_dev_cn_20231003.tsv"
    suffix = LETTER_SUFFIX_CN
    tables = _tables(
        *("mmbench_{0}_cn_20231003.tsv", "MMBench_{1}_CN_legacy.tsv", "MMBench_{1}_CN.tsv", "MMBench_{1}_CN_V11.tsv")
    )


def _groups(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """The rotations of each question. As in VLMEvalKit, copies without their original in the table do not count."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return {key: copies for key, copies in groups.items() if any(row["question_id"] == key for row in copies)}


def options_of(row: Mapping[str, str], missing: frozenset[str]) -> dict[str, str]:
    """The choices of a row by letter, without the missing ones."""
    return {letter: row[letter] for letter in LETTERS if letter in row and row[letter] not in missing}


def is_none_to_llava(cell: str) -> bool:
    """Whether LLaVA takes a cell for missing (``is_none`` of model_vqa_mmbench.py): pandas does, or it is a "none"."""
    return cell in _PANDAS_MISSING or cell.lower() in ("nan", "none")


def llavas_options_of(row: Mapping[str, str]) -> dict[str, str]:
    """The choices that LLaVA shows: those of A to D before the first cell that it takes for missing."""
    letters = takewhile(lambda letter: not is_none_to_llava(row.get(letter, "")), LETTERS[:4])
    return {letter: row[letter] for letter in letters}


def _asked_without(answer: Answer | None, options: Mapping[str, str]) -> bool:
    """Whether a choice was not shown, according to the answer's row."""
    return answer is not None and answer.letters is not None and not set(options) <= set(answer.letters)


def _pictures(table: Sequence[Row]) -> dict[int, str]:
    """Each row's picture in base64; in VLMEvalKit's tables a short cell is the index of the row with the picture."""
    cells = {row["index"]: row["image"] for row in table}
    return {
        index: cells[int(cell)] if len(cell) <= 64 and cell.isdigit() and int(cell) in cells else cell
        for index, cell in cells.items()
    }


def _present(text: str | None) -> str:
    """A cell of the hub's copy, in which pandas turned empty cells and the words None, NA and null into "nan"."""
    return "" if text is None or text == "nan" else text


def write_xlsx(path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table with a header row. Strings stay strings, without the control characters that xlsx forbids.

    Raises:
        ImportError: openpyxl is not installed.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise ImportError("Writing .xlsx needs openpyxl: pip install 'tinyllava_switchkd[eval]'.") from None
    book = Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    for number, cells in enumerate((columns, *rows), start=1):
        sheet.append([ILLEGAL_CHARACTERS_RE.sub("", cell) or None if isinstance(cell, str) else cell for cell in cells])
        for cell in sheet[number]:
            if isinstance(cell.value, str):
                cell.data_type = "s"  # an answer that starts with "=" is not a formula
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
