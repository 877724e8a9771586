"""A student in onnxruntime and in torch on the CPU: time to first token, tokens per second, size.

    python -m benchmarks.export MODEL EXPORT [--new_tokens 32] [--repeats 9]

MODEL is the checkpoint, EXPORT its export by ``--to onnx``. Both answer one question about one image, greedily, with a
fixed length, on one thread, in turn, in one process. Times are processor times, so that other work on the machine does
not count; medians of repeats are reported. The first token includes the vision tower and the whole prompt.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks._table import machine, write_section
from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.data import ImagePreprocess, TextPreprocess
from tinyllava_switchkd.model import load_pretrained_model
from tinyllava_switchkd.model.export.onnx import size_of
from tinyllava_switchkd.model.export.onnx_student import OnnxStudent
from tinyllava_switchkd.model.export.questions import default_questions


def in_torch(folder: str) -> Callable[[], Iterator[Any]]:
    """An endless iterator of the checkpoint's greedy tokens."""
    model, tokenizer, processor, _ = load_pretrained_model(folder, device="cpu", dtype=torch.float32)
    question = default_questions()[0]
    messages = [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": None}]
    prompt = TextPreprocess(tokenizer, model.config.template)(messages, mode="eval")["input_ids"][None]
    pixels = ImagePreprocess(processor, model.config)(question.open())[None]

    def steps() -> Iterator[Any]:
        with torch.inference_mode():
            prepared = model.prepare_inputs(prompt, images=pixels)
            outputs = model.language_model(inputs_embeds=prepared.inputs_embeds, use_cache=True, logits_to_keep=1)
            while True:
                token = outputs.logits[:, -1].argmax(-1, keepdim=True)
                yield token
                outputs = model.language_model(token, past_key_values=outputs.past_key_values, use_cache=True)

    return steps


def in_onnxruntime(folder: str, dtype: str) -> Callable[[], Iterator[Any]]:
    """The same for an export."""
    student = OnnxStudent(folder, dtype, threads=1)
    question = default_questions()[0]
    ids, pixels = student.prompt_ids(question.text), student.pixels([question.open()])
    return lambda: student.steps([ids], pixels)


def clock(steps: Callable[[], Iterator[Any]], new_tokens: int) -> tuple[float, float]:
    """Processor seconds to the first token, and tokens per second after it."""
    times = [time.process_time()]
    for _ in itertools.islice(steps(), new_tokens):
        times.append(time.process_time())
    return times[1] - times[0], (new_tokens - 1) / (times[-1] - times[1])


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, prog="python -m benchmarks.export")
    parser.add_argument("model", metavar="MODEL", help="the checkpoint")
    parser.add_argument("export", metavar="EXPORT", help="its export by --to onnx")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dtypes = json.loads(Path(args.export, "config.json").read_text())["tinyllava"]["dtypes"]
    ways = {"torch": in_torch(args.model)} | {dtype: in_onnxruntime(args.export, dtype) for dtype in dtypes}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for repeat in range(args.repeats + 1):
        for way, steps in ways.items():
            timed = clock(steps, args.new_tokens)
            if repeat:  # the first round warms up
                found[way].append(timed)
    medians = {way: [statistics.median(column) for column in zip(*times, strict=True)] for way, times in found.items()}
    first, rate = medians["torch"]
    header = ["", "first token, ms", "tokens/s", "x torch, time to first", "x torch, tokens/s", "MB"]
    rows = [
        [
            "torch, fp32" if way == "torch" else f"onnxruntime, {way}",
            f"{1000 * its_first:.1f}",
            f"{its_rate:.0f}",
            f"{its_first / first:.2f}",
            f"{its_rate / rate:.2f}",
            "" if way == "torch" else f"{size_of(Path(args.export), way) / 1e6:.1f}",
        ]
        for way, (its_first, its_rate) in medians.items()
    ]
    name = json.loads(Path(args.model, "config.json").read_text())["llm_model_name_or_path"]
    write_section(
        "export",
        "A student in onnxruntime",
        [(header, rows)],
        machine(),
        note=(
            f"{name}, one question about one image, {args.new_tokens} new tokens, one thread, processor time, "
            f"alternating with torch. Faster than torch: a ratio of times below 1, a ratio of tokens/s above 1."
        ),
    )


if __name__ == "__main__":
    main()
