"""The command that looks a data file over: ``python -m tinyllava_switchkd.data.check DATA.json --image-folder DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from transformers import AutoTokenizer

from tinyllava_switchkd.data.inspection import check_data


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, 1 if there is a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m tinyllava_switchkd.data.check", description="Look a LLaVA data file over before training."
    )
    parser.add_argument("data_path", help="LLaVA JSON or JSON lines")
    parser.add_argument("--image-folder", help="folder that the images' names start from")
    parser.add_argument("--conv-version", default="phi", help="conversation template (default: %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer to check the template against and to measure lengths with")
    parser.add_argument("--num-image-tokens", type=int, default=1, help="tokens an image takes (default: %(default)s)")
    parser.add_argument("--model-max-length", type=int, help="where samples are cut (default: the tokenizer's)")
    parser.add_argument("--decode", action="store_true", help="decode every image, too")
    args = parser.parse_args(argv)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
        report = check_data(
            args.data_path,
            args.image_folder,
            conv_version=args.conv_version,
            tokenizer=tokenizer,
            num_image_tokens=args.num_image_tokens,
            model_max_length=args.model_max_length,
            decode=args.decode,
        )
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
