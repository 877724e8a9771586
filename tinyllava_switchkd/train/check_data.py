"""``python -m tinyllava_switchkd.train.check_data DATA.json``: check a data file as a model would read it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.constants import TEMPLATE_FLAGS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, which is 1 if there is a problem."""
    parser = CommandParser(
        prog="python -m tinyllava_switchkd.train.check_data", description="Check a LLaVA data file before training."
    )
    parser.add_argument("data_path", help="LLaVA JSON or JSON lines")
    parser.add_argument("--image_folder", help="folder that the image paths are relative to")
    parser.add_argument(*TEMPLATE_FLAGS, default="phi", help="conversation template (default: %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer for checking the template and measuring lengths")
    parser.add_argument("--model_path", help="checkpoint whose tokenizer, visual tokens and image processor are used")
    parser.add_argument("--vision_tower", help="vision tower whose image processor and visual tokens are used")
    parser.add_argument("--connector_type", default="mlp2x_gelu", help="connector (default: %(default)s)")
    parser.add_argument("--mm_vision_select_feature", default="patch", help="patch or cls_patch (default: %(default)s)")
    parser.add_argument("--num_queries", type=int, default=128, help="for resampler and qformer (default: %(default)s)")
    parser.add_argument("--image_aspect_ratio", help="square or pad (default: the checkpoint's, else square)")
    parser.add_argument(
        "--num_image_tokens", type=int, help="visual tokens per image (default: those of the model or vision tower)"
    )
    parser.add_argument("--model_max_length", type=int, help="length to cut samples at (default: the tokenizer's)")
    parser.add_argument(
        "--decode",
        choices=("sample", "all", "none"),
        nargs="?",
        const="all",
        default="sample",
        help="images to decode: a sample spread over the file, all, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--allow_outside_images",
        action="store_true",
        help="allow images outside the folder (absolute paths, .., links)",
    )
    args = parser.parse_args(argv)
    try:
        lines, ready = _report(args)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0 if ready else 1


def _report(args: argparse.Namespace) -> tuple[list[str], bool]:
    """The report's lines, and whether the data has no problems."""
    for name in ("num_image_tokens", "model_max_length", "num_queries"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1.")
    from tinyllava_switchkd.data.inspection import check_data

    lines = []
    settings: dict[str, Any] = {}
    if args.model_path or args.vision_tower:
        settings = _model_settings(args)
        tokens, name = settings["num_image_tokens"], args.model_path or args.vision_tower
        lines.append(f"{tokens:>12,}  visual tokens per image ({name})")
    if args.tokenizer:
        from tinyllava_switchkd.model.llm import open_tokenizer

        settings["tokenizer"] = open_tokenizer(args.tokenizer)
    for name in ("image_aspect_ratio", "num_image_tokens", "model_max_length"):
        settings[name] = getattr(args, name) or settings.get(name)
    report = check_data(
        args.data_path,
        args.image_folder,
        template=args.template,
        decode=args.decode,
        allow_outside_images=args.allow_outside_images,
        **settings,
    )
    return [*lines, str(report)], report.ok


def _model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings for `check_data` from the model on the command line, without reading its weights."""
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig
    from tinyllava_switchkd.model.vision_tower import resolve_vision_tower
    from tinyllava_switchkd.train.preflight.skeleton import checkpoint_skeleton, on_meta

    if args.model_path:
        model = checkpoint_skeleton(args.model_path)
        return {
            "num_image_tokens": model.num_image_tokens,
            "image_processor": model.image_processor,
            "tokenizer": model.tokenizer,
            "image_aspect_ratio": model.config.image_aspect_ratio,
        }
    config = TinyLlavaConfig(
        vision_model_name_or_path=args.vision_tower,
        connector_type=args.connector_type,
        vision_feature_select_strategy=args.mm_vision_select_feature,
        num_queries=args.num_queries,
        resampler_hidden_size=768,
        num_resampler_layers=1,
        text_config={"model_type": "llama", "num_hidden_layers": 1},  # any language model: it is not used
    )
    resolve_vision_tower(args.vision_tower, config.vision_config).complete_config(config.vision_config, None, {})
    model = on_meta(config)
    return {"num_image_tokens": model.num_image_tokens, "image_processor": model.vision_tower.image_processor}


if __name__ == "__main__":
    sys.exit(main())
