"""Score a benchmark's answers::

    python -m tinyllava_switchkd.eval.score BENCH --data-dir DIR --answers-file FILE
        [--output FILE.json] [--submission FILE] [--allow-missing] [--split SPLIT]

Prints one JSON object on stdout and nothing else; an error is one sentence on stderr and exit status 1. Imports no
torch, so that it runs anywhere and at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .benchmarks import BENCHMARKS, BenchmarkFactory, NoGroundTruth, Score, read_answers
from .benchmarks.files import read_json, sentence_of, write_json


def score_file(
    name: str,
    data_dir: str | Path,
    answers_file: str | Path,
    submission: str | Path | None = None,
    allow_missing: bool = False,
    split: str | None = None,
) -> Score:
    """Score an answers file, and write the upload file if one is asked for.

    Args:
        name: a registered benchmark.
        data_dir: the benchmark's own folder, in LLaVA's layout.
        answers_file: JSONL with LLaVA's keys.
        submission: where to write the upload file.
        allow_missing: write it even if answers are missing.
        split: the answers' split; by default what the run beside them says, else what their questions tell.

    Returns:
        The score, with the `run` object that stands beside the answers. Its `score` is None, and the details say why,
        where the answers belong to a split without public ground truth and only the submission could be written.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the benchmark is unknown, a file is malformed, ids do not match, or there is no ground truth and
            no submission was asked for.
    """
    benchmark = BenchmarkFactory(name)
    answers = read_answers(answers_file)
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"The data folder {data_dir} does not exist; --data-dir is the benchmark's own folder.")
    run = run_beside(answers_file, benchmark.name)
    if split is not None and split not in (benchmark.splits or (benchmark.paper_split,)):
        known = ", ".join(benchmark.splits or (benchmark.paper_split,))
        raise ValueError(f"{benchmark.title} has no split {split!r}, only {known}.")
    if split is None and run is not None and run.get("split") in benchmark.splits:
        split = run["split"]
    benchmark.answered_split = split
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
    score.run = run
    return score


def run_beside(answers_file: str | Path, benchmark: str) -> dict[str, Any] | None:
    """How the answers were made: the `run.json` that `tinyllava_switchkd.eval.run` leaves beside its answers.

    None for answers from elsewhere, or of another benchmark.
    """
    path = Path(answers_file).with_name("run.json")
    if not path.is_file() or not Path(answers_file).match("answers*.jsonl"):
        return None
    run = read_json(path, dict)
    return run if run.get("benchmark") == benchmark else None


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
    parser.add_argument("--split", help="the answers' split, where the data folder holds several and they fit both")
    args = parser.parse_args(argv)
    try:
        score = score_file(
            args.benchmark, args.data_dir, args.answers_file, args.submission, args.allow_missing, args.split
        )
        if args.output is not None:
            write_json(args.output, score.to_dict(), indent=2)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 1
    print(json.dumps(score.to_dict(), indent=2, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
