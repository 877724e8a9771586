"""The built-in export targets, chosen by ``--to NAME``.

Each imports its implementation only when it runs, so that the command line answers at once.
"""

from __future__ import annotations

import argparse
import logging

from tinyllava_switchkd.model.export.base import (
    GGUF_DTYPES,
    ONNX_DTYPES,
    ExportTarget,
    ExportTargetFactory,
    register_export_target,
)

__all__ = ["ExportTarget", "ExportTargetFactory", "register_export_target"]

logger = logging.getLogger(__name__)


@register_export_target("gguf")
class GgufTarget(ExportTarget):
    summary = "GGUF files of the language model and the vision tower, for llama.cpp"
    dtypes = GGUF_DTYPES

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--dtype", choices=self.dtypes, default="f16", help="type of the language model's matrices (default: f16)"
        )

    def export(self, args: argparse.Namespace) -> None:
        from tinyllava_switchkd.model.export.gguf import to_gguf

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
        from tinyllava_switchkd.model.export.hf_llava import to_hf_llava

        difference = to_hf_llava(args.model, args.out, args.template, args.dtype, not args.no_verify)
        if difference is not None:
            logger.info("Checked: same prompt, same answer, logits within %.2g.", difference)


@register_export_target("onnx")
class OnnxTarget(ExportTarget):
    summary = "ONNX graphs in transformers.js's layout, for onnxruntime and browsers"
    dtypes = ONNX_DTYPES

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--dtype",
            nargs="+",
            choices=self.dtypes,
            default=["fp32"],
            help="one or more precisions; each is a set of files",
        )
        parser.add_argument(
            "--questions", help="question file (JSON lines with image and text, as LLaVA's) to compare the answers on"
        )
        parser.add_argument("--image_folder", help="folder with the images of --questions")
        parser.add_argument("--max_questions", type=int, help="use this many of the questions, drawn with a fixed seed")

    def export(self, args: argparse.Namespace) -> None:
        from tinyllava_switchkd.model.export.onnx import sentence, to_onnx
        from tinyllava_switchkd.model.export.questions import read_questions

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
        from tinyllava_switchkd.model.export.from_llava import from_hf_llava, is_hf_llava, to_v1
        from tinyllava_switchkd.model.weights import resolve_folder

        write = from_hf_llava if is_hf_llava(resolve_folder(args.model)) else to_v1
        write(args.model, args.out, args.template, args.dtype)
