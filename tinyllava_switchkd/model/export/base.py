"""What an export target is, and the registry of them."""

from __future__ import annotations

import argparse

from tinyllava_switchkd.registry import Registry

GGUF_DTYPES = ("f32", "f16", "q8_0", "q4_0")
ONNX_DTYPES = ("fp32", "fp16", "int8", "q4")


class ExportTarget:
    """A layout that a checkpoint can be written in.

    A subclass says what it is in `summary`, which ``--help`` prints, and implements `export`. Everything that stops an
    export is a `ValueError` or an `OSError` with one sentence, raised before anything is written.
    """

    summary = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """What ``--dtype`` may be."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The target's own arguments; MODEL, OUT, ``--template``, ``--no_verify`` and ``--allow_approximate`` are
        everybody's."""
        parser.add_argument("--dtype", choices=self.dtypes, help="of the weights (default: as is)")

    def export(self, args: argparse.Namespace) -> None:
        """Write ``args.model`` into ``args.out`` and, unless ``args.no_verify``, compare the two.

        Raises:
            ValueError: the layout cannot hold the model exactly and ``args.allow_approximate`` is not set, or at all.
            OSError: there is no such checkpoint, or `out` is not empty.
        """
        raise NotImplementedError


ExportTargetFactory: Registry[type[ExportTarget]] = Registry("export target")
register_export_target = ExportTargetFactory.register
"""``@register_export_target("name")`` on an `ExportTarget` class."""
