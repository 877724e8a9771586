"""The base class of export targets, and their registry."""

from __future__ import annotations

import argparse

from tinyllava_switchkd.registry import Registry

GGUF_DTYPES = ("f32", "f16", "q8_0", "q4_0")
ONNX_DTYPES = ("fp32", "fp16", "int8", "q4")


class ExportTarget:
    """A layout to which checkpoints can be exported.

    A subclass describes itself in `summary`, which ``--help`` prints, and implements `export`. An export that is not
    possible is a `ValueError` or an `OSError` with one sentence, raised before anything is written.
    """

    summary = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """The values of ``--dtype``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the target's own arguments. All targets have MODEL, OUT, ``--template``, ``--no_verify`` and
        ``--allow_approximate``."""
        parser.add_argument("--dtype", choices=self.dtypes, help="dtype of the weights (default: unchanged)")

    def export(self, args: argparse.Namespace) -> None:
        """Write ``args.model`` to ``args.out`` and, unless ``args.no_verify`` is set, compare the two.

        Raises:
            ValueError: the layout cannot represent the model, or not exactly and ``args.allow_approximate`` is not set.
            OSError: there is no such checkpoint, or ``args.out`` is not empty.
        """
        raise NotImplementedError


ExportTargetFactory: Registry[type[ExportTarget]] = Registry("export target")
register_export_target = ExportTargetFactory.register
"""``@register_export_target("name")`` on an `ExportTarget` class."""
