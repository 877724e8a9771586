"""Cost of one optimiser step: Switch-KD compared with SFT and with the bare passes that it needs.

    python -m benchmarks.step [--size tiny|small|qwen2.5-0.5b-from-3b|qwen2.5-1.5b-from-7b] [--batch_size 2]
    python -m benchmarks.step --teacher_cache [--vocab 4096]     savings of a filled teacher cache
    python -m benchmarks.step --growth [--vocab 4096]            growth with visual and supervised tokens

Models are built from their configurations with random weights. The variants run in turn in one process (medians of
repeats after a warm-up). Time is processor time on one thread of a CPU, else wall-clock time. Peak memory is that of
torch's allocator, including weights and optimiser; the prediction of ``--estimate`` is shown for comparison. On a CPU
the growth of a separate process is shown, too, which includes code and unused pages.

    SFT                     only cross-entropy
    align only              teacher pass, no switch
    align + switch, dense   whole models, [batch, tokens, vocabulary] logits of all three pathways, then the loss
    align + switch          ours: supervised tokens only, in chunks
    + checkpointing         the same with activation checkpointing in the student and switch passes
    + packing               the same with packed samples instead of padding (`--lengths mixed` gives it padding to save)
    + compile               ours with every layer compiled by torch (without compile time; on a CPU the compiler's
                            memory is in the peak)
    heads, trivial loss     ours with the sum of logits as loss: the cost of passes and heads
    passes, no heads        the three passes with the sum of hidden states as loss
    ..., cached             with a teacher cache that contains the batch: without the teacher's own pass
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks._memory import allocated, peak_resident, resident
from benchmarks._table import Table, machine, write_section
from benchmarks.loss import slope
from tinyllava_switchkd.ablations.dry import CONFIGS, Config, qwen2, siglip
from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.distill import Distiller, TeacherCache, build_distiller, register_loss
from tinyllava_switchkd.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration
from tinyllava_switchkd.train.compiling import compile_layers
from tinyllava_switchkd.train.preflight.estimate import estimate
from tinyllava_switchkd.train.task import SupervisedTask

SO400M = CONFIGS["google/siglip-so400m-patch14-384"]
SIZES = {
    "tiny": (qwen2(16, 1, 2, 1, 32, 512, True), qwen2(32, 2, 2, 1, 64, 512, True), siglip(16, 2, 2, 32, 28, 14), 16),
    "small": (
        qwen2(128, 4, 4, 2, 384, 151_936, True),
        qwen2(256, 6, 4, 2, 768, 151_936, True),
        siglip(128, 6, 4, 384, 112, 14),
        192,
    ),
    "qwen2.5-0.5b-from-3b": (CONFIGS["Qwen/Qwen2.5-0.5B"], CONFIGS["Qwen/Qwen2.5-3B"], SO400M, 1280),
    "qwen2.5-1.5b-from-7b": (CONFIGS["Qwen/Qwen2.5-1.5B"], CONFIGS["Qwen/Qwen2.5-7B"], SO400M, 1280),
}
"""Student, teacher, vision tower, and text tokens of a sample (with the 728 visual ones about 2,000 at real size)."""

GROWN = {"images": (1, 2, 4, 8), "supervised tokens": (64, 128, 256, 512, 1024)}
"""The values that `--growth` measures."""

PROMPT, ANSWER = 32, 128
"""Tokens of the question, and of the answer while the number of images grows."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a measurement; picklable, for the processes in which memory is measured.

    Attributes:
        size: a key of `SIZES`.
        device: cpu or cuda.
        samples: samples in the batch.
        text: text tokens per sample, an image counting as one; None for the size's.
        vocab: vocabulary of both models; None for the size's.
        mixed: whether the texts have different lengths.
        images: images per sample.
        supervised: supervised tokens per sample; None for half of the text.
    """

    size: str
    device: str
    samples: int = 2
    text: int | None = None
    vocab: int | None = None
    mixed: bool = False
    images: int = 1
    supervised: int | None = None

    @property
    def parts(self) -> tuple[Config, Config, Config, int]:
        """Student, teacher, vision tower, text tokens."""
        student, teacher, vision, text = SIZES[self.size]
        if self.vocab is not None:
            student, teacher = ({**llm, "vocab_size": self.vocab} for llm in (student, teacher))
        return student, teacher, vision, self.text or text


TRIVIAL = "benchmark_trivial"


class TrivialLoss(nn.Module):
    """A loss that only sums the student's logits."""

    def __init__(self, temperature: float = 3.0) -> None:
        super().__init__()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return student_logits.sum(-1)


