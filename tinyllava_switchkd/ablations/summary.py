"""Tables of stored runs: means, standard deviations, paired differences with intervals, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from tinyllava_switchkd import cli
from tinyllava_switchkd.ablations.tables import Table
from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.statistics import mean_interval

Stored = JsonObject
"""Content of `toy.RESULTS` and docs/ablation_runs.json: "runs" (``WAY/SEED`` -> row), "search" (way -> choice),
"memory" (way -> MiB) and "attention" (seed -> correlations with the teacher's maps)."""

TITLES = {"knee_teacher": "k, teacher leads", "knee_student": "k, student leads", "topk_overlap": "overlap"}


@dataclass(frozen=True)
class Difference:
    """A row's score minus another's over the same seeds: mean and 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "better" or "worse" if the interval does not contain 0, else "unclear"."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "unclear"

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def chosen(stored: Stored, table: Table) -> dict[str, str]:
    """Row of the table -> the way whose runs it shows: in a tuned table the one chosen by the search."""
    search = stored.get("search", {})
    return {key: search.get(key, {}).get("chosen", key) if table.tuned else key for key in table.ways}


def seeds_of(stored: Stored, table: Table) -> list[int]:
    """The seeds for which every row of the table has a run."""
    runs = stored["runs"].values()
    found = [{run["seed"] for run in runs if run["way"] == way} for way in chosen(stored, table).values()]
    return sorted(set.intersection(*found))


def values(stored: Stored, table: Table, key: str, name: str) -> list[float]:
    """One measure of a row for each seed, without seeds for which it was not measured."""
    way = chosen(stored, table)[key]
    found = [stored["runs"][f"{way}/{seed}"].get(name) for seed in seeds_of(stored, table)]
    return [value for value in found if value is not None]


def difference(stored: Stored, table: Table, key: str, other: str) -> Difference:
    """Score of one row minus that of another, paired by seed."""
    pairs = zip(values(stored, table, key, "score"), values(stored, table, other, "score"), strict=True)
    return Difference(*mean_interval([a - b for a, b in pairs]))


def lines(stored: Stored, table: Table) -> list[list[str]]:
    """The table's cells, header first."""
    memory = ["peak MiB"] if table.memory else []
    titles = [TITLES[name] for name in table.columns]
    rows = [["", "score", "sd", "minus SFT [95 %]", "seconds", *memory, *titles]]
    for key in table.ways:
        scores = values(stored, table, key, "score")
        reference = table.reference(key)
        cells = [f"{fmean(scores):.1f}", f"{stdev(scores):.1f}" if len(scores) > 1 else "–"]
        cells.append("" if key == reference else str(difference(stored, table, key, reference)))
        cells.append(_mean(values(stored, table, key, "seconds")))
        if memory:
            measured = stored.get("memory", {}).get(chosen(stored, table)[key], {}).get("peak_mib")
            cells.append(_mean([] if measured is None else [measured]))
        cells += [_mean(values(stored, table, key, name), 2 * (name == "topk_overlap")) for name in table.columns]
        rows.append([table.label(key), *cells])
    return rows


def _mean(measured: Sequence[float], digits: int = 0) -> str:
    return f"{fmean(measured):.{digits}f}" if measured else "–"


def sentences(stored: Stored, table: Table) -> list[str]:
    """The verdicts, one sentence per comparison."""
    if len(seeds_of(stored, table)) < 2:
        return ["With one seed, no difference can be distinguished from chance."]
    found = []
    for key in table.ways:
        reference = table.reference(key)
        if key != reference:
            found.append(_sentence(table, key, reference, difference(stored, table, key, reference)))
    if table.ours:
        for key in table.ways:
            if key not in (table.ours, table.reference(key)):
                found.append(_sentence(table, table.ours, key, difference(stored, table, table.ours, key)))
    return found


def _sentence(table: Table, key: str, other: str, found: Difference) -> str:
    ours, theirs = table.label(key), table.label(other)
    if found.verdict == "unclear":
        return f"{ours} is not clearly better or worse than {theirs}: {found}."
    return f"{ours} is {found.verdict} than {theirs}: {found}."


def text_of(stored: Stored, table: Table) -> str:
    """The table and its verdicts as text."""
    count = len(seeds_of(stored, table))
    if not count:
        return f"{table.title}: no seed is complete yet."
    head = f"{table.title}; {count} seed{'s' * (count > 1)}, mean and standard deviation"
    return "\n".join([head, "", *cli.table(lines(stored, table)), "", *sentences(stored, table)])


def markdown_of(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells, header first, as a Markdown table."""
    head, *rows = cells
    every = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every)
