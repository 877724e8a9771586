"""Run the quickstart: ``bash scripts/quickstart.sh [--seeds N]``.

It trains a teacher and students on small scenes of real handwriting and asks all of them the same questions. Results
of earlier runs with the same settings are reused.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.io import JsonObject, write_json, write_text

if TYPE_CHECKING:  # torch is imported only after the command line has been parsed
    from tinyllava_switchkd.quickstart.experiment import Plan

BENCHMARKED = ("teacher", "sft", "switch_kd")
"""Models on which the benchmarks' commands are run."""


def quickstart(
    root: Path,
    seeds: Sequence[int] = (1,),
    plan: Plan | None = None,
    bases: Path | None = None,
    say: Callable[[str], object] = print,
) -> JsonObject:
    """Run whatever is missing.

    Args:
        root: output folder.
        seeds: seeds of the students' data and order.
        plan: sizes and settings.
        bases: folder of the base models; default: those shipped.
        say: called with each line of progress.

    Returns:
        the content of ``results.json``, and "text": the printed tables.

    Raises:
        StageError: a stage failed.
    """
    from tinyllava_switchkd.quickstart import report
    from tinyllava_switchkd.quickstart.as_benchmarks import run_benchmarks
    from tinyllava_switchkd.quickstart.base_models import SHIPPED
    from tinyllava_switchkd.quickstart.experiment import Experiment, once

    experiment = Experiment(root, plan, bases or SHIPPED, say)
    say("Teacher, on many scenes of handwriting (base models -> PT -> SFT)")
    checkpoints: dict[str, list[Path]] = {"teacher": [experiment.teacher()], **{way: [] for way in report.STUDENTS}}
    for seed in seeds:
        say("Students, on few scenes (base models -> PT -> SFT or Switch-KD)")
        for way, (stage, flags) in report.ways(experiment).items():
            checkpoints[way].append(experiment.student(stage, seed, flags))
    say("All models answer questions about test scenes")
    runs = {way: [experiment.scores(folder) for folder in folders] for way, folders in checkpoints.items()}
    results = report.results_of(experiment, runs, seeds)
    write_json(root / "results.json", results)
    pictures = [results, *(folders[0].name for folders in checkpoints.values())]
    once(root / "pictures", pictures, lambda folder: report.draw(experiment, results, runs, checkpoints, folder))
    text = report.text_of(results)
    say("The benchmark commands on some of these questions")
    text += "\n\n" + run_benchmarks(experiment, {way: checkpoints[way][0] for way in BENCHMARKED})
    write_text(root / "results.txt", text + "\n")
    return {**results, "text": text}


def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="quickstart.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="students per way of training (default: %(default)s)")
    parser.add_argument(
        "--from_scratch", action="store_true", help="train the base models, too, instead of using the shipped ones"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("QUICKSTART_OUT") or "playground/quickstart"),
        help="output folder (default: $QUICKSTART_OUT, or %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}; it must be at least 1.")
    root = args.output.expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".writable").touch()
        (root / ".writable").unlink()
    except OSError as error:
        print(f"quickstart.sh: cannot write to {root} ({error.strerror}); set QUICKSTART_OUT.", file=sys.stderr)
        return 1
    from tinyllava_switchkd.quickstart.experiment import prepare_environment, told

    prepare_environment()
    started = time.monotonic()

    def run() -> None:
        bases = None
        if args.from_scratch:
            from tinyllava_switchkd.quickstart.bases import make_bases

            bases = make_bases(root)
        print("\n" + quickstart(root, range(1, args.seeds + 1), bases=bases)["text"])
        print(f"\nEverything is in {root} ({(time.monotonic() - started) / 60:.1f} minutes).")

    return told("quickstart.sh", run)


if __name__ == "__main__":
    sys.exit(main())