class BarePasses(nn.Module):
    """The three passes of a distiller up to the hidden states, with their sum as loss."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        student, _, switch, _ = self.distiller._views(batch)
        return {"loss": student.hidden.float().sum() + switch.float().sum()}


class Dense(nn.Module):
    """The straightforward form of the objective: whole models, all logits."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        student, teacher, loss = self.distiller.student, self.distiller.teacher, self.distiller.loss
        text = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
        features = student.vision_features(batch["images"])
        out = student(**text, image_features=student.connector(features))
        with torch.no_grad():
            from_teacher = teacher(**{**text, "labels": None}, images=batch["images"]).logits
        switched = teacher(
            **{**text, "labels": None}, image_features=teacher.connector(features.to(teacher.dtype))
        ).logits
        where = out.labels[:, 1:] != IGNORE_INDEX
        vocab = self.distiller.vocab_size
        z_s, z_t, z_w = (z[:, :-1][where][:, :vocab] for z in (out.logits, from_teacher, switched))
        return {"loss": out.loss + loss(z_s, z_t).mean() + loss(z_w, z_t).mean()}


def model(llm: Config, vision: Config, seed: int, device: str, dtype: torch.dtype) -> nn.Module:
    config = TinyLlavaConfig(
        llm_model_name_or_path="qwen2",
        vision_model_name_or_path="siglip",
        connector_type="mlp2x_gelu",
        text_config={**llm, "max_position_embeddings": 4096},
        vision_config=vision,
        tokenizer_model_max_length=4096,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return TinyLlavaForConditionalGeneration(config).to(dtype)


def make_batch(shape: Shape) -> dict[str, Tensor]:
    """A batch with images first, and by default half of the text supervised (about the share in LLaVA-Mix-665K).

    If `mixed`, the lengths of the texts are evenly spread between a quarter of the longest and the longest.
    """
    student, _, vision, text = shape.parts
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, student["vocab_size"], (shape.samples, text), generator=generator)
    ids[:, : shape.images] = IMAGE_TOKEN_INDEX
    shortest = text // 4 if shape.mixed else text
    lengths = torch.linspace(text, shortest, shape.samples).long()[:, None]
    is_token = torch.arange(text) < lengths
    prompt = lengths // 2 if shape.supervised is None else lengths - shape.supervised
    labels = ids.masked_fill(~is_token | (torch.arange(text) < prompt), IGNORE_INDEX)
    side = vision["image_size"]
    pixels = torch.randn(shape.samples * shape.images, 3, side, side, generator=generator)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": is_token.long(), "images": pixels}
    return {key: value.to(shape.device) for key, value in batch.items()}


VARIANTS = (
    "SFT",
    "align only",
    "align + switch, dense",
    "align + switch",
    "+ checkpointing",
    "+ packing",
    "+ compile",
    "heads, trivial loss",
    "passes, no heads",
)


CACHED = ("align only", "align only, cached", "align + switch", "align + switch, cached")
"""What `--teacher_cache` compares."""


