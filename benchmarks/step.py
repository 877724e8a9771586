"""One optimiser step, side by side: what Switch-KD costs beside SFT and beside the bare passes it needs.

    python -m benchmarks.step [--size small|qwen2.5-0.5b-from-3b|qwen2.5-1.5b-from-7b] [--batch_size 2]

Models are built from their configurations with random weights. The variants run in turn in one process (medians of
repeats after a warm-up); peak memory is the allocator's (CUDA) or what a process of its own grows by (CPU).

    SFT                     cross-entropy alone
    align only              teacher pass, no switch
    align + switch, dense   whole models, [batch, tokens, vocabulary] logits of all three pathways, then the loss
    align + switch          ours: supervised tokens only, in chunks
    + checkpointing         the same with activation checkpointing in student and switch pass
    + packing               the same with samples end to end instead of padded (`--lengths mixed` gives it padding)
    + compile               ours with every layer compiled by torch (the compiler's time is left out; on a CPU its
                            memory is in the peak)
    heads, trivial loss     ours with a sum of logits for a loss: what passes and heads cost
    passes, no heads        the three passes with a sum of hidden states for a loss
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import CONFIG_MAPPING

from benchmarks._memory import peak_resident, resident
from benchmarks._table import machine, write_section
from tinyllava_switchkd.cli import CommandParser
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.distill import Distiller, build_distiller, register_loss
from tinyllava_switchkd.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration
from tinyllava_switchkd.train.compiling import compile_layers
from tinyllava_switchkd.train.estimate import estimate
from tinyllava_switchkd.train.task import SupervisedTask


@dataclass(frozen=True)
class Language:
    """Shape of a Qwen2 language model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool


@dataclass(frozen=True)
class Vision:
    """Shape of a SigLIP tower."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    image_size: int
    patch_size: int


SO400M = Vision(1152, 27, 16, 4304, 384, 14)
QWEN2_5 = {
    "0.5b": Language(896, 24, 14, 2, 4864, 151_936, True),
    "1.5b": Language(1536, 28, 12, 2, 8960, 151_936, True),
    "3b": Language(2048, 36, 16, 2, 11_008, 151_936, True),
    "7b": Language(3584, 28, 28, 4, 18_944, 152_064, False),
}
SIZES = {
    "small": (
        Language(128, 4, 4, 2, 384, 151_936, True),
        Language(256, 6, 4, 2, 768, 151_936, True),
        Vision(128, 6, 4, 384, 112, 14),
        192,
    ),
    "qwen2.5-0.5b-from-3b": (QWEN2_5["0.5b"], QWEN2_5["3b"], SO400M, 1280),
    "qwen2.5-1.5b-from-7b": (QWEN2_5["1.5b"], QWEN2_5["7b"], SO400M, 1280),
}
"""Student, teacher, vision tower, and text tokens of a sample (with the 728 visual ones about 2,000 at real size)."""


TRIVIAL = "benchmark_trivial"


class TrivialLoss(nn.Module):
    """A loss that reads every logit and computes nothing."""

    def __init__(self, temperature: float = 3.0) -> None:
        super().__init__()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return student_logits.sum(-1)


class BarePasses(nn.Module):
    """The three passes of a distiller up to the hidden states, with their sum for a loss."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        student, _, switch, _ = self.distiller._views(batch)
        return {"loss": student.hidden.float().sum() + switch.float().sum()}


