"""The command: ``python -m tinyllava_switchkd.ablations TABLE``, which scripts/train/ablate_*.sh call."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tinyllava_switchkd.ablations.tables import TABLES
from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.launch.__main__ import is_dry

STORED = Path(__file__).resolve().parents[2] / "docs" / "ablation_runs.json"
"""Stored runs at quickstart scale: their results are in the docs, and a dry run uses their times."""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["real"]:
        from tinyllava_switchkd.ablations import real

        return real.main(words[1:])
    environment = os.environ
    parser = CommandParser(prog="ablations", description="Run what is missing of some ablation tables and print them.")
    parser.add_argument("tables", nargs="+", choices=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument(
        "--seeds", default=environment.get("SEEDS") or "5", help="students per row (default: $SEEDS, or 5)"
    )
    parser.add_argument(
        "--scale",
        default=environment.get("SCALE") or "quickstart",
        choices=("quickstart", "paper"),
        help="the quickstart's models, or the paper's (default: $SCALE, or quickstart)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(environment.get("ABLATE_OUT") or "playground/ablations"),
        help="output folder (default: $ABLATE_OUT, or %(default)s)",
    )
    args = parser.parse_args(words)
    if not args.seeds.isdecimal() or int(args.seeds) < 1:
        parser.error(f"the number of seeds is {args.seeds!r}; it must be at least 1.")
    seeds = range(1, int(args.seeds) + 1)
    from tinyllava_switchkd.quickstart.experiment import told

    if is_dry(environment):
        return told("ablations", lambda: print(_dry(args.scale, args.tables, len(seeds))))
    root = args.output.expanduser().resolve()
    return told("ablations", lambda: print(_run(args.scale, args.tables, seeds, root)))


def _dry(scale: str, names: Sequence[str], seeds: int) -> str:
    from tinyllava_switchkd.ablations import dry, paper, toy

    if scale == "paper":
        return dry.report(paper.plan(names, os.environ), seeds, paper.RESTS_ON)
    stored = read_json(STORED) if STORED.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        return dry.report(toy.plan(names, stored, Path(folder)), seeds, toy.RESTS_ON)


def _run(scale: str, names: Sequence[str], seeds: Sequence[int], root: Path) -> str:
    from tinyllava_switchkd.ablations import summary

    root.mkdir(parents=True, exist_ok=True)
    if scale == "paper":
        from tinyllava_switchkd.ablations import paper

        stored = read_json(paper.run_tables(names, seeds, root))
    else:
        from tinyllava_switchkd.ablations.toy import Toy, run_tables
        from tinyllava_switchkd.quickstart.experiment import Experiment, prepare_environment

        prepare_environment()
        toy = Toy(Experiment(root, say=print), os.environ.get("TEACHER_CACHE") or None)
        run_tables(toy, names, seeds)
        stored = toy.stored
    return "\n\n".join(summary.text_of(stored, TABLES[name]) for name in names)


if __name__ == "__main__":
    sys.exit(main())
