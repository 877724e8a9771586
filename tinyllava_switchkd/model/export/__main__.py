"""The command ``python -m tinyllava_switchkd.model.export``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.constants import TEMPLATE_FLAGS
from tinyllava_switchkd.model.export.targets import ExportTargetFactory

logger = logging.getLogger(__name__)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, ``--to`` first, because each target adds arguments. ``args.target`` is the target."""
    names = ExportTargetFactory.list()
    chosen = CommandParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--to", choices=names)
    known, _ = chosen.parse_known_args(argv)

    targets = {name: ExportTargetFactory(name)() for name in names}
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.model.export",
        description="Write a checkpoint in another layout. With --to NAME, --help shows that target's arguments.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--to", required=True, choices=names, help="; ".join(f"{name}: {targets[name].summary}" for name in names)
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a checkpoint (for v1 also a LLaVA)")
    parser.add_argument("out", metavar="OUT", help="an empty folder, or one that does not exist yet")
    parser.add_argument(*TEMPLATE_FLAGS, help="conversation template, if not the checkpoint's own")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the export with the checkpoint")
    parser.add_argument(
        "--allow_approximate",
        action="store_true",
        help="also export a model that the target cannot represent exactly, and print how much the results differ",
    )
    if known.to is not None:
        targets[known.to].add_arguments(parser)
    args = parser.parse_args(argv)
    args.target = targets[args.to]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tinyllava_switchkd").setLevel(logging.INFO)
    try:
        args.target.export(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"python -m tinyllava_switchkd.model.export: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    logger.info("Written to %s.", Path(args.out))


if __name__ == "__main__":
    main()
