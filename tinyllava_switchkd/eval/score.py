"""Score a benchmark's answers: ``python -m tinyllava_switchkd.eval.score BENCH --data_dir DIR --answers_file FILE``.

Prints only one JSON object on stdout; an error is one sentence on stderr and exit status 1. It does not import torch,
so it starts quickly and runs anywhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava_switchkd.cli import CommandParser, show
from tinyllava_switchkd.eval.benchmarks import Benchmark, BenchmarkFactory, JudgeFactory, Score, names, read_answers
from tinyllava_switchkd.eval.benchmarks.files import sentence_of
from tinyllava_switchkd.io import JsonObject, read_json, write_json, write_jsonl
from tinyllava_switchkd.statistics import standard_error


def score_file(
    name: str,
    data_dir: str | Path,
    answers_file: str | Path,
    submission: str | Path | None = None,
    allow_missing: bool = False,
    split: str | None = None,
    judge: str | None = None,
    limit: int | None = None,
) -> Score:
    """Score an answers file, and write the upload file if requested.

    Args:
        name: a registered benchmark.
        data_dir: the benchmark's own folder, in LLaVA's layout.
        answers_file: JSONL with LLaVA's keys.
        submission: path of the upload file to write.
        allow_missing: write it even if answers are missing.
        split: the answers' split; by default taken from the run beside them, otherwise inferred from their questions.
        judge: name of a registered judge for answers that no rule can read; none by default.
        limit: score only the first questions, as many as this; by default as many as the run asked.

    Returns:
        The score, with the `run` object beside the answers. If the split has no public ground truth and only the
        submission could be written, its `score` is None and the details say why. If the run asked only a part of the
        split, only that part is scored, and `asked` describes it.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the benchmark is unknown, a file is malformed, ids do not match, or there is neither ground truth
            nor a submission to write.
    """
    benchmark = BenchmarkFactory(name)
    benchmark.judge = None if judge is None else JudgeFactory(judge)
    answers = read_answers(answers_file)
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"The data folder {data_dir} does not exist; --data_dir is the benchmark's own folder.")
    run = run_beside(answers_file, benchmark.name)
    splits = benchmark.splits or (benchmark.paper_split,)
    if split is not None and split not in splits:
        raise ValueError(f"{benchmark.title} has no split {split!r}, only {', '.join(splits)}.")
    if split is None and run is not None and run.get("split") in benchmark.splits:
        split = run["split"]
    benchmark.answered_split = split
    asked = None if run is None else _narrow(benchmark, data_dir, run if limit is None else run | {"limit": limit})
    if benchmark.asked is not None:
        keys = {question.key for question in benchmark.asked}
        answers = [answer for answer in answers if answer.key in keys]
    score = benchmark.score(data_dir, answers)
    if submission is not None:
        benchmark.write_submission(data_dir, answers, submission, allow_missing=allow_missing)
    elif "note" in score.details:
        raise ValueError(score.details["note"])
    if score.score is not None and score.rows:
        score.standard_error = standard_error(list(benchmark.units(score.rows)), benchmark.headline)
    if judge is not None:
        share = 100.0 * benchmark.judged["read"] / max(score.answered, 1)
        score.judge = {"name": judge, **benchmark.judged, "share_of_answers": share}
    score.run, score.asked = run, asked
    return score


def _narrow(benchmark: Benchmark, data_dir: str | Path, run: JsonObject) -> JsonObject | None:
    """Restrict a benchmark to the questions of a run; returns a description of that part, None for the whole split.

    Raises:
        ValueError: the benchmark does not have one of the run's options.
    """
    options, limit = run.get("options") or {}, run.get("limit")
    chosen = {name: value for name, value in options.items() if value != benchmark.default_of(name)}
    if limit is None and not chosen:
        return None
    whole = sum(1 for _ in benchmark.questions(data_dir, run.get("split")))
    benchmark.configure(options)
    benchmark.asked = list(benchmark.questions(data_dir, run.get("split")))[:limit]
    if len(benchmark.asked) == whole:
        benchmark.asked = None
        return None
    return {"questions": len(benchmark.asked), "of": whole, **({} if limit is None else {"limit": limit}), **chosen}


def run_beside(answers_file: str | Path, benchmark: str) -> JsonObject | None:
    """The `run.json` that `tinyllava_switchkd.eval.run` writes beside its answers, which says how they were made.

    None for answers of another origin or another benchmark.
    """
    path = Path(answers_file).with_name("run.json")
    if not path.is_file() or not Path(answers_file).match("answers*.jsonl"):
        return None
    run = read_json(path)
    return run if run.get("benchmark") == benchmark else None


def rows_file(score_file: str | Path) -> Path:
    """The file of verdicts that belongs to a score file: ``pope.json`` -> ``pope.rows.jsonl``."""
    return Path(score_file).with_suffix(".rows.jsonl")


def write_rows(score: Score, path: str | Path) -> None:
    """Write one line per question, with its verdict; see `Benchmark.score`."""
    write_jsonl(path, ({"benchmark": score.benchmark, **row} for row in score.rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.eval.score", description="Score a benchmark's answers with its own protocol."
    )
    parser.add_argument("benchmark", metavar="BENCH", help=f"one of {', '.join(names())}, or your own")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="the benchmark's own folder (LLaVA's layout)")
    parser.add_argument("--answers_file", required=True, metavar="FILE", help="answers, JSONL with LLaVA's keys")
    parser.add_argument("--output", metavar="FILE.json", help="also write the JSON object to this file")
    parser.add_argument("--rows", metavar="FILE.jsonl", help="write one row per question, with its verdict")
    parser.add_argument("--submission", metavar="FILE", help="write the file to upload to the benchmark's server")
    parser.add_argument(
        "--allow_missing", action="store_true", help="write the submission even if questions have no answer"
    )
    parser.add_argument("--split", help="the answers' split, if the data folder holds several that they fit")
    parser.add_argument("--judge", metavar="NAME", help="a plugin's judge for answers that no rule can read (none)")
    args = parser.parse_args(argv)
    try:
        score = score_file(
            args.benchmark,
            args.data_dir,
            args.answers_file,
            submission=args.submission,
            allow_missing=args.allow_missing,
            split=args.split,
            judge=args.judge,
        )
        if args.output is not None:
            write_json(args.output, score.to_dict())
        if args.rows is not None:
            write_rows(score, args.rows)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 1
    show(json.dumps(score.to_dict(), indent=2, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
