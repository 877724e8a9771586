"""``--to v1``: TinyLLaVA v1's full layout, from any of its layouts or from transformers' LLaVA."""

from __future__ import annotations

import argparse

from ..checkpoint import load_pretrained_model, save_pretrained_model
from ..weights import resolve_folder
from .files import empty_folder, read_by_older_versions
from .from_llava import from_hf_llava, is_hf_llava
from .targets import ExportTarget, register_export_target


def to_v1(source: str, output_dir: str, conv_version: str | None = None, dtype: str | None = None) -> None:
    """Write a TinyLLaVA checkpoint of any layout (split, LoRA, TinyLLaVABench) in v1's full layout, self-contained."""
    output_dir = empty_folder(output_dir)
    model, tokenizer, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=dtype)
    save_pretrained_model(model, tokenizer, image_processor, output_dir, conv_version=conv_version)
    read_by_older_versions(output_dir)


@register_export_target("v1")
class V1Target(ExportTarget):
    summary = "TinyLLaVA v1's full layout, from any of its layouts or from transformers' LLaVA"

    def export(self, args: argparse.Namespace) -> None:
        write = from_hf_llava if is_hf_llava(resolve_folder(args.model)) else to_v1
        write(args.model, args.out, args.conv_version, args.dtype)