class Bench:
    """The models, their optimiser and a batch; each variant is a task with them."""

    def __init__(self, shape: Shape) -> None:
        student, teacher, vision, _ = shape.parts
        self.device = shape.device
        self.dtype = torch.bfloat16 if shape.device == "cuda" else torch.float32
        self.compiled = False
        register_loss(TRIVIAL, override=True)(TrivialLoss)
        self.student = model(student, vision, 0, shape.device, self.dtype).train()
        self.student.freeze_unused_parameters()
        self.teacher = model(teacher, vision, 1, shape.device, self.dtype)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=shape.device == "cuda")
        self.batch = make_batch(shape)
        self._tasks: dict[str, nn.Module] = {}
        self._folder = tempfile.TemporaryDirectory()

    def task(self, variant: str) -> nn.Module:
        if variant not in self._tasks:
            self._tasks[variant] = self._make_task(variant)
        return self._tasks[variant]

    def _make_task(self, variant: str) -> nn.Module:
        if variant == "SFT":
            return SupervisedTask(self.student)
        distiller = build_distiller(
            self.student,
            self.teacher,
            loss=TRIVIAL if variant == "heads, trivial loss" else "dbild",
            switch_weight=0.0 if variant.startswith("align only") else 1.0,
            packing=variant == "+ packing",
        )
        if variant == "align + switch, dense":
            return Dense(distiller)
        if variant.endswith(", cached"):
            distiller.teacher_cache = TeacherCache(self._folder.name, variant, self.dtype)
            self.batch["digests"] = [f"{number:032x}" for number in range(len(self.batch["input_ids"]))]
            with torch.no_grad():
                distiller(self.batch)
            distiller.teacher_cache.sync()
        return BarePasses(distiller) if variant == "passes, no heads" else distiller

    def step(self, variant: str) -> None:
        # Layers are compiled once, in place; the other variants run the same layers without compilation.
        compiled = variant == "+ compile"
        if compiled and not self.compiled:
            compile_layers(self.task(variant))
            self.compiled = True
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            self._step(variant)

    def _step(self, variant: str) -> None:
        task = self.task(variant)
        checkpointing = variant == "+ checkpointing"
        if checkpointing:
            task.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer.zero_grad(set_to_none=True)
        task(self.batch)["loss"].backward()
        self.optimizer.step()
        if checkpointing:
            task.gradient_checkpointing_disable()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def flops(self, variant: str) -> int:
        with CountFlops() as counter:  # cannot look into compiled code
            self.step("align + switch" if variant == "+ compile" else variant)
        return counter.total

    def peak(self, variant: str) -> float:
        """Peak bytes of torch's allocator, including weights and optimiser."""
        if self.device == "cpu":
            self.step(variant)  # so that the optimiser's state exists
            self.optimizer.zero_grad(set_to_none=True)
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            kept = [*self.student.parameters(), *self.teacher.parameters(), *states]
            return allocated(lambda: self.step(variant)) + sum(tensor.nbytes for tensor in kept)
        torch.cuda.reset_peak_memory_stats()
        self.step(variant)
        return torch.cuda.max_memory_allocated()


class CountFlops(TorchDispatchMode):
    """Floating-point operations of matrix products and attention, by torch's formulas.

    torch's FlopCounterMode also tracks modules, with hooks that fail when a gradient is taken inside a forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def matrix_rate(device: str) -> float:
    """FLOP/s of a large matrix product in the step's precision."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)

    def once() -> float:
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return 2 * size**3 / statistics.median(once() for _ in range(7))


