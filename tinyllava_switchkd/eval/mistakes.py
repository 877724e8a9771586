"""Where two checkpoints differ: pictures, questions, truths and both answers, on one self-contained page::

    python -m tinyllava_switchkd.eval.mistakes A.rows.jsonl B.rows.jsonl --data_dir DIR --output PAGE.html

The rows are the verdicts that `eval.run --score` and `eval.score --rows` write, each optionally as LABEL=FILE. The
pictures are shrunk and embedded, and questions about one picture are grouped.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.data.image_files import BadImageError, opened, upright
from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory, Question
from tinyllava_switchkd.eval.benchmarks.files import require, sentence_of
from tinyllava_switchkd.eval.results import labelled
from tinyllava_switchkd.io import JsonObject, read_jsonl, read_text, write_text
from tinyllava_switchkd.visualize.overlay import data_address

SIDE = 320
"""Longer side of a picture on the page, in pixels."""
KINDS = {"lost": "only {} right", "gained": "only {} right", "wrong": "both wrong"}
Key = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """One question and the answers of two checkpoints.

    Attributes:
        question: with its prompt and pictures.
        truth: the right answer.
        answers: of A and B.
        values: how right they are, 0 to 1.
    """

    question: Question
    truth: str
    answers: tuple[str, str]
    values: tuple[float, float]

    @property
    def kind(self) -> str | None:
        """A key of `KINDS`; None if both are equally right and not wrong."""
        a, b = self.values
        if a == b:
            return "wrong" if a == 0 else None
        return "lost" if a > b else "gained"


def read_verdicts(path: Path) -> tuple[str, dict[Key, JsonObject]]:
    """The benchmark, and the rows of answered questions by `Question.key`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no verdicts.
    """
    rows, benchmark = {}, None
    for where, row in read_jsonl(path, what="file of verdicts"):
        require(row, ("benchmark", "question_id", "value", "truth"), where)
        benchmark = row["benchmark"]
        if row.get("text") is not None:
            rows[str(row["question_id"]), row.get("prompt") or ""] = row
    if benchmark is None:
        raise ValueError(f"{path} holds no verdicts; make them with tinyllava_switchkd.eval.score --rows.")
    return benchmark, rows


def pair(
    questions: Iterator[Question], first: Mapping[Key, JsonObject], second: Mapping[Key, JsonObject]
) -> list[Verdict]:
    """The questions that both have answered, in the data's order."""
    verdicts = []
    for question in questions:
        a, b = first.get(question.key), second.get(question.key)
        if a is not None and b is not None:
            truth = a["truth"] if isinstance(a["truth"], str) else ", ".join(map(str, a["truth"]))
            verdicts.append(Verdict(question, truth, (a["text"], b["text"]), (a["value"], b["value"])))
    return verdicts


def thumbnail(image: Path | bytes) -> str:
    """A picture as a `data_address`; a grey one if it cannot be read."""
    try:
        with opened(image) as one:
            picture = upright(one)
    except (FileNotFoundError, BadImageError):
        picture = Image.new("RGB", (SIDE, SIDE // 2), "#dddddd")
    return data_address(picture, SIDE)


def page(title: str, labels: Sequence[str], verdicts: Sequence[Verdict], limit: int) -> str:
    """The page as HTML.

    Args:
        title: the benchmark's title.
        labels: the names of A and B.
        verdicts: all questions that both have answered.
        limit: the largest number of questions; those that only one has right come first.
    """
    counts = {kind: sum(verdict.kind == kind for verdict in verdicts) for kind in KINDS}
    chosen = [verdict for verdict in verdicts if verdict.kind in ("lost", "gained")][:limit]
    chosen += [verdict for verdict in verdicts if verdict.kind == "wrong"][: limit - len(chosen)]
    cards: dict[str | None, list[Verdict]] = {}
    for number, verdict in enumerate(chosen):
        cards.setdefault(verdict.question.image_key or f"none {number}", []).append(verdict)
    names = {kind: text.format(label) for (kind, text), label in zip(KINDS.items(), (*labels, ""), strict=True)}
    boxes = "".join(
        f'<label><input type="checkbox" value="{kind}"{" checked" if kind != "wrong" else ""}> '
        f"{escape(names[kind])} ({counts[kind]:,})</label>"
        for kind in KINDS
    )
    same = len(verdicts) - sum(counts.values())
    table = "".join(
        f"<tr><th>{escape(text)}</th><td>{count:,}</td></tr>"
        for text, count in [*((names[kind], counts[kind]) for kind in KINDS), ("equally right", same)]
    )
    head = f"{escape(title)}: {escape(labels[0])} and {escape(labels[1])}"
    shown = f"{len(chosen):,} of {sum(counts.values()):,} questions are on this page." if chosen else "Nothing differs."
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{head}</title><style>{_beside('css')}</style></head>",
            f"<body><h1>{head}</h1>",
            f"<p>{len(verdicts):,} questions that both have answered. {shown}</p>",
            f"<table>{table}</table><nav>{boxes}</nav>",
            *(_card(of_picture, labels) for of_picture in cards.values()),
            f"<script>{_beside('js')}</script></body></html>",
            "",
        ]
    )


