"""Build LLaVA's evaluation folders from primary sources, or list what a folder lacks.

``python -m tinyllava_switchkd.eval.prepare BENCH [BENCH ...|all]``. Each benchmark's own file defines what its folder
holds and how it is built from each source. This module has the command and the check.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.eval.benchmarks import Benchmark, BenchmarkFactory, ExpectedFile, names
from tinyllava_switchkd.eval.benchmarks.build import Build
from tinyllava_switchkd.eval.benchmarks.files import find_file, read_tsv, sentence_of
from tinyllava_switchkd.fetch import SourceError
from tinyllava_switchkd.io import read_json, read_jsonl, write_json

logger = logging.getLogger("tinyllava_switchkd.eval.prepare")

PROVENANCE_FILE = "prepared.json"


def make_folder(benchmark: Benchmark, build: Build) -> None:
    """Build a benchmark's folder from the build's source and record its origin.

    Raises:
        SourceError: the source is not available.
        ValueError: the source's content is wrong.
    """
    if build.source not in benchmark.sources:
        raise SourceError(f"{benchmark.title} is not available there")
    (benchmark.from_hf if build.source == "hf" else benchmark.from_official)(build)
    path = build.root / PROVENANCE_FILE
    known = read_json(path) if path.is_file() else {}
    write_json(path, known | {build.split: {"source": build.source, **build.provenance}}, indent=1)


# ------------------------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class Finding:
    """One line of the list: a file or an image folder, its state and the counts."""

    path: str
    state: str
    """ok, missing, incomplete, unreadable, or count (readable, but without an official number of rows)."""
    detail: str

    @property
    def ok(self) -> bool:
        return self.state == "ok"


def check(benchmark: Benchmark, root: Path, split: str) -> list[Finding]:
    """Compare a benchmark's folder with what it should hold."""
    findings = [_check_file(root, expected) for expected in benchmark.files(split)]
    if any(finding.state in ("missing", "unreadable") for finding in findings):
        return findings
    images = sorted(set(benchmark.images(root, split)))
    absent = [name for name in images if not (root / name).is_file()]
    if images:
        where = sorted({name.rsplit("/", 1)[0] for name in images})
        folder = where[0] if len(where) == 1 else where[0].split("/", 1)[0]
        state = "ok" if not absent else "missing" if len(absent) == len(images) else "incomplete"
        detail = f"{len(images) - len(absent):,} of {len(images):,} files"
        if absent:
            detail += f" (lacks {', '.join(absent[:3])}{', …' if len(absent) > 3 else ''})"
        findings.append(Finding(f"{folder}/", state, detail))
    return findings


def _check_file(root: Path, expected: ExpectedFile) -> Finding:
    path = find_file(root, (expected.path, *expected.aliases))
    official = " or ".join(f"{rows:,}" for rows in expected.rows)
    if path is None:
        return Finding(expected.path, "missing", f"expected {official} rows" if official else "")
    try:
        rows = count_rows(path)
    except ValueError as error:
        return Finding(expected.path, "unreadable", str(error))
    if expected.rows and rows not in expected.rows:
        return Finding(str(path.relative_to(root)), "count", f"{rows:,} rows, officially {official}")
    return Finding(str(path.relative_to(root)), "ok", f"{rows:,} rows")


def count_rows(path: Path) -> int:
    """Number of rows in a benchmark file: JSON lines, a JSON list or dictionary (also VQA's and TextVQA's), or a TSV.

    Raises:
        ValueError: the file cannot be read.
    """
    if path.suffix == ".tsv":
        return len(read_tsv(path, ("index",)))
    if path.suffix == ".jsonl" or path.name.startswith("coco_pope_"):
        return sum(1 for _ in read_jsonl(path))
    value = read_json(path, object)
    if isinstance(value, dict):
        value = next((value[key] for key in ("data", "questions", "annotations", "test") if key in value), value)
    return len(value)


# -------------------------------------------------------------------------------------------------------- command


