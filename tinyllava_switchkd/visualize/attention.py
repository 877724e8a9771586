"""Attention maps of several models on one image, side by side (Switch-KD, Figure 3)::

python -m tinyllava_switchkd.visualize.attention --image IMAGE --question TEXT --model_path A B C --output FIGURE

On a set of images, it prints how strongly each model's maps correlate with those of the first model, the teacher::

python -m tinyllava_switchkd.visualize.attention --data DATA.json --image_folder IMAGES --model_path TEACHER A B
"""

from __future__ import annotations

import argparse
import itertools
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.constants import TEMPLATE_FLAGS
from tinyllava_switchkd.data.image_files import to_rgb
from tinyllava_switchkd.registry import checkpoint_name

if TYPE_CHECKING:  # torch is imported only after the command line has been parsed
    from matplotlib.figure import Figure
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase

    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava
    from tinyllava_switchkd.visualize.attention_map import AttentionMap


@dataclass(frozen=True)
class Look:
    """One model's answer to a question about an image, with its attention map (None if the answer is empty)."""

    name: str
    answer: str
    attention: AttentionMap | None
    box: tuple[float, ...]


def look(
    model: TinyLlava,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor,
    image: Image.Image,
    question: str,
    name: str = "",
    template: str | None = None,
    max_new_tokens: int = 64,
    layers: slice | None = None,
) -> Look:
    """Ask a model a question about an image (greedy decoding) and compute its attention map.

    Args:
        template: conversation template; None for the checkpoint's own.
        layers: decoder layers to average over; None for all.

    Raises:
        ValueError: the checkpoint has no known template; also see `attention_map`.
    """
    import torch

    from tinyllava_switchkd.data.image import ImagePreprocess
    from tinyllava_switchkd.data.text import TextPreprocess
    from tinyllava_switchkd.model.chat import conversation_template, stop_token_ids
    from tinyllava_switchkd.visualize.attention_map import attention_map
    from tinyllava_switchkd.visualize.grid import visible_box
    from tinyllava_switchkd.visualize.pieces import text_groups

    template = template or conversation_template(model, tokenizer)
    input_ids = TextPreprocess(tokenizer, template).prompt_ids(question)  # [T]
    pixels = ImagePreprocess(image_processor, model.config)(image)[None].to(model.device)  # [1, 3, H, W]
    with torch.no_grad():
        features = model.encode_images(pixels)  # [1, K, D]
    output = model.generate(
        input_ids[None].to(model.device),
        image_features=features,
        do_sample=False,
        num_beams=1,
        eos_token_id=stop_token_ids(model, tokenizer, template) or None,
        max_new_tokens=max_new_tokens,
    )[0].tolist()
    is_empty = not text_groups(tokenizer, output)
    return Look(
        name=name,
        answer=tokenizer.decode(output, skip_special_tokens=True).strip(),
        attention=None if is_empty else attention_map(model, tokenizer, input_ids, features, output, layers),
        box=visible_box(image.size, image_processor, model.config.image_aspect_ratio),
    )


def likeness(looks: Sequence[Sequence[Look]]) -> list[list[float | None]]:
    """Correlations of each model's maps with the first model's.

    Args:
        looks: [models][images]; the first model is the reference.

    Returns:
        [models - 1][images]; None where a map is missing or constant.
    """
    from tinyllava_switchkd.visualize.attention_map import correlation

    first, *others = looks
    return [
        [
            correlation(look.attention, reference.attention) if look.attention and reference.attention else None
            for look, reference in zip(of_model, first, strict=True)
        ]
        for of_model in others
    ]


def likeness_lines(names: Sequence[str], values: Sequence[Sequence[float | None]]) -> list[str]:
    """Means over images with 95 % intervals, and each model's difference to the previous one on the same images."""
    lines = []
    for name, row in zip(names, values, strict=True):
        known = [value for value in row if value is not None]
        lines.append(f"{name}: {_interval(known)} over {len(known)} of {len(row)} images")
    for (a, before), (b, after) in itertools.pairwise(zip(names, values, strict=True)):
        both = [y - x for x, y in zip(before, after, strict=True) if x is not None and y is not None]
        lines.append(f"{b} minus {a}: {_interval(both)} over {len(both)} images")
    return lines


