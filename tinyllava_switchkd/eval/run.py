"""Generate a checkpoint's answers to a benchmark, and score them if asked to::

    python -m tinyllava_switchkd.eval.run BENCH --model-path CHECKPOINT --data-dir DIR --output-dir DIR
        [--score FILE.json] [--batch-size N] [--limit N] ...
    torchrun --nproc_per_node 8 -m tinyllava_switchkd.eval.run ...          # or accelerate launch: a share for each GPU

The answers are `answers.jsonl` in the output folder, with LLaVA's keys and in the question file's order; the file is
there only once no answer is missing. A run that was killed goes on where it stopped when the command is repeated.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .benchmarks import BENCHMARKS
from .benchmarks.files import sentence_of, write_json
from .generate import DTYPES
from .job import Job, finish, generate, set_up, still_open
from .processes import OtherProcessFailed, Processes
from .score import score_file

logger = logging.getLogger("tinyllava_switchkd.eval.run")


def score(job: Job, run: Mapping[str, Any]) -> None:
    """Score the answers and write the score file, with the `run` object in it."""
    arguments = job.arguments
    result = score_file(
        job.benchmark.name,
        arguments.data_dir,
        job.answers.merged,
        arguments.submission,
        allow_missing=arguments.skip_bad_images or arguments.limit is not None,
    )
    if arguments.score is not None:
        write_json(arguments.score, {**result.to_dict(), "run": run}, indent=2)
    if result.missing:
        logger.warning("%d of %d questions have no answer and count as wrong.", result.missing, result.total)
    if result.score is None:
        logger.info("%s (%s): no public ground truth; upload %s.", job.benchmark.title, job.split, arguments.submission)
    else:
        logger.info("%s (%s): %s %.1f", job.benchmark.title, result.split, result.metric, result.score)


def run(arguments: argparse.Namespace, processes: Processes) -> None:
    """The whole command in one process.

    Raises:
        FileNotFoundError, ValueError: something the user has to see to.
        OtherProcessFailed: another process has failed.
    """
    processes.join()
    job, description = None, {}
    try:
        failed = True
        try:
            if processes.first:
                job = Job.of(arguments, processes)
                description = set_up(job)
            failed = False
        finally:
            processes.agree(failed)
        if job is None:
            job = Job.of(arguments, processes)
            job.answers.lock(processes.rank)
        generate(job)
        if processes.first:
            description = finish(job, description)
            if arguments.score is not None or arguments.submission is not None:
                score(job, description)
    except KeyboardInterrupt:
        if job is not None and processes.first:
            logger.warning("%s", still_open(job))
        raise
    finally:
        processes.leave()
        if job is not None:
            job.answers.unlock()


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllava_switchkd.eval.run", description="Generate a checkpoint's answers to a benchmark."
    )
    parser.add_argument("benchmark", metavar="BENCH", help=f"one of {', '.join(BENCHMARKS)}, or your own")
    parser.add_argument("--model-path", required=True, help="checkpoint: a folder or a hub repository")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="the benchmark's own folder (LLaVA's layout)")
    parser.add_argument(
        "--output-dir", required=True, metavar="DIR", help="where the answers go; resumed if it has some"
    )
    parser.add_argument("--model-name", help="model_id of the answers; by default the checkpoint's base name")
    parser.add_argument("--split", help="the split to ask; by default the first that is there")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N questions")
    parser.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="questions at once (%(default)s)")
    parser.add_argument("--num-workers", type=int, metavar="N", help="processes that read images (GPU: 4, CPU: 0)")
    parser.add_argument("--max-new-tokens", type=_positive, metavar="N", help="by default LLaVA's for the benchmark")
    parser.add_argument("--conv-mode", metavar="NAME", help="conversation template; by default the checkpoint's own")
    parser.add_argument("--image-aspect-ratio", choices=("square", "pad"), help="by default the checkpoint's own")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: half precision on a GPU, else float32")
    parser.add_argument("--device", help="by default this process's GPU, else the CPU")
    parser.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager or flash_attention_2")
    parser.add_argument(
        "--skip-bad-images", action="store_true", help="leave questions unanswered whose image cannot be read"
    )
    parser.add_argument("--score", metavar="FILE.json", help="score the answers and write the result there")
    parser.add_argument("--submission", metavar="FILE", help="write the file that the benchmark's server takes")
    arguments = parser.parse_args(argv)
    arguments.model_name = arguments.model_name or default_model_name(arguments.model_path)
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def default_model_name(model_path: str) -> str:
    """Base name of a checkpoint; with its run's name for one of the trainer's intermediate ones (as in LLaVA)."""
    parts = [part for part in model_path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        parts = [Path(model_path).resolve().name or "model"]
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt("terminated")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 only if every question wanted has its answer."""
    arguments = parse_arguments(argv)
    rank = ""
    handler = None
    if threading.current_thread() is threading.main_thread():
        handler = signal.signal(signal.SIGTERM, _terminate)  # torchrun ends the others so when one has failed
    try:
        processes = Processes.from_environment()
        rank = f"[process {processes.rank}] " if processes.world > 1 else ""
        logging.basicConfig(format=f"{rank}%(message)s")
        logging.getLogger("tinyllava_switchkd").setLevel(logging.INFO if processes.first else logging.WARNING)
        run(arguments, processes)
    except OtherProcessFailed as error:
        if str(error):
            print(f"{rank}error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"{rank}error: {sentence_of(error)}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        print(
            f"{rank}error: the GPU's memory does not suffice even for one question at a time: {reason} "
            f"The answers made are kept; make room on the GPU, or pass --dtype bfloat16, and repeat the command.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"{rank}Interrupted.", file=sys.stderr)
        return 130
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
