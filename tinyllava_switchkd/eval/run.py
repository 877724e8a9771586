"""Generate a checkpoint's answers to a benchmark, and score them if asked to::

    python -m tinyllava_switchkd.eval.run BENCH --model_path CHECKPOINT --data_dir DIR --output_dir DIR ...
    torchrun --nproc_per_node 8 -m tinyllava_switchkd.eval.run ...  # or accelerate launch: the same on several machines

The answers are written to `answers.jsonl` in the output folder, with LLaVA's keys and in the question file's order.
This file exists only once no answer is missing. To continue a run that was killed, repeat the command.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinyllava_switchkd.cli import CommandParser, first_line
from tinyllava_switchkd.constants import FLOAT_DTYPES, TEMPLATE_FLAGS
from tinyllava_switchkd.eval.benchmarks import BenchmarkFactory, names
from tinyllava_switchkd.eval.benchmarks.files import sentence_of
from tinyllava_switchkd.eval.processes import OtherProcessFailed, Processes, spawn, tell
from tinyllava_switchkd.eval.score import rows_file, score_file, write_rows
from tinyllava_switchkd.io import write_json
from tinyllava_switchkd.registry import checkpoint_name

if TYPE_CHECKING:  # modules that need torch are imported after the command line is read
    from tinyllava_switchkd.eval.job import Job

logger = logging.getLogger("tinyllava_switchkd.eval.run")


def score(job: Job) -> None:
    """Score the answers and write the score file, with the verdicts beside it."""
    arguments = job.arguments
    result = score_file(
        job.benchmark.name,
        arguments.data_dir,
        job.answers.merged,
        arguments.submission,
        allow_missing=arguments.skip_bad_images or arguments.limit is not None,
        judge=arguments.judge,
        limit=arguments.limit,
    )
    if arguments.score is not None:
        write_json(arguments.score, result.to_dict())
        write_rows(result, rows_file(arguments.score))
    if result.missing:
        logger.warning("%d of %d questions have no answer and count as wrong.", result.missing, result.total)
    part = f", the {result.asked['questions']:,} of {result.asked['of']:,} questions asked" if result.asked else ""
    if result.score is not None:
        logger.info("%s (%s%s): %s %.1f", job.benchmark.title, result.split, part, result.metric, result.score)
    elif arguments.submission is not None:
        logger.info("%s (%s): no public ground truth; upload %s.", job.benchmark.title, job.split, arguments.submission)
    else:
        logger.info("%s (%s%s): no question counts for the headline score.", job.benchmark.title, result.split, part)


def run(arguments: argparse.Namespace, processes: Processes) -> None:
    """The whole command in one process.

    Raises:
        FileNotFoundError, ValueError: an error that the user must fix.
        OtherProcessFailed: another process has failed.
    """
    from tinyllava_switchkd.eval.job import Job, finish, generate, set_up, still_open

    processes.join()
    job = None
    try:
        failed = True
        try:
            if processes.first:
                job = Job.of(arguments, processes)
                set_up(job)
            failed = False
        finally:
            processes.meet(failed)
        if job is None:
            job = Job.of(arguments, processes)
            job.answers.lock(processes.rank)
        generate(job)
        if processes.first:
            finish(job)
            if arguments.score is not None or arguments.submission is not None:
                score(job)
    except KeyboardInterrupt:
        if job is not None and processes.first:
            tell(still_open(job), processes.rank)
        raise
    finally:
        processes.leave()
        if job is not None:
            job.answers.unlock()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.eval.run", description="Generate a checkpoint's answers to a benchmark."
    )
    parser.add_argument("benchmark", metavar="BENCH", help=f"one of {', '.join(names())}, or your own")
    parser.add_argument("--model_path", required=True, help="checkpoint: a folder or a hub repository")
    parser.add_argument("--data_dir", required=True, metavar="DIR", help="the benchmark's own folder (LLaVA's layout)")
    parser.add_argument(
        "--output_dir", required=True, metavar="DIR", help="folder for the answers; a run in it is continued"
    )
    parser.add_argument("--model_name", help="model_id of the answers; by default the checkpoint's base name")
    parser.add_argument("--split", help="the split to ask; by default the first one in the data folder")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--batch_size",
        type=_batch_size,
        default=16,
        metavar="N",
        help="questions at once (%(default)s), or auto: as many as fit into the GPU's memory",
    )
    parser.add_argument("--num_workers", type=int, metavar="N", help="processes that read images (GPU: 4, CPU: 0)")
    parser.add_argument(
        "--guess_answers",
        action="store_true",
        help="try the commonest one-token answers in the pass that reads a question; the answers stay the same",
    )
    parser.add_argument("--max_new_tokens", type=_positive, metavar="N", help="by default LLaVA's for the benchmark")
    parser.add_argument(*TEMPLATE_FLAGS, metavar="NAME", help="conversation template; by default the checkpoint's own")
    parser.add_argument("--image_aspect_ratio", choices=("square", "pad"), help="by default the checkpoint's own")
    parser.add_argument(
        "--dtype", choices=("auto", *FLOAT_DTYPES), default="auto", help="auto: half precision on a GPU, else float32"
    )
    parser.add_argument("--device", help="by default this process's GPU, else the CPU")
    parser.add_argument("--attn_implementation", metavar="NAME", help="sdpa, eager or flash_attention_2")
    parser.add_argument(
        "--skip_bad_images", action="store_true", help="leave questions unanswered if their image cannot be read"
    )
    parser.add_argument("--score", metavar="FILE.json", help="score the answers and write the result there")
    parser.add_argument("--submission", metavar="FILE", help="write the file to upload to the benchmark's server")
    parser.add_argument("--judge", metavar="NAME", help="a plugin's judge for answers that no rule can read (none)")
    parser.add_argument(
        "--response_cache", metavar="DIR", help="share answers with runs of the same checkpoint and the same DIR"
    )
    parser.add_argument(
        "--processes", type=_positive, metavar="N", help="processes to share the questions, one per GPU"
    )
    options = {option.name: option for name in names() for option in BenchmarkFactory(name).options}
    for option in options.values():
        kind = {"choices": option.choices} if option.choices else {"action": "store_true"}
        parser.add_argument(f"--{option.name}", help=option.help, **kind)
    arguments = parser.parse_args(argv)
    arguments.options = {name: getattr(arguments, name) for name in options}
    arguments.model_name = arguments.model_name or checkpoint_name(arguments.model_path)
    return arguments


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, which is 0 only if every wanted question has an answer."""
    arguments = parse_arguments(argv)
    if arguments.processes is not None and "RANK" not in os.environ:
        return spawn("tinyllava_switchkd.eval.run", sys.argv[1:] if argv is None else argv, arguments.processes)

    import torch

    rank, prefix = 0, ""
    handler = None
    if threading.current_thread() is threading.main_thread():
        # as Ctrl-C; torchrun sends SIGTERM to the other processes when one has failed
        handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        processes = Processes.from_environment()
        rank = processes.rank
        prefix = f"[process {rank}] " if processes.world > 1 else ""
        logging.basicConfig(format=f"{prefix}%(message)s")
        logging.getLogger("tinyllava_switchkd").setLevel(logging.INFO if processes.first else logging.WARNING)
        run(arguments, processes)
    except OtherProcessFailed as error:
        if str(error):
            tell(f"{prefix}error: {error}", rank)
        return 1
    except (ValueError, OSError, ImportError) as error:
        tell(f"{prefix}error: {sentence_of(error)}", rank)
        return 1
    except torch.OutOfMemoryError as error:
        reason = first_line(error)
        tell(
            f"{prefix}error: the GPU's memory is too small even for one question at a time: {reason} "
            f"The answers so far are kept; free memory on the GPU, or pass --dtype bfloat16, and repeat the command.",
            rank,
        )
        return 1
    except KeyboardInterrupt:
        tell(f"{prefix}Interrupted.", rank)
        return 130
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
