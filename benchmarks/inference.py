"""Time to first token and tokens per second of teacher and student: the benefit of distillation at inference.

    python -m benchmarks.inference [--size small|qwen2.5-0.5b-from-3b|qwen2.5-1.5b-from-7b] [--new_tokens 64]

Models are built from their configurations with random weights and answer one question about one image, greedily, with a
fixed length. All models and ways of generating run in turn in one process, so that ratios are valid; medians of
repeats are reported. The first token includes the vision tower and the whole prompt.

    eager       transformers' growing cache
    static      a cache of fixed size, not compiled
    compiled    the same with a compiled decoding step (`load_pretrained_model(..., compile=True)`)
    graphs      the same, recorded as CUDA graphs (CUDA only)
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks._table import machine, write_section
from benchmarks.step import SIZES, Shape, make_batch, model
from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.model.compiled import compile_generation

WAYS = {"eager": None, "static": None, "compiled": "default", "graphs": "reduce-overhead"}
"""Way of generating -> torch.compile's mode, if it compiles."""


class Clock(StoppingCriteria):
    """Records the time of each token; never stops the generation."""

    def __init__(self) -> None:
        self.times = [now()]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now() -> float:
    """Seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def answer(vlm: nn.Module, batch: dict[str, Tensor], new_tokens: int, **kwargs: Any) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it."""
    clock = Clock()
    vlm.generate(
        batch["input_ids"],
        images=batch["images"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **kwargs,
    )
    start, first, *_, last = clock.times
    return first - start, (new_tokens - 1) / (last - first)


def arguments(way: str, vlm: nn.Module, length: int) -> dict[str, Any]:
    """Arguments of `generate` for a way of generating; also compiles the model if the way does."""
    mode = WAYS[way]
    if way == "eager":
        return {"cache_implementation": "dynamic"}
    if mode is None:
        return {"cache_implementation": "static", "disable_compile": True}
    compile_generation(vlm, max_length=length, mode=mode)
    return {}


def measure(args: argparse.Namespace, ways: list[str]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(model, way) -> seconds to the first token, tokens per second, seconds of the very first answer."""
    student, teacher, vision, _ = SIZES[args.size]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    models = {
        "teacher": model(teacher, vision, 1, args.device, dtype).eval(),
        "student": model(student, vision, 0, args.device, dtype).eval(),
    }
    batch = make_batch(Shape(args.size, args.device, 1, args.text))
    length = args.text + models["student"].num_image_tokens + args.new_tokens
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    warm_up: dict[tuple[str, str], float] = {}
    # A model is recompiled whenever torch.compile's mode changes, so "graphs" runs separately after the others.
    for group in ([way for way in ways if way != "graphs"], [way for way in ways if way == "graphs"]):
        for repeat in range(args.repeats + 1):
            for way, (name, vlm) in itertools.product(group, models.items()):
                start = now()
                timed = answer(vlm, batch, args.new_tokens, **arguments(way, vlm, length))
                if repeat:
                    found.setdefault((name, way), []).append(timed)
                else:
                    warm_up[name, way] = now() - start
    return {
        key: (statistics.median(t for t, _ in values), statistics.median(r for _, r in values), warm_up[key])
        for key, values in found.items()
    }


def table(found: dict[tuple[str, str], tuple[float, float, float]], ways: list[str]) -> tuple[list[str], list[list]]:
    """Absolute figures, and ratios to the teacher with the same way and to the same model with eager."""
    header = ["generation", "model", "first token, ms", "tokens/s", "x teacher, first", "x teacher, tokens/s"]
    header += ["x eager, tokens/s", "first answer, s"]
    rows = []
    for way in ways:
        for name in ("teacher", "student"):
            first, rate, warm_up = found[name, way]
            teacher_first, teacher_rate, _ = found["teacher", way]
            rows.append(
                [
                    way,
                    name,
                    f"{1e3 * first:.3g}",
                    f"{rate:.3g}",
                    f"{teacher_first / first:.2f}",
                    f"{rate / teacher_rate:.2f}",
                    f"{rate / found[name, ways[0]][1]:.2f}",
                    f"{warm_up:.3g}",
                ]
            )
    return header, rows


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=int, default=64, help="text tokens of the prompt; the image counts as one")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5, help="answers after the first; medians are printed")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, help="ways of generating, in addition to eager (default: all)"
    )
    args = parser.parse_args()
    chosen = args.ways or [way for way in WAYS if args.device == "cuda" or way != "graphs"]
    ways = ["eager", *(way for way in chosen if way != "eager")]
    header, rows = table(measure(args, ways), ways)
    vision = SIZES[args.size][2]
    visual = (vision["image_size"] // vision["patch_size"]) ** 2 - 1
    write_section(
        f"inference-{args.size}-{args.device}",
        f"Answering a question about an image, {args.size} ({args.device})",
        [(header, rows)],
        machine(),
        note=(
            f"One request at a time: {args.text - 1} tokens of text and {visual} of an image, {args.new_tokens} new "
            f"ones, {'bfloat16' if args.device == 'cuda' else 'float32'}. Ratios above 1 are faster."
        ),
    )


if __name__ == "__main__":
    main()
