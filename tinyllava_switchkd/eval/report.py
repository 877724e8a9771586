"""A table of models by benchmarks::

    python -m tinyllava_switchkd.eval.report RESULTS... [--with_paper] [--include_val]
        [--format terminal,markdown,csv,latex] [--output_dir DIR] [--compare A B]

RESULTS are score files (`tinyllava_switchkd.eval.score --output`) or folders of them, such as playground/results/MODEL,
each optionally as LABEL=PATH. --output_dir writes the table as report.md, report.csv and report.tex, and the radar
chart of the paper's Figure 1 as radar.png and radar.svg. --compare tests two models against each other, question by
question (compare.md). It needs the verdicts that `eval.run` writes beside its scores.
"""

from __future__ import annotations

import csv
import io
import logging
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_switchkd import cli
from tinyllava_switchkd.eval.benchmarks.files import sentence_of
from tinyllava_switchkd.eval.results import (
    SERVER_SPLITS,
    Result,
    Row,
    different_checkpoints,
    paper_rows,
    place_of,
    read_results,
)
from tinyllava_switchkd.io import write_text
from tinyllava_switchkd.visualize.paper import AVERAGES, COLUMNS, paper_tables

logger = logging.getLogger(__name__)

MARKS = {"val": " val", "missing": "*", "part": "§", "own data": "‡", "judge": "¶"}
LATEX_MARKS = str.maketrans(
    {"*": "$^{*}$", "§": r"$^{\S}$", "‡": r"$^{\ddagger}$", "¶": r"$^{\P}$", "–": "--", "±": r"$\pm$"}
)
RADAR_NOTES = {
    "val": "val split",
    "missing": "answers are missing",
    "part": "a part of the questions",
    "own data": "not the official questions",
    "judge": "a judge read answers",
}
FILES = {"markdown": "report.md", "csv": "report.csv", "latex": "report.tex"}
PAPER_RADAR_LLM = "Qwen2.5-0.5B"
"""The radar chart shows the paper's rows with this language model: its main student and those compared with it."""


@dataclass(frozen=True)
class Report:
    """The rows of a report.

    Attributes:
        rows: our models.
        paper: rows of the paper, empty if not wanted.
        include_val: whether the averages include val scores of VQAv2 and VizWiz.
    """

    rows: list[Row]
    paper: list[Row]
    include_val: bool

    @property
    def columns(self) -> list[str]:
        """The columns that some row has: the paper's, in its order, then others."""
        return sorted({column for row in [*self.rows, *self.paper] for column in row.scores}, key=place_of)

    def notes(self) -> list[str]:
        """The notes below the table."""
        results = [(f"{row.label}, {result.column}", result) for row in self.rows for result in row.results.values()]
        notes = []
        if any(result.stand_in for _, result in results):
            named = " and ".join(f"{COLUMNS[name]} ({split})" for name, split in SERVER_SPLITS.items())
            used = (
                "--include_val: they are in the averages here."
                if self.include_val
                else "They are left out of the averages (--include_val takes them in)."
            )
            notes.append(f"val: a score on the validation split; the paper has the server's score: {named}. {used}")
        if any(result.standard_error is not None for _, result in results):
            notes.append(
                "Standard errors: over questions, clustered by picture. They do not cover the variation between "
                "trainings."
            )
        if missing := [f"{name}: {result.missing:,} of {result.total:,}" for name, result in results if result.missing]:
            notes.append(f"*: questions without an answer counted as wrong ({_some(missing)}).")
        if part := [
            f"{name}: {result.asked['questions']:,} of {result.asked['of']:,}"
            for name, result in results
            if result.asked and "part" in result.marks
        ]:
            notes.append(f"§: only the first questions were asked and scored ({_some(part)}).")
        if own := [f"{name}: {result.total:,}" for name, result in results if result.own_data]:
            notes.append(f"‡: not the benchmark's official number of questions ({_some(own)}).")
        if judged := judged_by(results):
            notes.append(judged)
        if unread := [f"{name}: {result.fallback:,}" for name, result in results if result.fallback]:
            notes.append(f"Answers that no rule of the protocol could read ({_some(unread)}).")
        others = [(f"{row.label}, {other.column}", other) for row in self.rows for other in row.others]
        if others:
            beside = [f"{name}: {other.score:.1f} on {other.split}" for name, other in others]
            notes.append(f"Scores on another split, which the table does not use ({_some(beside)}).")
        for name, result in results:
            if changed := result.changed_options:
                notes.append(f"{name}: asked with {', '.join(changed)}.")
        everything = [*self.rows, *self.paper]
        if any(row.average(name, self.include_val).value is None for row in everything for name in AVERAGES):
            notes.append("– (k/n): only k of the n benchmarks of the average have a score, so there is no average.")
        for row in self.rows:
            if digests := different_checkpoints(row):
                notes.append(f"{row.label}: the scores come from different checkpoints ({', '.join(digests)}).")
        if self.paper:
            notes.append(f"Rows of the paper: {paper_tables()['source']}, Table 1, as printed.")
        return notes