def _interval(values: Sequence[float]) -> str:
    from tinyllava_switchkd.statistics import mean_interval

    if not values:
        return "no map to compare"
    mean, low, high = mean_interval(values)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def draw(image: Image.Image, question: str, looks: Sequence[Look], by_token: bool = False, columns: int = 8) -> Figure:
    """Draw the image and, beside it, every model's map of its whole answer.

    Args:
        image: the image.
        question: the title.
        looks: one per model.
        by_token: draw one row per model with one map per token of its answer.
        columns: largest number of tokens per row.
    """
    from matplotlib.figure import Figure

    from tinyllava_switchkd.visualize.overlay import fit, overlay

    plain = fit(to_rgb(image))
    rows: list[list[tuple[str, Image.Image]]] = [[("", plain)]]
    if by_token:
        rows = []
        for look in looks:
            rows.append([(look.name, plain)])
            if look.attention is not None:
                for index, text in enumerate(look.attention.tokens[:columns]):
                    rows[-1].append((repr(text)[1:-1], overlay(image, look.attention.of(index), look.box)))
    else:
        for look in looks:
            title = f"{look.name}\n{look.answer or '(no answer)'}"
            rows[0].append((title, overlay(image, look.attention.of(), look.box) if look.attention else plain))
    width = max(len(row) for row in rows)
    height = 2.6 * image.height / image.width + (0.4 if by_token else 0.9)
    figure = Figure(figsize=(2.6 * width, height * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for cells, places in zip(rows, axes, strict=True):
        for (title, picture), axis in zip(cells, places, strict=False):
            axis.imshow(picture)
            lines = [textwrap.shorten(_printable(line), 90, placeholder=" …") for line in title.splitlines()]
            axis.set_title("\n".join(textwrap.fill(line, 34) for line in lines), fontsize=9, parse_math=False)
    figure.suptitle(textwrap.fill(_printable(question), 30 * width), fontsize=10, parse_math=False)
    return figure


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def parse_layers(text: str) -> slice:
    """``"8:16"`` -> ``slice(8, 16)``; either side may be empty.

    Raises:
        argparse.ArgumentTypeError: the text is not a range.
    """
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return slice(int(first) if first else None, int(last) if last else None)
    except ValueError:
        raise argparse.ArgumentTypeError(f"layers are a range such as 8:16, not {text!r}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(description="Draw attention maps of one or more models on one image.")
    parser.add_argument("--model_path", nargs="+", required=True, help="checkpoints: folders or hub names")
    parser.add_argument(
        "--names", nargs="+", help="names of the models in the figure; default: the last part of each path"
    )
    parser.add_argument("--image", help="image file")
    parser.add_argument("--question")
    parser.add_argument("--output", help="figure to write: .png, .pdf or .svg")
    parser.add_argument(
        "--data", help="compare on many images: a JSON list, or JSON lines, of {image, question or text}"
    )
    parser.add_argument("--image_folder", default=".", help="folder of the images in --data (default: here)")
    parser.add_argument("--by_token", action="store_true", help="one map per token of the answer")
    parser.add_argument("--layers", type=parse_layers, help="decoder layers to average, such as 8:16; default: all")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument(*TEMPLATE_FLAGS, help="conversation template; default: the checkpoint's")
    parser.add_argument("--device", help="default: a GPU if there is one")
    return parser


def run(args: argparse.Namespace) -> None:
    """Load the models one after another, so that only one is in memory, and write the figure or the comparison."""
    from tinyllava_switchkd.model.chat import open_image
    from tinyllava_switchkd.model.checkpoint import load_pretrained_model
    from tinyllava_switchkd.model.export.questions import read_questions

    names = args.names or [checkpoint_name(path) for path in args.model_path]
    if len(names) != len(args.model_path):
        raise ValueError(f"--names has {len(names)} names for {len(args.model_path)} models.")
    if args.data:
        if len(names) < 2:
            raise ValueError("--data compares models with the first one, but --model_path names only one.")
        rows = [(str(asked.image), asked.text) for asked in read_questions(args.data, args.image_folder)]
    elif not (args.image and args.question and args.output):
        raise ValueError("give --image, --question and --output for a figure, or --data for a comparison.")
    else:
        rows = [(args.image, args.question)]
    for image, _ in rows:
        open_image(image)  # reports a bad image before weights are read
    looks: list[list[Look]] = []
    for path, name in zip(args.model_path, names, strict=True):
        model, tokenizer, processor, _ = load_pretrained_model(path, device=args.device)
        looks.append(
            [
                look(
                    model,
                    tokenizer,
                    processor,
                    open_image(image),
                    question,
                    name=name,
                    template=args.template,
                    max_new_tokens=args.max_new_tokens,
                    layers=args.layers,
                )
                for image, question in rows
            ]
        )
        if not args.data:
            print(f"{name}: {looks[-1][0].answer}")
    if args.data:
        print(f"Correlation with the map of {names[0]}, mean and 95 % interval over images:")
        print("\n".join(likeness_lines(names[1:], likeness(looks))))
    if args.output:
        output = Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(open_image(rows[0][0]), rows[0][1], [row[0] for row in looks], by_token=args.by_token)
        figure.savefig(output, dpi=160, bbox_inches="tight")
        print(f"Wrote {output}.")


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