def _beside(ending: str) -> str:
    return read_text(Path(__file__).with_suffix(f".{ending}"))


def _card(verdicts: Sequence[Verdict], labels: Sequence[str]) -> str:
    images = "".join(f'<img src="{thumbnail(image)}" alt="">' for image in verdicts[0].question.images)
    sections = "".join(_section(verdict, labels) for verdict in verdicts)
    return f"<article><div>{images or '(no picture)'}</div><div>{sections}</div></article>"


def _section(verdict: Verdict, labels: Sequence[str]) -> str:
    answers = ""
    for label, text, value in zip(labels, verdict.answers, verdict.values, strict=True):
        style, mark = ("wrong", "✗") if value == 0 else ("right", "✓" if value == 1 else f"{value:.1f}")
        answers += f'<div class="a {style}">{mark} {escape(label)}: {escape(text) or "(nothing)"}</div>'
    return (
        f'<section data-kind="{verdict.kind}"><div class="id">{escape(str(verdict.question.question_id))}</div>'
        f'<div class="q">{escape(verdict.question.prompt)}</div>'
        f'<div class="a">Truth: {escape(verdict.truth)}</div>{answers}</section>'
    )


def run(first: str, second: str, data_dir: Path, output: Path, limit: int) -> int:
    """Write the page; returns how many questions differ.

    Raises:
        FileNotFoundError: a file or the data do not exist.
        ValueError: the files are of different benchmarks, or have no question in common.
    """
    (label_a, path_a), (label_b, path_b) = (labelled(source) for source in (first, second))
    label_a, label_b = label_a or path_a.resolve().parent.name, label_b or path_b.resolve().parent.name
    (name, a), (other, b) = read_verdicts(path_a), read_verdicts(path_b)
    if name != other:
        raise ValueError(f"{path_a} has verdicts of {name}, but {path_b} of {other}; compare two of one benchmark.")
    if label_a == label_b:
        label_a, label_b = f"{label_a} (A)", f"{label_b} (B)"
    benchmark = BenchmarkFactory(name)
    splits = benchmark.splits or (None,)
    verdicts: list[Verdict] = []
    for split in splits:  # the rows do not name their split: take the first that has their questions
        try:
            verdicts = pair(benchmark.questions(data_dir, split), a, b)
        except FileNotFoundError:
            if split == splits[-1]:
                raise
        if verdicts:
            break
    if not verdicts:
        raise ValueError(f"{path_a}, {path_b} and the questions in {data_dir} have no question in common.")
    write_text(output, page(benchmark.title, (label_a, label_b), verdicts, limit))
    return sum(verdict.kind in ("lost", "gained") for verdict in verdicts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.eval.mistakes",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", help="verdicts of the first checkpoint, or LABEL=FILE")
    parser.add_argument("second", metavar="B", help="verdicts of the second")
    parser.add_argument("--data_dir", required=True, type=Path, metavar="DIR", help="the benchmark's own folder")
    parser.add_argument("--output", required=True, type=Path, metavar="PAGE.html", help="the page to write")
    parser.add_argument("--limit", type=int, default=300, metavar="N", help="questions on the page (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.limit < 1:
        parser.error(f"--limit is {arguments.limit}; a page has at least one question.")
    try:
        count = run(arguments.first, arguments.second, arguments.data_dir, arguments.output, arguments.limit)
    except (ValueError, OSError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 1
    print(f"{count:,} questions that one of them has right; see {arguments.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
