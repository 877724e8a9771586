"""The command: ``python -m tinyllava_switchkd.ablations TABLE``, which scripts/train/ablate_*.sh call."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.io import read_json

from .tables import TABLES

STORED = Path(__file__).resolve().parents[2] / "docs" / "ablation_runs.json"
"""Runs at quickstart scale whose figures are in the documents, and whose seconds a dry run counts with."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["real"]:
        from . import real

        return real.main(words[1:])
    environment = os.environ
    parser = CommandParser(prog="ablations", description="Tables of ablations: what is missing is run, then shown.")
    parser.add_argument("tables", nargs="+", choices=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument(
        "--seeds", default=environment.get("SEEDS") or "5", help="students of each row (default: $SEEDS, or 5)"
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
        help="where everything goes (default: $ABLATE_OUT, or %(default)s)",
    )
    args = parser.parse_args(words)
    if not args.seeds.isdecimal() or int(args.seeds) < 1:
        parser.error(f"the number of seeds is {args.seeds!r}; it takes at least one.")
    seeds = range(1, int(args.seeds) + 1)
    from tinyllava_switchkd.quickstart.experiment import told

    if environment.get("DRY_RUN", "").lower() not in ("", "0", "false", "no"):
        return told("ablations", lambda: print(_dry(args.scale, args.tables, len(seeds))))
    root = args.output.expanduser().resolve()
    return told("ablations", lambda: print(_run(args.scale, args.tables, seeds, root)))


def _dry(scale: str, names: Sequence[str], seeds: int) -> str:
    from . import dry, paper, toy

    if scale == "paper":
        return dry.report(paper.plan(names, os.environ), seeds, paper.RESTS_ON)
    stored = read_json(STORED) if STORED.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        return dry.report(toy.plan(names, stored, Path(folder)), seeds, toy.RESTS_ON)


def _run(scale: str, names: Sequence[str], seeds: Sequence[int], root: Path) -> str:
    from . import summary

    root.mkdir(parents=True, exist_ok=True)
    if scale == "paper":
        from . import paper

        stored = read_json(paper.run_tables(names, seeds, root))
    else:
        from tinyllava_switchkd.quickstart.experiment import Experiment, prepare_environment

        from .toy import Toy, run_tables

        prepare_environment()
        toy = Toy(Experiment(root, say=print), os.environ.get("TEACHER_CACHE") or None)
        run_tables(toy, names, seeds)
        stored = toy.stored
    return "\n\n".join(summary.text_of(stored, TABLES[name]) for name in names)


if __name__ == "__main__":
    sys.exit(main())
