"""Score a benchmark's answers::

    python -m tinyllava_switchkd.eval.score BENCH --data-dir DIR --answers-file FILE
        [--output FILE.json] [--submission FILE] [--allow-missing]

Prints one JSON object on stdout and nothing else; an error is one sentence on stderr and exit status 1. Imports no
torch, so that it runs anywhere and at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .benchmarks import BENCHMARKS, BenchmarkFactory, NoGroundTruth, Score, read_answers
from .benchmarks.files import write_json


def score_file(
    name: str,
    data_dir: str | Path,
    answers_file: str | Path,
    submission: str | Path | None = None,
    allow_missing: bool = False,
) -> Score:
    """Score an answers file, and write the upload file if one is asked for.

    Args:
        name: a registered benchmark.
        data_dir: the benchmark's own folder, in LLaVA's layout.
        answers_file: JSONL with LLaVA's keys.
        submission: where to write the upload file.
        allow_missing: write it even if answers are missing.

    Returns:
        The score; its `score` is None, and the details say why, where the answers belong to a split without public
        ground truth and only the submission could be written.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the benchmark is unknown, a file is malformed, ids do not match, or there is no ground truth and
            no submission was asked for.
    """
    benchmark = BenchmarkFactory(name)
    answers = read_answers(answers_file)
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"The data folder {data_dir} does not exist; --data-dir is the benchmark's own folder.")
    try:
        score = benchmark.score(data_dir, answers)
    except NoGroundTruth as error:
        if submission is None:
            raise
        score = benchmark.result(
            score=None, split=error.split, total=error.total, answered=len(answers), details={"note": str(error)}
        )
    if submission is not None:
        benchmark.write_submission(data_dir, answers, submission, allow_missing=allow_missing)
    return score


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllava_switchkd.eval.score", description="Score a benchmark's answers with its own protocol."
    )
    parser.add_argument("benchmark", metavar="BENCH", help=f"one of {', '.join(BENCHMARKS)}, or your own")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="the benchmark's own folder (LLaVA's layout)")
    parser.add_argument("--answers-file", required=True, metavar="FILE", help="answers, JSONL with LLaVA's keys")
    parser.add_argument("--output", metavar="FILE.json", help="write the JSON object there, too")
    parser.add_argument("--submission", metavar="FILE", help="write the file that the benchmark's server takes")
    parser.add_argument(
        "--allow-missing", action="store_true", help="write the submission even if questions have no answer"
    )
    args = parser.parse_args(argv)
    try:
        score = score_file(args.benchmark, args.data_dir, args.answers_file, args.submission, args.allow_missing)
        if args.output is not None:
            write_json(args.output, score.to_dict(), indent=2)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(score.to_dict(), indent=2, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
