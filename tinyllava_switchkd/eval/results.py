"""Reads the score files of several models and computes averages that state which scores are missing."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinyllava_switchkd.eval.benchmarks import BENCHMARKS, Benchmark, BenchmarkFactory, Score
from tinyllava_switchkd.io import JsonObject, read_json
from tinyllava_switchkd.visualize.paper import AVERAGES, COLUMNS, paper_tables

logger = logging.getLogger(__name__)

SERVER_SPLITS = {
    name: BenchmarkFactory(name).paper_split for name in BENCHMARKS if BenchmarkFactory(name).upload == "json"
}
"""Benchmarks whose score in the paper comes from a server: the split's ground truth is not public, unlike val's."""


@dataclass(kw_only=True)
class Result(Score):
    """A score file: one model on one benchmark.

    Attributes:
        run: the file's `run` object; empty if it has none.
        path: the file.
    """

    score: float
    run: JsonObject
    path: Path

    @property
    def registered(self) -> Benchmark | None:
        """The benchmark; None if its plugin is not installed."""
        return BenchmarkFactory(self.benchmark) if self.benchmark in BenchmarkFactory else None

    @property
    def column(self) -> str:
        """The paper's name of the benchmark, or its own if the paper does not have it."""
        if self.registered is None:
            return COLUMNS.get(self.benchmark, self.benchmark)
        return self.registered.column or self.registered.title

    @property
    def stand_in(self) -> bool:
        """Whether this is a val score of a benchmark for which the paper has a server's test score."""
        return self.benchmark in SERVER_SPLITS and self.split.startswith("val")

    @property
    def distance(self) -> int:
        """0 on the split of the paper's score, 1 on another, 2 for a stand-in."""
        return 2 if self.stand_in else int(self.registered is None or self.split != self.registered.paper_split)

    @property
    def own_data(self) -> bool:
        """Whether the number of questions is not an official one."""
        if self.registered is None or self.split not in self.registered.prepared_splits:
            return False
        official = next((file.rows for file in self.registered.files(self.split)), ())
        return bool(official) and (self.asked["of"] if self.asked else self.total) not in official

    @property
    def changed_options(self) -> list[str]:
        """The benchmark's options that are not the default, as "name=value"."""
        options = self.run.get("options")
        if self.registered is None or not isinstance(options, dict):
            return []
        return [f"{name}={value}" for name, value in options.items() if value != self.registered.default_of(name)]

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks of the score, some of "val", "missing", "part", "own data", "judge"."""
        found = {
            "val": self.stand_in,
            "missing": self.missing > 0,
            "part": self.asked is not None and "limit" in self.asked,
            "own data": self.own_data,
            "judge": self.judge is not None,
        }
        return tuple(name for name, is_so in found.items() if is_so)


@dataclass
class Row:
    """A model's row of the table.

    Attributes:
        label: the model.
        scores: column -> unrounded score.
        results: column -> score file; empty for a row of the paper.
        others: score files beside these, on other splits of the same benchmarks.
        averages: the printed averages of a row of the paper (computed before rounding).
    """

    label: str
    scores: dict[str, float] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    others: list[Result] = field(default_factory=list)
    averages: dict[str, float | None] | None = None

    def comparable(self, include_val: bool) -> dict[str, float]:
        """The scores for averages: those on the paper's splits, or all with `include_val`."""
        stand_ins = {column for column, result in self.results.items() if result.stand_in and not include_val}
        return {column: score for column, score in self.scores.items() if column not in stand_ins}

    def average(self, name: str, include_val: bool) -> Average:
        """Avg7 or Avg10 over unrounded scores."""
        columns = AVERAGES[name]
        scores = self.comparable(include_val)
        found = [column for column in columns if column in scores]
        if self.averages is not None:
            return Average(self.averages.get(name), len(found), len(columns), ())
        marks = dict.fromkeys(mark for column in found for mark in self.results[column].marks)
        value = sum(scores[column] for column in columns) / len(columns) if len(found) == len(columns) else None
        return Average(value, len(found), len(columns), tuple(marks))

    def average_error(self, name: str, include_val: bool) -> float | None:
        """Standard error of an average. Its benchmarks ask different questions, so their variances add up."""
        if self.averages is not None or self.average(name, include_val).value is None:
            return None
        columns = AVERAGES[name]
        errors = [error for column in columns if (error := self.results[column].standard_error) is not None]
        return None if len(errors) < len(columns) else math.sqrt(sum(error**2 for error in errors)) / len(errors)


@dataclass(frozen=True)
class Average:
    """A mean over columns. It has no value unless every column has a score.

    Attributes:
        value: None if a column has no score.
        found: number of columns with a score.
        wanted: number of columns of the average.
        marks: the marks of its scores.
    """

    value: float | None
    found: int
    wanted: int
    marks: tuple[str, ...]


# -------------------------------------------------------------------------------------------------------- reading


