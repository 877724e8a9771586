"""Export targets, entered with ``@register_export_target("name")`` and chosen by ``--to name``.

Each imports the file that does its work when it is run, so that the command line answers at once.
"""

from __future__ import annotations

import argparse
import logging

from tinyllava_switchkd.registry import Registry

logger = logging.getLogger(__name__)


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


@register_export_target("gguf")
class GgufTarget(ExportTarget):
    summary = "GGUF files of language model and vision tower, for llama.cpp"
    dtypes = ("f32", "f16", "q8_0", "q4_0")

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--dtype", choices=self.dtypes, default="f16", help="of the language model's matrices (default: f16)"
        )

    def export(self, args: argparse.Namespace) -> None:
        from .gguf import to_gguf

        record = to_gguf(args.model, args.out, args.dtype, args.template, args.allow_approximate, not args.no_verify)
        logger.info("%s", ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in record["bytes"].items()))
        for part in record.get("approximate", []):
            logger.warning("Approximate: %s", part)
        if found := record.get("every_patch"):
            logger.warning(
                "With every patch, %d of %d answers are equal; the first token's logits differ by up to %.2g.",
                *(found["equal"], found["questions"], found["logits"]),
            )
        logger.info("Images: %s", record["images"])


@register_export_target("hf-llava")
class HfLlavaTarget(ExportTarget):
    summary = "transformers' LlavaForConditionalGeneration"

    def export(self, args: argparse.Namespace) -> None:
        from .hf_llava import to_hf_llava

        difference = to_hf_llava(args.model, args.out, args.template, args.dtype, not args.no_verify)
        if difference is not None:
            logger.info("Checked: same prompt, same answer, logits within %.2g.", difference)


@register_export_target("onnx")
class OnnxTarget(ExportTarget):
    summary = "ONNX graphs in transformers.js's layout, for onnxruntime and browsers"
    dtypes = ("fp32", "fp16", "int8", "q4")

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--dtype",
            nargs="+",
            choices=self.dtypes,
            default=["fp32"],
            help="one or more, a set of files each",
        )
        parser.add_argument(
            "--questions", help="JSON lines of image and text (LLaVA's question files) to measure the agreement on"
        )
        parser.add_argument("--image_folder", help="where the images of --questions are")
        parser.add_argument("--max_questions", type=int, help="so many of them, drawn at random, the same each time")

    def export(self, args: argparse.Namespace) -> None:
        from .onnx import sentence, to_onnx
        from .questions import read_questions

        questions = None
        if args.questions:
            questions = read_questions(args.questions, args.image_folder, args.max_questions)
        measured = to_onnx(
            args.model,
            args.out,
            args.dtype,
            args.template,
            args.allow_approximate,
            not args.no_verify,
            questions,
        )
        for dtype, found in measured.items():
            logger.info("%s: %s", dtype, sentence(found))


@register_export_target("v1")
class V1Target(ExportTarget):
    summary = "TinyLLaVA v1's full layout, from any of its layouts or from transformers' LLaVA"

    def export(self, args: argparse.Namespace) -> None:
        from ..weights import resolve_folder
        from .from_llava import from_hf_llava, is_hf_llava, to_v1

        write = from_hf_llava if is_hf_llava(resolve_folder(args.model)) else to_v1
        write(args.model, args.out, args.template, args.dtype)
