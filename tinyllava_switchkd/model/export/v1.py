"""``--to v1``: TinyLLaVA v1's full layout, from any of its layouts or from transformers' LLaVA."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import load_pretrained_model, save_pretrained_model
from .files import card_of_export, empty_folder, read_by_older_versions, whole_folder


def to_v1(source: str, output_dir: str, conv_version: str | None = None, dtype: str | None = None) -> None:
    """Write a TinyLLaVA checkpoint of any layout (split, LoRA, TinyLLaVABench) in v1's full layout, self-contained."""
    empty_folder(output_dir)
    model, tokenizer, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=dtype)
    with whole_folder(output_dir) as folder:
        save_pretrained_model(model, tokenizer, image_processor, folder, conv_version=conv_version)
        read_by_older_versions(folder)
        card_of_export(source, folder, Path(output_dir).resolve().name)
