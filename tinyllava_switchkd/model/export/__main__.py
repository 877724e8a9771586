"""``python -m tinyllava_switchkd.model.export``: see the package's own text."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import load_pretrained_model, save_pretrained_model
from ..weights import resolve_folder
from .files import empty_folder, read_by_older_versions
from .from_llava import from_hf_llava, is_hf_llava
from .hf_llava import to_hf_llava
from .verify import verify_export

logger = logging.getLogger(__name__)


def to_v1(source: str, output_dir: str, conv_version: str | None = None, dtype: str | None = None) -> None:
    """Write a TinyLLaVA checkpoint of any layout (split, LoRA, TinyLLaVABench) in v1's full layout, self-contained."""
    output_dir = empty_folder(output_dir)
    model, tokenizer, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=dtype)
    save_pretrained_model(model, tokenizer, image_processor, output_dir, conv_version=conv_version)
    read_by_older_versions(output_dir)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tinyllava_switchkd.model.export", description="Write a checkpoint in another layout."
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf-llava", "v1"),
        help="hf-llava: transformers' LlavaForConditionalGeneration; v1: TinyLLaVA v1's full layout",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a checkpoint (for v1 also of a LLaVA)")
    parser.add_argument("out", metavar="OUT", help="a folder that is empty or does not exist")
    parser.add_argument("--conv-version", help="conversation template, if the checkpoint does not name the right one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as is)")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not run both models on one image afterwards (hf-llava)"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.to == "hf-llava":
            to_hf_llava(args.model, args.out, args.conv_version, args.dtype)
            if not args.no_verify:
                difference = verify_export(args.model, args.out)
                logger.info("Checked: same prompt, same answer, logits within %.2g.", difference)
        elif is_hf_llava(resolve_folder(args.model)):
            from_hf_llava(args.model, args.out, args.conv_version, args.dtype)
        else:
            to_v1(args.model, args.out, args.conv_version, args.dtype)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    logger.info("Written to %s.", Path(args.out))


if __name__ == "__main__":
    main()