def preparable() -> list[str]:
    """Names of the benchmarks whose folders can be built, in the paper's order."""
    return [name for name in names() if BenchmarkFactory(name).repos and not BenchmarkFactory(name).prepared_as]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.eval.prepare",
        description="Build LLaVA's evaluation folders from primary sources, or list what a folder lacks.",
    )
    parser.add_argument("benchmarks", nargs="+", metavar="BENCH", help="all, or some of: " + " ".join(preparable()))
    parser.add_argument(
        "--eval_dir", type=Path, default=Path("playground/data/eval"), help="the folder of all benchmarks (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="only list what is there and what is missing")
    parser.add_argument("--split", help="val (default) or test for vqav2 and vizwiz; the others have one split")
    parser.add_argument(
        "--source",
        choices=("auto", "hf", "official"),
        default="auto",
        help="the Hugging Face hub, the authors' own files, or the first that is available (%(default)s)",
    )
    parser.add_argument("--repo_id", help="another data set of the hub, or a folder with its parquet files")
    parser.add_argument("--revision", help="commit, tag or branch of the hub's data set")
    parser.add_argument(
        "--download_dir", type=Path, help="folder for the authors' archives (EVAL_DIR/.downloads); delete it afterwards"
    )
    parser.add_argument("--any_count", action="store_true", help="accept row counts that are not the official ones")
    parser.add_argument("--force", action="store_true", help="build again even if the folder is complete")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 if every benchmark asked for is complete."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tinyllava_switchkd").setLevel(logging.INFO)
    try:
        chosen = _chosen(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    complete = True
    for benchmark, split in chosen:
        try:
            complete &= (_check if arguments.check else _prepare)(benchmark, split, arguments)
        except KeyboardInterrupt:
            print(f"{benchmark.title}: interrupted; run the command again to continue.", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:  # continue with the others
            print(f"{benchmark.title}: {sentence_of(error)}", file=sys.stderr)
            complete = False
        except ModuleNotFoundError as error:
            print(f"error: {error}; pip install 'tinyllava_switchkd[eval]'", file=sys.stderr)
            return 2
    return 0 if complete else 1


def _chosen(arguments: argparse.Namespace) -> list[tuple[Benchmark, str]]:
    """The benchmarks asked for, each with its split."""
    wanted = preparable() if "all" in arguments.benchmarks else arguments.benchmarks
    wanted = [BenchmarkFactory(name).prepared_as or BenchmarkFactory(name).name for name in wanted]
    benchmarks = [BenchmarkFactory(name) for name in dict.fromkeys(wanted)]
    for benchmark in benchmarks:
        if not benchmark.repos:
            raise ValueError(f"{benchmark.title} cannot be prepared; choose from {', '.join(preparable())}.")
    if arguments.repo_id and len(benchmarks) > 1:
        raise ValueError("--repo_id names the data set of one benchmark; prepare the benchmarks one at a time.")
    if arguments.split and len(benchmarks) == 1 and arguments.split not in benchmarks[0].prepared_splits:
        known = " and ".join(benchmarks[0].prepared_splits)
        raise ValueError(f"{benchmarks[0].title} has the split {known}, not {arguments.split!r}.")
    return [
        (one, arguments.split if arguments.split in one.prepared_splits else one.prepared_splits[0])
        for one in benchmarks
    ]


def _prepare(benchmark: Benchmark, split: str, arguments: argparse.Namespace) -> bool:
    root = arguments.eval_dir / benchmark.folder
    if not arguments.force and _complete(check(benchmark, root, split), arguments.any_count):
        return _check(benchmark, split, arguments)
    order = benchmark.source_order(split) if arguments.source == "auto" else (arguments.source,)
    if arguments.repo_id and arguments.source == "auto":
        order = ("hf",)
    for source in order:
        build = Build(
            root=root,
            split=split,
            source=source,
            repos=(arguments.repo_id,) if arguments.repo_id else benchmark.repos,
            downloads=arguments.download_dir or arguments.eval_dir / ".downloads",
            revision=arguments.revision,
        )
        logger.info("%s (%s): building from %s.", benchmark.title, split, source)
        try:
            make_folder(benchmark, build)
            break
        except SourceError as error:
            logger.warning("%s: %s cannot be used: %s", benchmark.title, source, error)
    else:
        print(f"{benchmark.title}: no source could be used. By hand: {benchmark.by_hand}", file=sys.stderr)
        return False
    for image, problem in build.undecodable.items():
        print(f"{benchmark.title}: {image} cannot be decoded and is left out: {problem}", file=sys.stderr)
    return _check(benchmark, split, arguments) and not build.undecodable


def _check(benchmark: Benchmark, split: str, arguments: argparse.Namespace) -> bool:
    """Print what is there and what is missing; returns whether it is complete."""
    root = arguments.eval_dir / benchmark.folder
    findings = check(benchmark, root, split)
    complete = _complete(findings, arguments.any_count)
    print(f"{benchmark.title} ({split}): {'complete' if complete else 'NOT COMPLETE'}, {root}")
    width = max(len(finding.path) for finding in findings)
    for finding in findings:
        print(f"  {finding.state:<10}  {finding.path:<{width}}  {finding.detail}".rstrip())
    if not complete:
        option = "" if split == benchmark.prepared_splits[0] else f" --split {split}"
        print(f"  get it:     python -m tinyllava_switchkd.eval.prepare {benchmark.name}{option}")
        print(f"  hub:        {' or '.join(benchmark.repos)}")
        print(f"  by hand:    {benchmark.by_hand}")
    return complete


def _complete(findings: list[Finding], any_count: bool) -> bool:
    return all(finding.ok or (any_count and finding.state == "count") for finding in findings)


if __name__ == "__main__":
    sys.exit(main())
