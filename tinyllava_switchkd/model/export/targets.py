"""Export targets: one file each, entered with ``@register_export_target("name")``, chosen by ``--to name``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinyllava_switchkd.registry import Registry

from .files import empty_folder


class ExportTarget:
    """A layout that a checkpoint can be written in.

    A subclass says what it is in `summary`, which ``--help`` prints, and implements `export`. Everything that stops an
    export is a `ValueError` or an `OSError` with one sentence, raised before anything is written.
    """

    summary = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """What ``--dtype`` may be."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The target's own arguments; MODEL, OUT, ``--conv_version``, ``--no_verify`` and ``--allow_approximate`` are
        everybody's."""
        parser.add_argument("--dtype", choices=self.dtypes, help="of the weights (default: as is)")

    def export(self, args: argparse.Namespace) -> None:
        """Write ``args.model`` into ``args.out`` and, unless ``args.no_verify``, compare the two.

        Raises:
            ValueError: the layout cannot hold the model exactly and ``args.allow_approximate`` is not set, or at all.
            OSError: there is no such checkpoint, or `out` is not empty.
        """
        raise NotImplementedError


ExportTargetFactory = Registry("export target")
register_export_target = ExportTargetFactory.register
"""``@register_export_target("name")`` on an `ExportTarget` class."""

OWN = ("gguf", "hf_llava", "onnx", "v1")
"""The files of this folder that hold targets; a plugin registers its own by the entry point group of the registry."""


def load_targets() -> None:
    """Import the files that hold targets, so that each has registered itself."""
    for name in OWN:
        importlib.import_module(f"{__package__}.{name}")


@contextlib.contextmanager
def whole_folder(output_dir: str | Path) -> Iterator[Path]:
    """A folder that takes its place as `output_dir` only if the block ends without an exception.

    Raises:
        FileExistsError: there is something in `output_dir`.
    """
    output_dir = empty_folder(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's is for the owner alone
        if output_dir.exists():
            output_dir.rmdir()
        unfinished.rename(output_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