def judged_by(results: Sequence[tuple[str, Result]]) -> str:
    """A note on the scores, given with their names, that a judge has a part in; empty if there are none."""
    judged = [
        f"{name}: {judge.get('name')}, {judge.get('share_of_answers', 0):.1f} % of the answers"
        for name, result in results
        if (judge := result.judge) is not None
    ]
    return f"¶: a judge read answers that no rule of the protocol could ({_some(judged)})." if judged else ""


def _some(items: Sequence[str], most: int = 6) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def _lines(report: Report, rows: Sequence[Row]) -> list[list[str]]:
    """Each model's cells and, on the next line, its standard errors if they are known."""
    lines = []
    for row in rows:
        line = [row.label]
        for column in report.columns:
            marks = row.results[column].marks if column in row.results else ()
            line.append(_marked(row.scores[column], marks) if column in row.scores else "")
        for name in AVERAGES:
            average = row.average(name, report.include_val)
            missing = f"– ({average.found}/{average.wanted})"
            line.append(missing if average.value is None else _marked(average.value, average.marks))
        lines.append(line)
        errors = [getattr(row.results.get(column), "standard_error", None) for column in report.columns]
        if any(error is not None for error in errors):
            errors += [row.average_error(name, report.include_val) for name in AVERAGES]
            lines.append(["  standard error", *("" if error is None else f"± {error:.1f}" for error in errors)])
    return lines


def _marked(score: float, marks: Sequence[str]) -> str:
    return f"{score:.1f}" + "".join(MARKS[mark] for mark in marks)


def terminal(report: Report) -> str:
    """The table as aligned columns, and its notes."""
    header = ["Model", *report.columns, *AVERAGES]
    own, paper = _lines(report, report.rows), _lines(report, report.paper)
    head, rule, *lines = cli.table([header, *own, *paper], rule="─")
    between = [rule] if own and paper else []
    parts = [head, rule, *lines[: len(own)], *between, *lines[len(own) :], rule]
    return "\n".join([*parts, *report.notes()]) + "\n"


