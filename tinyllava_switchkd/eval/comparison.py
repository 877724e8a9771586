"""Compares two checkpoints on the same questions, benchmark by benchmark: is the difference more than chance?"""

from __future__ import annotations

from collections.abc import Mapping

from tinyllava_switchkd.eval.benchmarks import Benchmark, BenchmarkFactory
from tinyllava_switchkd.eval.results import Result, Row, read_results
from tinyllava_switchkd.eval.score import rows_file
from tinyllava_switchkd.io import JsonObject, read_jsonl
from tinyllava_switchkd.statistics import Comparison, compare, holm


def read_rows(result: Result) -> list[JsonObject]:
    """The verdicts behind a score, which `eval.run --score` and `eval.score --rows` write beside it.

    Raises:
        FileNotFoundError: they do not exist.
        ValueError: they are of another benchmark, or malformed.
    """
    path = rows_file(result.path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no verdicts {path} beside {result.path}: score the answers again with "
            f"python -m tinyllava_switchkd.eval.score {result.benchmark} ... --output {result.path} --rows {path}."
        )
    rows = [row for _, row in read_jsonl(path, what="file of verdicts")]
    if not rows or any(row.get("benchmark") != result.benchmark for row in rows):
        raise ValueError(f"{path} does not hold the verdicts of {result.benchmark}; score the answers again.")
    return rows


def scored(result: Result) -> Benchmark:
    """The benchmark, in the state in which it scored a result.

    Raises:
        ValueError: its plugin is not installed.
    """
    benchmark = BenchmarkFactory(result.benchmark)
    benchmark.asked = () if result.asked else None
    return benchmark


def compare_models(first: str, second: str) -> tuple[Row, Row, dict[str, Comparison]]:
    """Compare two models on every benchmark for which both have a score.

    Args:
        first, second: score file or folder, or LABEL=PATH.

    Returns:
        both rows, and the comparisons (second minus first) by column.

    Raises:
        FileNotFoundError: a folder or a score's verdicts do not exist.
        ValueError: a source holds several models, or the two share no benchmark or were asked other questions.
    """
    a, b = (_one(source) for source in (first, second))
    shared = [column for column in a.results if column in b.results]
    if not shared:
        raise ValueError(f"{a.label} and {b.label} have no benchmark in common.")
    comparisons: dict[str, Comparison] = {}
    for column in shared:
        one, other = a.results[column], b.results[column]
        benchmark = scored(one)
        try:
            ours, theirs = (list(benchmark.units(read_rows(result))) for result in (one, other))
            comparisons[column] = compare(ours, theirs, benchmark.headline)
        except ValueError as error:
            raise ValueError(f"{column}: {one.path} and {other.path} cannot be compared: {error}") from None
    return a, b, comparisons


def _one(source: str) -> Row:
    rows = read_results([source])
    if len(rows) != 1:
        raise ValueError(f"{source} holds {len(rows)} models ({', '.join(row.label for row in rows)}); name one.")
    return rows[0]


HEADER = ("Benchmark", "A", "B", "B - A", "95 % interval", "p", "p, Holm", "test", "questions", "pictures", "+", "-")


def lines(comparisons: Mapping[str, Comparison]) -> list[list[str]]:
    """Cells of the table, one row per benchmark."""
    adjusted = holm({column: comparison.p for column, comparison in comparisons.items()})
    return [
        [
            column,
            f"{of.first:.1f}",
            f"{of.second:.1f}",
            f"{of.difference:+.1f}",
            f"{of.low:+.1f} to {of.high:+.1f}",
            _p(of.p),
            _p(adjusted[column]),
            of.test,
            *(f"{count:,}" for count in (of.questions, of.clusters, of.gained, of.lost)),
        ]
        for column, of in comparisons.items()
    ]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


NOTES = (
    "The interval is a paired bootstrap over pictures (10,000 resamples); questions about one picture stay together.",
    "p: McNemar's test where a question is right or wrong (by picture where a picture has several questions), the "
    "bootstrap elsewhere; p, Holm is adjusted for the number of benchmarks in this table.",
    "+ and -: questions that only B, and that only A, has right (or more right).",
)