def clock(device: str) -> float:
    """Seconds: processor time on one thread of a CPU, else wall-clock time."""
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(bench: Bench, variants: Sequence[str], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; the variants run in turn."""
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for repeat in range(repeats + 1):
        for variant in variants:
            bench.task(variant)
            start = clock(bench.device)
            bench.step(variant)
            if repeat:  # the first round warms up
                found[variant].append(clock(bench.device) - start)
    return {variant: statistics.median(values) for variant, values in found.items()}


def _peak_of_process(variant: str, shape: Shape) -> float:
    torch.set_num_threads(1)
    before = resident()
    bench = Bench(shape)
    bench.step(variant)  # so that the optimiser's state exists
    return peak_resident(lambda: bench.step(variant))[0] - before


def resident_growth(variant: str, shape: Shape) -> float:
    """Largest growth of a separate process in bytes: torch's allocations and everything else."""
    context = multiprocessing.get_context("forkserver")  # imports everything once and computes nothing
    context.set_forkserver_preload(["tinyllava_switchkd.distill", "tinyllava_switchkd.train.preflight.estimate"])
    with context.Pool(1) as pool:
        return pool.apply(_peak_of_process, (variant, shape))


ESTIMATED = ("SFT", "align only", "align + switch", "+ checkpointing", "+ compile")
"""The variants that are ways of training."""


def predicted(variant: str, shape: Shape) -> float:
    """Peak bytes of a variant according to `--estimate`, with all samples at the largest length."""
    student, teacher, vision, text = shape.parts
    learner = model(student, vision, 0, "meta", torch.float32).train()
    learner.freeze_unused_parameters()
    guide = None if variant == "SFT" else model(teacher, vision, 1, "meta", torch.float32).requires_grad_(False)
    result = estimate(
        learner,
        guide,
        batch_size=shape.samples,
        text_tokens=text - 1,
        supervised_tokens=text // 2,
        master_weights=False,
        mixed_precision=shape.device == "cuda",
        checkpointing=variant == "+ checkpointing",
        switch=variant != "align only",
    )
    # `Bench` loads both models for every variant.
    unused = 0 if guide else sum(p.numel() for p in model(teacher, vision, 1, "meta", torch.float32).parameters())
    return result.peak + unused * (2 if shape.device == "cuda" else 4)


def compare(shape: Shape, variants: Sequence[str], repeats: int) -> tuple[Table, str]:
    """A table of the variants, and a sentence about it."""
    bench = Bench(shape)
    rate = matrix_rate(shape.device)
    tokens = int(bench.batch["attention_mask"].sum()) + shape.samples * (bench.student.num_image_tokens - 1)
    medians = seconds_of(bench, variants, repeats)
    rows = []
    for variant, median in medians.items():
        achieved = bench.flops(variant) / median
        rows.append(
            [
                variant,
                f"{median:.3g}",
                f"{median / medians.get('SFT', median):.2f}",
                f"{median / medians.get('passes, no heads', median):.2f}",
                f"{tokens / median:,.0f}",
                f"{bench.peak(variant) / 2**30:.2f}",
                f"{predicted(variant, shape) / 2**30:.2f}" if variant in ESTIMATED and not shape.mixed else "",
                f"{resident_growth(variant, shape) / 2**30:.2f}" if shape.device == "cpu" else "",
                f"{100 * achieved / rate:.0f} %",
            ]
        )
    lengths = "mixed" if shape.mixed else "equal"
    note = f"{shape.size}, {shape.samples} samples of {lengths} lengths, {tokens:,} tokens per step"
    if {"align + switch", "heads, trivial loss"} <= medians.keys():
        share = 1 - medians["heads, trivial loss"] / medians["align + switch"]
        note += f"; the loss without heads takes {100 * share:.1f} % of the align + switch step"
    header = [
        "step",
        "seconds",
        "x SFT",
        "x passes",
        "tokens/s",
        "peak GiB",
        "estimated",
        "resident GiB",
        "of matrix rate",
    ]
    return (header, rows), note + "."


def savings(shape: Shape, repeats: int) -> Table:
    """Savings of a teacher cache that contains the batch."""
    bench = Bench(shape)
    medians = seconds_of(bench, CACHED, repeats)
    flops = {variant: bench.flops(variant) for variant in CACHED}
    rows = []
    for variant in CACHED:
        plain = variant.removesuffix(", cached")
        saved = ["", ""]
        if variant != plain:
            saved = [
                f"{100 * (1 - medians[variant] / medians[plain]):.0f} %",
                f"{100 * (1 - flops[variant] / flops[plain]):.0f} %",
            ]
        rows.append([variant, f"{medians[variant]:.3g}", saved[0], f"{flops[variant] / 1e9:.1f}", saved[1]])
    return ["step", "seconds", "time saved", "GFLOP", "FLOPs saved"], rows


def growth(shape: Shape, repeats: int) -> list[Table]:
    """Time, memory and operations of an align + switch step with one sample at all points, and their log-log slopes."""
    points, slopes = [], []
    for what, values in GROWN.items():
        found = []
        for value in values:
            images, answer = (value, ANSWER) if what == "images" else (1, value)
            one = replace(shape, samples=1, text=images + PROMPT + answer, images=images, supervised=answer)
            bench = Bench(one)
            seconds = seconds_of(bench, ["align + switch"], repeats)["align + switch"]
            flops, peak = bench.flops("align + switch"), bench.peak("align + switch")
            visual = images * bench.student.num_image_tokens
            found.append((visual if what == "images" else answer, seconds, peak, flops))
            points.append([f"{visual:,}", f"{answer:,}", f"{seconds:.3g}", f"{peak / 2**30:.2f}", f"{flops / 1e9:.0f}"])
        counts, *measured = (list(column) for column in zip(*found, strict=True))
        name = "visual tokens" if what == "images" else what
        whole = [f"{slope(counts, ys):.2f}" for ys in measured]
        last = [f"{slope(counts[-2:], ys[-2:]):.2f}" for ys in measured]
        slopes.append([name, f"{counts[0]:,} to {counts[-1]:,}", *whole])
        slopes.append([name, f"{counts[-2]:,} to {counts[-1]:,}", *last])
    return [
        (["visual tokens", "supervised tokens", "seconds", "peak GiB", "GFLOP"], points),
        (["log-log slope with", "range", "of time", "of memory", "of FLOPs"], slopes),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--text", type=int, default=None, help="text tokens per sample; default: by size")
    parser.add_argument("--vocab", type=int, default=None, help="vocabulary of both models; default: by size")
    parser.add_argument(
        "--lengths", choices=("equal", "mixed"), default="equal", help="lengths of the texts; mixed ones leave padding"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *CACHED), default=VARIANTS)
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--teacher_cache", action="store_true", help="only the savings of a filled cache")
    way.add_argument("--growth", action="store_true", help="only the growth with visual and supervised tokens")
    args = parser.parse_args(argv)

    shape = Shape(args.size, args.device, args.batch_size, args.text, args.vocab, args.lengths == "mixed")
    student, _, _, text = shape.parts
    vocab = f"a vocabulary of {student['vocab_size']:,}"
    end = f"{args.size}-{args.device}" + (f"-{args.vocab}" if args.vocab else "")
    if args.teacher_cache:
        write_section(
            f"step-cache-{end}",
            f"What a filled teacher cache saves, {args.size}, {vocab} ({args.device})",
            [savings(shape, args.repeats)],
            machine(),
            note=f"{shape.samples} samples of one image and {text - 1} tokens of text, half of them supervised. The "
            "operations are those of matrix products and attention.",
        )
    elif args.growth:
        write_section(
            f"step-growth-{end}",
            f"How an align + switch step grows, {args.size}, {vocab} ({args.device})",
            growth(shape, args.repeats),
            machine(),
            note=f"One sample; {PROMPT} tokens of the question and {ANSWER} of the answer while the images grow, one "
            "image while the answer grows. Memory includes weights and optimiser. A slope of 1 is linear growth.",
        )
    else:
        table, note = compare(shape, args.variants, args.repeats)
        write_section(
            f"step-{end}" + ("-mixed" if shape.mixed else ""),
            f"One optimiser step, {args.size}, {args.lengths} lengths ({args.device})",
            [table],
            machine(),
            note=note,
        )


if __name__ == "__main__":
    main()
