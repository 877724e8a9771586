"""``python -m tinyllava_switchkd.eval.prepare BENCH [BENCH ...|all]``: build LLaVA's evaluation data, or check it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ...fetch import SourceError
from ..benchmarks.files import sentence_of
from . import Finding, Job, Preparer, PreparerFactory, check

logger = logging.getLogger("tinyllava_switchkd.eval.prepare")

ORDER = ("mme", "mmbench", "mmbench_cn", "vqav2", "gqa", "scienceqa", "mmmu", "textvqa", "vizwiz", "pope")
"""The paper's order of columns; benchmarks of plugins follow."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tinyllava_switchkd.eval.prepare", description=__doc__)
    parser.add_argument("benchmarks", nargs="+", metavar="BENCH", help="all, or some of: " + " ".join(ORDER))
    parser.add_argument(
        "--eval-dir", type=Path, default=Path("playground/data/eval"), help="the folder of all benchmarks (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="build nothing, list what is there and what is missing")
    parser.add_argument("--split", help="val (default) or test for vqav2 and vizwiz; the others have one split")
    parser.add_argument(
        "--source",
        choices=("auto", "hf", "official"),
        default="auto",
        help="the Hugging Face hub, the authors' own files, or whichever answers first (%(default)s)",
    )
    parser.add_argument("--repo-id", help="another data set of the hub, or a folder with its parquet files")
    parser.add_argument("--revision", help="commit, tag or branch of the hub's data set")
    parser.add_argument(
        "--download-dir", type=Path, help="where the authors' archives are kept (EVAL_DIR/.downloads); delete it after"
    )
    parser.add_argument("--any-count", action="store_true", help="accept row counts that are not the official ones")
    parser.add_argument("--force", action="store_true", help="build again although the folder is complete")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 if every benchmark asked for is complete."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tinyllava_switchkd").setLevel(logging.INFO)
    try:
        preparers = _chosen(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    complete = True
    for preparer in preparers:
        try:
            complete &= (_check if arguments.check else _prepare)(preparer, arguments)
        except KeyboardInterrupt:
            print(f"{preparer.title}: interrupted; run the command again to continue.", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:  # the others go on
            print(f"{preparer.title}: {sentence_of(error)}", file=sys.stderr)
            complete = False
        except ModuleNotFoundError as error:
            print(f"error: {error}; pip install 'tinyllava_switchkd[eval]'", file=sys.stderr)
            return 2
    return 0 if complete else 1


def _chosen(arguments: argparse.Namespace) -> list[Preparer]:
    names = arguments.benchmarks
    if "all" in names:
        names = [*ORDER, *(name for name in PreparerFactory.list() if name not in ORDER)]
    preparers = [PreparerFactory(name) for name in dict.fromkeys(names)]
    if arguments.repo_id and len(preparers) > 1:
        raise ValueError("--repo-id names the data set of one benchmark; prepare the benchmarks one by one.")
    if arguments.split and len(preparers) == 1 and arguments.split not in preparers[0].splits:
        raise ValueError(
            f"{preparers[0].title} has the split {' and '.join(preparers[0].splits)}, not {arguments.split!r}."
        )
    return preparers


def _split(preparer: Preparer, arguments: argparse.Namespace) -> str:
    return arguments.split if arguments.split in preparer.splits else preparer.splits[0]


def _prepare(preparer: Preparer, arguments: argparse.Namespace) -> bool:
    split = _split(preparer, arguments)
    root = arguments.eval_dir / preparer.folder
    if not arguments.force and _complete(check(preparer, root, split), arguments.any_count):
        return _check(preparer, arguments)
    order = preparer.source_order(split) if arguments.source == "auto" else (arguments.source,)
    if arguments.repo_id and arguments.source == "auto":
        order = ("hf",)
    for source in order:
        job = Job(
            root=root,
            split=split,
            source=source,
            repos=(arguments.repo_id,) if arguments.repo_id else preparer.repos,
            downloads=arguments.download_dir or arguments.eval_dir / ".downloads",
            revision=arguments.revision,
        )
        logger.info("%s (%s): building from %s.", preparer.title, split, source)
        try:
            preparer.build(job)
            break
        except SourceError as error:
            logger.warning("%s: %s can't be used: %s", preparer.title, source, error)
    else:
        print(f"{preparer.title}: no source could be used. By hand: {preparer.by_hand}", file=sys.stderr)
        return False
    for image, problem in job.undecodable.items():
        print(f"{preparer.title}: {image} doesn't decode and is left out: {problem}", file=sys.stderr)
    return _check(preparer, arguments) and not job.undecodable


def _check(preparer: Preparer, arguments: argparse.Namespace) -> bool:
    """Print what is there and what is missing; returns whether it is complete."""
    split = _split(preparer, arguments)
    root = arguments.eval_dir / preparer.folder
    findings = check(preparer, root, split)
    complete = _complete(findings, arguments.any_count)
    print(f"{preparer.title} ({split}): {'complete' if complete else 'NOT COMPLETE'}, {root}")
    width = max(len(finding.path) for finding in findings)
    for finding in findings:
        print(f"  {finding.state:<10}  {finding.path:<{width}}  {finding.detail}".rstrip())
    if not complete:
        option = "" if split == preparer.splits[0] else f" --split {split}"
        print(f"  get it:     python -m tinyllava_switchkd.eval.prepare {preparer.name}{option}")
        print(f"  hub:        {' or '.join(preparer.repos)}")
        print(f"  by hand:    {preparer.by_hand}")
    return complete


def _complete(findings: list[Finding], any_count: bool) -> bool:
    return all(finding.ok or (any_count and finding.state == "count") for finding in findings)


if __name__ == "__main__":
    sys.exit(main())
