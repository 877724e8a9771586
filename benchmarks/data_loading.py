"""Cost of data loading: opening a file of Mix-665k's size, memory of the workers, and samples per second and core.

    python -m benchmarks.data_loading [--samples 665000] [--workers 8] [--images 200]

Our reader is compared with v1's, which keeps the JSON as a list of dicts. Memory is the proportional set size of the
process and its forked workers together (every shared page counted once), after each worker has read its share of the
samples in random order; it is read from Linux's /proc. Everything is measured in one run, so that ratios are valid.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, SiglipImageProcessor

from benchmarks._table import ROOT, machine, write_section
from tinyllava_switchkd.data import ImagePreprocess, LengthGroupedSampler, Records, TextPreprocess

TEXT_ONLY_SHARE = 0.06  # of Mix-665k
IMAGE_TOKENS = 728
MIB = 1 << 20
_WORDS = ["".join(random.Random(index).choices("etaoinshrdlucmfw", k=1 + index % 9)) for index in range(2000)]


def conversation(rng: random.Random, image: bool) -> list[dict[str, str]]:
    """Questions and answers with about the lengths of those in Mix-665k."""
    turns = []
    for index in range(rng.choice([1, 1, 2, 4, 4, 6])):
        question = " ".join(rng.choices(_WORDS, k=rng.randint(6, 30)))
        mark = "<image>\n" if image and index == 0 else ""
        turns.append({"from": "human", "value": mark + question})
        turns.append({"from": "gpt", "value": " ".join(rng.choices(_WORDS, k=rng.randint(1, 60)))})
    return turns


def write_samples(path: Path, count: int) -> None:
    """Write a LLaVA JSON file of `count` random samples."""
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(count):
            image = rng.random() >= TEXT_ONLY_SHARE
            record: dict[str, Any] = {"id": f"{index:012d}", "conversations": conversation(rng, image)}
            if image:
                record["image"] = f"coco/train2017/{index:012d}.jpg"
            file.write((", " if index else "[") + json.dumps(record))
        file.write("]")


def memory(pid: int | str = "self") -> int:
    """Proportional set size of a process in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1])


def _read_share(data: Sequence[Any], share: int, workers: int, conn: Connection) -> None:
    for index in random.Random(0).sample(range(len(data)), len(data))[share::workers]:
        sum(len(turn["value"]) for turn in data[index]["conversations"])
    conn.send(None)
    conn.recv()  # stay alive until all have been measured


def _open_and_fork(load: Callable[[str], Sequence[Any]], path: str, workers: int, conn: Connection) -> None:
    before = memory()
    start = time.perf_counter()
    data = load(path)
    seconds = time.perf_counter() - start
    loaded = memory() - before
    fork = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for share in range(workers):
        ours, theirs = fork.Pipe()
        processes.append(fork.Process(target=_read_share, args=(data, share, workers, theirs)))
        processes[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    together = sum(memory(process.pid) for process in processes) + memory() - before
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    conn.send((seconds, loaded, together))


def _v1(path: str) -> list[dict[str, Any]]:
    with open(path) as file:
        return json.load(file)


def opening(path: Path, workers: int) -> list[list[object]]:
    """Rows: reader, seconds, MiB of the process, MiB with its workers. Each reader runs in a separate process."""
    spawn = multiprocessing.get_context("spawn")
    figures = {}
    path.read_bytes()  # so that both read from the page cache
    for name, load in (("list of dicts (TinyLLaVA)", _v1), ("ours", Records)):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_open_and_fork, args=(load, str(path), workers, theirs))
        process.start()
        figures[name] = ours.recv()
        process.join()
    return [
        [name, f"{seconds:.1f}", f"{loaded / MIB:,.0f}", f"{together / MIB:,.0f}"]
        for name, (seconds, loaded, together) in figures.items()
    ]


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG of COCO's image size that takes about as long to decode as a photograph."""
    coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-12, 13, pixels.shape, dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def milliseconds(function: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Median processor time of a call, after a warm-up."""
    function(items[0])
    times = []
    for item in items:
        start = time.process_time()
        function(item)
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def samples(count: int) -> list[list[object]]:
    """Rows: image backend, milliseconds of each part, samples per second on one core."""
    rng, words = np.random.default_rng(0), random.Random(0)
    images = [photograph(rng) for _ in range(count)]
    talks = [conversation(words, image=True) for _ in range(count)]
    processor = SiglipImageProcessor(size={"height": 384, "width": 384})
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests" / "fixtures" / "tokenizers" / "qwen2-tiny")
    text = TextPreprocess(tokenizer, "qwen2_base")
    rows = []
    for backend in ("pil", "torchvision"):
        preprocess = ImagePreprocess(processor, SimpleNamespace(image_backend=backend))
        decode = milliseconds(lambda data: Image.open(io.BytesIO(data)).convert("RGB"), images)
        resize = milliseconds(preprocess, [Image.open(io.BytesIO(data)).convert("RGB") for data in images])
        encode = milliseconds(lambda turns: text(turns, num_images=1), talks)
        total = decode + resize + encode
        rows.append([backend, *(f"{part:.2f}" for part in (decode, resize, encode, total)), f"{1000 / total:.0f}"])
    return rows


def padding(records: Records, batch: int = 4, ranks: int = 8, accumulation: int = 4) -> list[list[object]]:
    """Rows: order of the samples, and the share of padding in the computed tokens, per batch and per step of all ranks.

    A token is a word here; an image counts as 728 tokens.
    """
    lengths = records.words + IMAGE_TOKENS * records.num_images
    signed = np.where(records.num_images > 0, lengths, -lengths)
    settings = {"gradient_accumulation_steps": accumulation, "group_by_modality": True}
    orders = {
        "random": np.random.default_rng(0).permutation(len(lengths)),
        "by modality, TinyLLaVA's": list(LengthGroupedSampler(batch, ranks, signed, **settings, pool=1)),
        "by modality and length": list(LengthGroupedSampler(batch, ranks, signed, **settings)),
    }
    rows = []
    for name, order in orders.items():
        shares = []
        for size in (batch, batch * ranks):
            groups = lengths[np.asarray(order)[: len(order) // size * size]].reshape(-1, size)
            shares.append(f"{1 - groups.sum() / (groups.max(1) * size).sum():.1%}")
        rows.append([name, *shares])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=665_000, help="samples in the file (default 665,000)")
    parser.add_argument("--workers", type=int, default=8, help="forked workers (default 8)")
    parser.add_argument("--images", type=int, default=200, help="images to time (default 200)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.json"
        write_samples(path, args.samples)
        size = os.path.getsize(path) / MIB
        opened = opening(path, args.workers)
        padded = padding(Records(path))
    write_section(
        "data",
        "Data",
        [
            (["reader", "seconds to open", "MiB", f"MiB with {args.workers} workers"], opened),
            (
                ["image backend", "decode ms", "preprocess ms", "text ms", "sample ms", "samples/s per core"],
                samples(args.images),
            ),
            (["order", "padding in a batch", "padding in a step of all ranks"], padded),
        ],
        machine(),
        note=(
            f"A generated JSON of {args.samples:,} samples ({size:,.0f} MiB); memory is the proportional set size, "
            f"including the file's own mapped pages. JPEGs of 640 x 480 to 384 x 384 (SigLIP). Padding: batches of 4 "
            f"on 8 ranks, {IMAGE_TOKENS} tokens per image, one token per word."
        ),
    )


if __name__ == "__main__":
    main()