def markdown(report: Report) -> str:
    """The table, its notes, and how every score was made."""
    header = ["Model", *report.columns, *AVERAGES]
    text = _markdown_table(header, _lines(report, [*report.rows, *report.paper]))
    text += "".join(f"\n- {_escape_markdown(note)}" for note in report.notes()) + "\n"
    results = [(row.label, result) for row in report.rows for result in row.results.values()]
    if results:
        text += "\n## Scores\n\n"
        header = ["Model", "Benchmark", "Metric", "Score", "Split", "Questions", "Answered", "Unread", "File"]
        text += _markdown_table(header, [_score_line(label, result) for label, result in results])
    for row in report.rows:
        text += _runs(row)
    return text


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    words = ("Model", "Benchmark", "Metric", "Split", "File")
    rule = ["---" if title in words else "---:" for title in header]
    rows = [header, rule, *([_escape_markdown(cell) for cell in line] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _escape_markdown(text: str) -> str:
    for character in "\\|*_":
        text = text.replace(character, f"\\{character}")
    return text


def _score_line(label: str, result: Result) -> list[str]:
    return [
        label,
        result.benchmark,
        result.metric,
        f"{result.score:.2f}",
        result.split,
        f"{result.total:,}",
        f"{result.answered:,}",
        f"{result.fallback:,}",
        result.path.as_posix(),
    ]


def _runs(row: Row) -> str:
    """How a model's answers were made: settings that all runs share as a list, the others as a table by benchmark."""
    runs = {column: dict(_flat(result.run)) for column, result in row.results.items() if result.run}
    if not runs:
        return ""
    keys = dict.fromkeys(key for run in runs.values() for key in run)
    shared = [key for key in keys if len({_shown(run.get(key)) for run in runs.values()}) == 1]
    text = f"\n## {_escape_markdown(row.label)}: {', '.join(runs)}\n\n"
    first = next(iter(runs.values()))
    text += "".join(f"- {_escape_markdown(f'{key}: {first[key]}')}\n" for key in shared if _shown(first.get(key)))
    if len(runs) > 1:
        differing = [key for key in keys if key not in shared]
        lines = [[column, *(_shown(run.get(key)) for key in differing)] for column, run in runs.items()]
        text += "\n" + _markdown_table(["Benchmark", *map(_escape_markdown, differing)], lines)
    return text


def _shown(value: object) -> str:
    return "" if value is None else str(value)


def _flat(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]


def as_csv(report: Report) -> str:
    """One line per model: unrounded scores with their splits, and averages with the number of scores they need."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    splits = [column for column in report.columns if any(column in row.results for row in report.rows)]
    header = ["model", "source", *report.columns]
    for name in AVERAGES:
        header += [name, f"{name} scores", f"{name} marks"]
    more = ("split", "marks", "standard error")
    writer.writerow([*header, *(f"{column} {what}" for what in more for column in splits)])
    for row in [*report.rows, *report.paper]:
        line: list[str | float] = [row.label, "own" if row.averages is None else paper_tables()["source"]]
        line += [row.scores.get(column, "") for column in report.columns]
        for name in AVERAGES:
            average = row.average(name, report.include_val)
            line += ["" if average.value is None else average.value]
            line += [f"{average.found}/{average.wanted}", " ".join(average.marks)]
        found = [row.results.get(column) for column in splits]
        line += [result.split if result else "" for result in found]
        line += [" ".join(result.marks) if result else "" for result in found]
        line += ["" if result is None or result.standard_error is None else result.standard_error for result in found]
        writer.writerow(line)
    return file.getvalue()


def latex(report: Report) -> str:
    """A booktabs table."""
    header = ["Model", *report.columns, *AVERAGES]
    body = [" & ".join(map(_escape_latex, header)) + r" \\", r"\midrule"]
    groups = [group for group in (report.rows, report.paper) if group]
    for number, group in enumerate(groups):
        body += [r"\midrule"] * (number > 0)
        for label, *cells in _lines(report, group):
            cells = [cell.replace(" val", r"$^{\mathrm{val}}$").translate(LATEX_MARKS) for cell in cells]
            body.append(" & ".join([_escape_latex(label), *cells]) + r" \\")
    notes = [_escape_latex(note).replace("‡", r"$\ddagger$").replace("–", "--") for note in report.notes()]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\smallskip{{\footnotesize {note}}}" for note in notes),
            "",
        ]
    )


def _escape_latex(text: str) -> str:
    text = text.replace("\\", "\0")
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    for character, name in (("\0", "backslash"), ("~", "asciitilde"), ("^", "asciicircum")):
        text = text.replace(character, rf"\text{name}{{}}")
    return text


FORMATS: dict[str, Callable[[Report], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": as_csv,
    "latex": latex,
}


def write_radar(report: Report, output_dir: Path) -> list[Path]:
    """The radar chart of our models and, if the paper is wanted, of the rows about its main student.

    Val scores are shown only with `include_val`, as in the averages.

    Returns:
        the files; none, with a warning, if there are too few benchmarks or too many models.
    """
    from tinyllava_switchkd.visualize.radar import absences, draw_radar

    models = {row.label: row.comparable(report.include_val) for row in report.rows}
    own = set(models)
    for row in report.paper:
        if PAPER_RADAR_LLM in row.label and len(row.scores) == len(COLUMNS):
            models[f"{row.label}, paper" if report.rows else row.label] = row.scores
    shown = [
        result
        for row in report.rows
        for column, result in row.results.items()
        if result.marks and column in row.comparable(report.include_val)
    ]
    marked = {mark: dict.fromkeys(result.column for result in shown if mark in result.marks) for mark in RADAR_NOTES}
    note = "; ".join(f"{', '.join(columns)}: {RADAR_NOTES[mark]}" for mark, columns in marked.items() if columns)
    reasons = {
        (row.label, column): "val, not in the averages without --include_val"
        for row in report.rows
        for column in row.scores.keys() - row.comparable(report.include_val).keys()
    }
    dashed = models.keys() - own if own else ()
    try:
        files = draw_radar(models, output_dir / "radar", note=note, dashed=dashed, reasons=reasons)
    except (ValueError, ModuleNotFoundError) as error:
        logger.warning("No radar chart: %s", error)  # the error also names the missing axes
        return []
    for sentence in absences(models, reasons):
        logger.warning("Radar chart: %s", sentence)
    return files


def comparison(first: str, second: str, output_dir: Path | None) -> str:
    """The table of `--compare` for the terminal; with `output_dir`, also writes compare.md.

    Raises:
        FileNotFoundError, ValueError: see `compare_models`.
    """
    from tinyllava_switchkd.eval.comparison import HEADER, NOTES, compare_models, lines

    a, b, compared = compare_models(first, second)
    names = f"A: {a.label}. B: {b.label}."
    table = lines(compared)
    judged = judged_by([(f"{row.label}, {column}", row.results[column]) for row in (a, b) for column in compared])
    notes = [*NOTES, judged.removeprefix("¶: ")] if judged else NOTES
    if output_dir is not None:
        items = [f"- {_escape_markdown(note)}" for note in notes]
        write_text(output_dir / "compare.md", "\n".join([names, "", _markdown_table(HEADER, table), *items, ""]))
    return "\n".join([names, "", *cli.table([HEADER, *table], len(HEADER), "─"), "", *notes])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = cli.CommandParser(
        prog="python -m tinyllava_switchkd.eval.report",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="score file or folder, or LABEL=PATH")
    parser.add_argument("--with_paper", action="store_true", help="add the rows of the paper's Table 1")
    parser.add_argument(
        "--include_val", action="store_true", help="include val scores of VQAv2 and VizWiz in the averages, with a note"
    )
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="test model B against A on every benchmark that both have"
    )
    parser.add_argument(
        "--format", help=f"some of {','.join(FORMATS)} to print or write (terminal; all with --output_dir)"
    )
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="write files and the radar chart there")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        formats = _formats(arguments.format, arguments.output_dir)
        if arguments.compare:
            first, second = arguments.compare
            cli.show(comparison(first, second, arguments.output_dir))
            if not arguments.results and not arguments.with_paper:
                return 0
            cli.show("")
        if not arguments.results and not arguments.with_paper:
            raise ValueError("Nothing to report: give score files or folders, --with_paper or --compare A B.")
        report = Report(
            read_results(arguments.results), paper_rows() if arguments.with_paper else [], arguments.include_val
        )
        for name in formats:
            text = FORMATS[name](report)
            if name == "terminal" or arguments.output_dir is None:
                cli.show(text)
            else:
                write_text(arguments.output_dir / FILES[name], text)
        if arguments.output_dir is not None:
            write_radar(report, arguments.output_dir)
    except (ValueError, OSError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 1
    return 0


def _formats(wanted: str | None, output_dir: Path | None) -> list[str]:
    if wanted is None:
        return list(FORMATS) if output_dir is not None else ["terminal"]
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise ValueError(f"--format is {wanted!r}; it lists some of {', '.join(FORMATS)}.")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