class Dense(nn.Module):
    """The objective the way a first version writes it: whole models, all logits."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        student, teacher, loss = self.distiller.student, self.distiller.teacher, self.distiller.loss
        text = {key: value for key, value in batch.items() if key != "images"}
        features = student.vision_features(batch["images"])
        out = student(**text, image_features=student.connector(features))
        with torch.no_grad():
            from_teacher = teacher(**{**batch, "labels": None}).logits
        switched = teacher(
            **{**text, "labels": None}, image_features=teacher.connector(features.to(teacher.dtype))
        ).logits
        where = out.labels[:, 1:] != IGNORE_INDEX
        vocab = self.distiller.vocab_size
        z_s, z_t, z_w = (z[:, :-1][where][:, :vocab] for z in (out.logits, from_teacher, switched))
        return {"loss": out.loss + loss(z_s, z_t).mean() + loss(z_w, z_t).mean()}


def model(language: Language, vision: Vision, seed: int, device: str, dtype: torch.dtype) -> nn.Module:
    config = TinyLlavaConfig(
        llm_model_name_or_path="qwen2",
        vision_model_name_or_path="siglip",
        connector_type="mlp2x_gelu",
        text_config=CONFIG_MAPPING["qwen2"](
            vocab_size=language.vocab,
            hidden_size=language.hidden,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.kv_heads,
            intermediate_size=language.intermediate,
            tie_word_embeddings=language.tied,
            max_position_embeddings=4096,
        ),
        vision_config=CONFIG_MAPPING["siglip_vision_model"](
            hidden_size=vision.hidden,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            intermediate_size=vision.intermediate,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        ),
        tokenizer_model_max_length=4096,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return TinyLlavaForConditionalGeneration(config).to(dtype)


def make_batch(samples: int, text: int, vision: Vision, vocab: int, device: str, mixed: bool) -> dict[str, Tensor]:
    """One image a sample, half of the text supervised (LLaVA-Mix-665K's share is of that order).

    With `mixed` the samples' texts are evenly spread between a quarter of `text` and all of it.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (samples, text), generator=generator)
    ids[:, 0] = IMAGE_TOKEN_INDEX
    shortest = text // 4 if mixed else text
    lengths = torch.linspace(text, shortest, samples).long()[:, None]
    is_token = torch.arange(text) < lengths
    labels = ids.masked_fill(~is_token | (torch.arange(text) < lengths // 2), IGNORE_INDEX)
    pixels = torch.randn(samples, 3, vision.image_size, vision.image_size, generator=generator)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": is_token.long(), "images": pixels}
    return {key: value.to(device) for key, value in batch.items()}


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


class Bench:
    """The models, their optimiser and a batch; a variant is a task over them."""

    def __init__(self, args: argparse.Namespace) -> None:
        student, teacher, vision, text = SIZES[args.size]
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.device = args.device
        self.compiled = False
        register_loss(TRIVIAL, override=True)(TrivialLoss)
        self.student = model(student, vision, 0, args.device, dtype).train()
        self.student.freeze_unused_parameters()
        self.teacher = model(teacher, vision, 1, args.device, dtype)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=args.device == "cuda")
        mixed = args.lengths == "mixed"
        self.batch = make_batch(args.batch_size, args.text or text, vision, student.vocab, args.device, mixed)

    def task(self, variant: str) -> nn.Module:
        if variant == "SFT":
            return SupervisedTask(self.student)
        loss = TRIVIAL if variant == "heads, trivial loss" else "dbild"
        distiller = build_distiller(
            self.student,
            self.teacher,
            loss=loss,
            switch_weight=0.0 if variant == "align only" else 1.0,
            packing=variant == "+ packing",
        )
        if variant == "align + switch, dense":
            return Dense(distiller)
        return BarePasses(distiller) if variant == "passes, no heads" else distiller

    def step(self, variant: str) -> None:
        # Layers are compiled in place, and once; the other variants run the same layers as if they were not.
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
        with CountFlops() as counter:  # which does not see into what is compiled
            self.step("align + switch" if variant == "+ compile" else variant)
        return counter.total

    def peak(self, variant: str) -> float:
        """Peak bytes on CUDA, weights and optimiser included."""
        torch.cuda.reset_peak_memory_stats()
        self.step(variant)
        return torch.cuda.max_memory_allocated()


class CountFlops(TorchDispatchMode):
    """Floating-point operations of matrix products and attention, by torch's own formulas.

    torch's FlopCounterMode also tracks modules, by hooks that do not bear a gradient taken inside a forward pass.
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
    """FLOP/s of a large matrix product in the precision of the step."""
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


def _peak_of_process(variant: str, args: argparse.Namespace) -> float:
    before = resident()
    bench = Bench(args)
    bench.step(variant)  # the optimiser makes its state
    return peak_resident(lambda: bench.step(variant))[0] - before


def peak_memory(bench: Bench, variant: str, args: argparse.Namespace) -> float:
    if args.device == "cuda":
        return bench.peak(variant)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of_process, (variant, args))


def predicted(variant: str, args: argparse.Namespace) -> str:
    """What `--estimate` says of a variant, in GiB; empty for those that are not ways to train.

    It speaks of samples at their longest, so nothing is said of mixed lengths.
    """
    ways = ("SFT", "align only", "align + switch", "+ checkpointing", "+ compile")
    if variant not in ways or args.lengths == "mixed":
        return ""
    student, teacher, vision, text = SIZES[args.size]
    learner = model(student, vision, 0, "meta", torch.float32).train()
    learner.freeze_unused_parameters()
    guide = None if variant == "SFT" else model(teacher, vision, 1, "meta", torch.float32).requires_grad_(False)
    result = estimate(
        learner,
        guide,
        batch_size=args.batch_size,
        text_tokens=(args.text or text) - 1,
        supervised_tokens=(args.text or text) // 2,
        master_weights=False,
        mixed_precision=args.device == "cuda",
        checkpointing=variant == "+ checkpointing",
        switch=variant != "align only",
    )
    # The models of all variants are loaded, whichever of them runs.
    unused = 0 if guide else sum(p.numel() for p in model(teacher, vision, 1, "meta", torch.float32).parameters())
    return f"{(result.peak + unused * (2 if args.device == 'cuda' else 4)) / 2**30:.2f}"


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--text", type=int, default=None, help="text tokens of a sample; default by size")
    parser.add_argument(
        "--lengths", choices=("equal", "mixed"), default="equal", help="of the texts; mixed ones leave padding"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    args = parser.parse_args()

    bench = Bench(args)
    rate = matrix_rate(args.device)
    seconds: dict[str, list[float]] = {variant: [] for variant in args.variants}
    for repeat in range(args.repeats + 1):
        for variant in args.variants:
            start = time.perf_counter()
            bench.step(variant)
            if repeat:
                seconds[variant].append(time.perf_counter() - start)
    tokens = int(bench.batch["attention_mask"].sum()) + args.batch_size * (bench.student.num_image_tokens - 1)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
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
                f"{peak_memory(bench, variant, args) / 2**30:.2f}",
                predicted(variant, args),
                f"{100 * achieved / rate:.0f} %",
            ]
        )
    note = f"{args.size}, {args.batch_size} samples of {args.lengths} lengths, {tokens:,} tokens a step"
    if {"align + switch", "heads, trivial loss"} <= medians.keys():
        share = 1 - medians["heads, trivial loss"] / medians["align + switch"]
        note += f"; the loss, heads excluded, takes {100 * share:.1f} % of the align + switch step"
    header = ["step", "seconds", "x SFT", "x passes", "tokens/s", "peak GiB", "estimated", "of matrix rate"]
    write_section(
        f"step-{args.size}-{args.device}" + ("-mixed" if args.lengths == "mixed" else ""),
        f"One optimiser step, {args.size}, {args.lengths} lengths ({args.device})",
        [(header, rows)],
        machine(),
        note=note + ".",
    )


if __name__ == "__main__":
    main()
