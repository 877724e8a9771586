"""The quickstart, from nothing to a table: ``bash scripts/quickstart.sh [--seeds N]``.

It writes scenes and tiny base models, calls ``scripts/train/*.sh`` on them, asks the checkpoints that come out, and
lays the answers side by side. What is there already, made from the same settings, is used again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from .benchmarks import COST, make_benchmarks, report_text, run_benchmarks
from .plan import Plan, Stage, Workspace
from .prepare import extract_llm, extract_tower, make_data, make_random_models
from .report import Report
from .runner import STARTUP_COST, Runner, StageError

Job = Callable[[Runner], object]
WHO = ("teacher", "student")
BENCHMARKED = ("teacher", "sft", "switch_kd")
"""What the benchmarks' commands are run on."""


class Quickstart:
    """All of it, for one output folder.

    Args:
        root: the output folder.
        seeds: seeds of the student's data and order.
        plan: sizes and settings.
        lanes: scripts that run at once.
        quiet: no progress bar.
    """

    def __init__(
        self, root: Path, seeds: Sequence[int] = (1,), plan: Plan | None = None, lanes: int = 2, quiet: bool = False
    ) -> None:
        self.space = Workspace(root, plan or Plan())
        self.seeds, self.lanes, self.quiet = tuple(seeds), lanes, quiet

    def __call__(self) -> dict:
        """Run what is missing.

        Returns:
            the results, as ``results.json`` holds them.

        Raises:
            StageError: a training script failed.
        """
        space, seeds = self.space, self.seeds
        report = Report(space, seeds)
        transformers_logging.disable_progress_bar()  # there is one already
        with Runner(space.logs, lanes=self.lanes, quiet=self.quiet) as runner:
            runner.expect(sum(stage.steps * stage.cost + STARTUP_COST for stage in self._expected()))
            runner.expect(report.cost + len(BENCHMARKED) * COST)
            runner.say("Scenes and random weights")
            make_data(space, seeds)
            make_random_models(space)
            runner.say("Base models, on rendered digits (they stand for SigLIP and Qwen2.5)")
            runner.stage(space.tower_stage())
            extract_tower(space)
            runner.run([self._jobs([space.llm_stage(who)]) for who in WHO])
            for who in WHO:
                extract_llm(space, who)
            runner.say("Teacher (PT, SFT) and students (PT), on handwriting")
            runner.run([self._jobs(space.teacher_stages()), self._jobs(space.student_pt(seed) for seed in seeds)])
            runner.say("Students, from the same point: SFT, Switch-KD, SFT at Switch-KD's time")
            runner.run([[self._student(seed)] for seed in seeds])
            runner.say("Questions to all of them")
            results = report.make(runner)
            runner.say("The benchmarks' commands on the held-out questions")
            return {**results, "text": results["text"] + "\n\n" + self._benchmarks(runner, report)}

    def _student(self, seed: int) -> Job:
        """The three ways of one seed, one after another, so that their times are taken under the same load."""
        space = self.space

        def job(runner: Runner) -> None:
            sft = runner.stage(space.student_sft(seed))
            switch = runner.stage(space.student_switch(seed))
            runner.stage(space.equal_time(seed, sft, switch))

        return job

    def _benchmarks(self, runner: Runner, report: Report) -> str:
        """scripts/eval on the teacher and the first seed's students; the report's text."""
        make_benchmarks(self.space)
        checkpoints = {method: folders[0] for method, folders in report.checkpoints().items() if method in BENCHMARKED}

        def job_of(method: str) -> Job:
            return lambda runner: run_benchmarks(self.space, runner, method, checkpoints[method])

        runner.run([[job_of(method)] for method in checkpoints])
        return report_text(self.space, list(checkpoints))

    def _expected(self) -> list[Stage]:
        space = self.space
        stages = [space.tower_stage(), *map(space.llm_stage, WHO), *space.teacher_stages()]
        for seed in self.seeds:
            stages += [space.student_pt(seed), space.student_sft(seed), space.student_switch(seed)]
            stages.append(space.equal_time(seed, 1.0, space.student_switch(seed).cost))  # a guess, for the time left
        return stages

    @staticmethod
    def _jobs(stages: Iterable[Stage]) -> list[Job]:
        def job_of(stage: Stage) -> Job:
            return lambda runner: runner.stage(stage)

        return [job_of(stage) for stage in stages]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="students to train each way (default: %(default)s)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("QUICKSTART_OUT") or "playground/quickstart"),
        help="where everything goes (default: $QUICKSTART_OUT, or %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}; it takes at least one.")
    root = args.output.expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".writable").touch()
        (root / ".writable").unlink()
    except OSError as error:
        print(f"quickstart.sh: cannot write to {root} ({error.strerror}); set QUICKSTART_OUT.", file=sys.stderr)
        return 1
    started = time.monotonic()
    try:
        results = Quickstart(root, range(1, args.seeds + 1), lanes=min(2, os.cpu_count() or 1))()
    except StageError as error:
        print(f"\nquickstart.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart.sh: stopped; what is finished is used again next time.", file=sys.stderr)
        return 130
    print("\n" + results["text"])
    print(f"\nAll of it is in {root} ({(time.monotonic() - started) / 60:.1f} minutes).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