def read_results(sources: Sequence[str]) -> list[Row]:
    """Read score files into rows of a table, with the models in the order of `sources`.

    Args:
        sources: score files or folders of them, each optionally as ``LABEL=PATH``. Without a label, a model has its
            run's name, or else its folder's.

    Raises:
        FileNotFoundError: a file or folder does not exist, or holds no score.
        ValueError: a file is malformed, or two files have the same model, benchmark and split.
    """
    rows: dict[str, Row] = {}
    for source in sources:
        label, path = labelled(source)
        for result in _results_of(path):
            _add(rows, label or _model_name(result), result)
    for row in rows.values():
        row.results = dict(sorted(row.results.items(), key=lambda item: place_of(item[0])))
    return list(rows.values())


def place_of(column: str) -> tuple[int, str]:
    """Sort key of a column: the paper's columns in its order, then others by name."""
    order = list(COLUMNS.values())
    return (order.index(column) if column in order else len(order), column)


def labelled(source: str) -> tuple[str | None, Path]:
    """Split ``LABEL=PATH``; the label is None if there is none."""
    if not Path(source).exists() and "=" in source:
        label, _, source = source.partition("=")
        return label.strip() or None, Path(source)
    return None, Path(source)


def _results_of(path: Path) -> list[Result]:
    if path.is_dir():
        candidates = sorted(path.glob("*.json")) or sorted(path.glob("*/*.json"))
    elif path.is_file():
        candidates = [path]
    else:
        raise FileNotFoundError(
            f"There is no score file or folder {path}; make one with tinyllava_switchkd.eval.score."
        )
    results = []
    for candidate in candidates:
        document = read_json(candidate, object, what="score file")
        if isinstance(document, dict) and {"benchmark", "score"} <= document.keys():
            if document["score"] is None:
                logger.warning("%s has no score: the ground truth of %s is not public.", candidate, document["split"])
            else:
                results.append(_result(document, candidate))
        elif candidate == path:
            raise ValueError(f"{path} is not a score file: it has no 'benchmark' and 'score'.")
    if not results and path.is_dir():
        raise FileNotFoundError(f"There is no score file in {path}; tinyllava_switchkd.eval.score makes them.")
    return results


def _result(document: JsonObject, path: Path) -> Result:
    score = document["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 100:
        raise ValueError(f"{path}: the score is {score!r}, not a number on 0-100.")
    total = _count(document, "total", 0, path)
    run = {} if document.get("run") is None else document["run"]
    if not isinstance(run, dict):
        raise ValueError(f"{path}: 'run' is a JSON {type(run).__name__}, not an object.")
    details, asked, judge = (document.get(key) for key in ("details", "asked", "judge"))
    details = details if isinstance(details, dict) else {}
    error = details.get("standard_error")
    return Result(
        standard_error=float(error) if isinstance(error, (int, float)) and not isinstance(error, bool) else None,
        asked=asked if isinstance(asked, dict) and isinstance(asked.get("of"), int) else None,
        judge=judge if isinstance(judge, dict) else None,
        benchmark=str(document["benchmark"]),
        metric=str(document.get("metric", "")),
        score=float(score),
        split=str(document.get("split", "")),
        details=details,
        run=run,
        path=path,
        total=total,
        answered=_count(document, "answered", total, path),
        fallback=_count(document, "fallback", 0, path),
    )


def _count(document: JsonObject, key: str, default: int, path: Path) -> int:
    value = document.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{path}: {key!r} is {value!r}, not a count.")
    return value


def _model_name(result: Result) -> str:
    name = next((result.run[key] for key in ("model_name", "model_id", "model") if result.run.get(key)), None)
    return str(name).rstrip("/").rsplit("/", 1)[-1] if name else result.path.resolve().parent.name


def _add(rows: dict[str, Row], label: str, result: Result) -> None:
    row = rows.setdefault(label, Row(label))
    known = row.results.get(result.column)
    if known is not None:
        together = known.path.parent == result.path.parent
        if known.stand_in == result.stand_in and (known.split == result.split or not together):
            raise ValueError(
                f"{known.path} and {result.path} are both {label}'s score on {result.benchmark} ({result.split}); give "
                f"one of them, or label the models: LABEL=PATH."
            )
        result, other = sorted((known, result), key=lambda one: one.distance)
        if together:
            row.others.append(other)
    row.scores[result.column] = result.score
    row.results[result.column] = result


def paper_rows() -> list[Row]:
    """Table 1 of the paper, with the averages as printed."""
    return [
        Row(
            f"{entry['method']} ({entry['llm']})",
            scores=dict(entry["scores"]),
            averages={name: entry[name] for name in AVERAGES},
        )
        for entry in paper_tables()["table1"]
    ]


def different_checkpoints(row: Row) -> list[str]:
    """Digests of the checkpoints behind a row, if there are several, which means that it mixes models."""
    digests: dict[str, None] = {}
    for result in row.results.values():
        digest = next((result.run[key] for key in result.run if "digest" in key and result.run[key]), None)
        if digest:
            digests.setdefault(str(digest))
    return list(digests) if len(digests) > 1 else []
