"""Time and peak memory per token of the distillation losses, forward and backward.

    python -m benchmarks.loss [--tokens 64] [--vocab 32000 151936] [--device cpu|cuda] [--repeats 7]

Our loss is compared with: pairs enumerated one by one at the true knee; pairs at a fixed k = 8 (BiLD); the knee among
the 256 largest logits (the one public attempt; another loss); full-vocabulary reverse KL; and on CUDA ours without the
Triton kernels, and Liger's chunked JSD if it is installed. All run in turn in one process, so that ratios are valid.
On the CPU, time is the process's own, and memory is the growth of a separate process; on CUDA they are wall-clock time
and the allocator's peak.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._memory import peak_resident
from benchmarks._table import machine, readme_cell, write_section
from tinyllava_switchkd.distill import LossFactory, knee
from tinyllava_switchkd.distill.losses.knee import Order, leading
from tinyllava_switchkd.distill.losses.pairs import logit_difference_kl

knee_module = importlib.import_module("tinyllava_switchkd.distill.losses.knee")
TEMPERATURE = 3.0
Loss = Callable[[Tensor, Tensor], Tensor]


def language_model_logits(tokens: int, vocab: int, device: str) -> tuple[Tensor, Tensor]:
    """Student and teacher logits with a bulk and a few hundred large values; the knee is in the thousands."""
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(tokens, vocab, generator=generator)
    hot = max(vocab // 500, 1)
    teacher[:, :hot] += 15 * torch.rand(tokens, hot, generator=generator)
    student = teacher + 0.5 * torch.randn(tokens, vocab, generator=generator)
    return student.to(device), teacher.to(device)


def enumerate_pairs(student: Tensor, teacher: Tensor, top_k: int | None) -> Tensor:
    """DBiLD with all pairs enumerated, one token at a time (k differs); the O(k) form replaces this."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for leader in (t, s.detach()):
            k = top_k or int(knee(leader[None]))
            indices = leader.topk(k).indices
            m, n = torch.triu_indices(k, k, offset=1, device=s.device)
            q = ((s[indices][m] - s[indices][n]) / TEMPERATURE).log_softmax(0)
            p = ((t[indices][m] - t[indices][n]) / TEMPERATURE).log_softmax(0)
            total = total + (q.exp() * (q - p)).sum()
        losses.append(total)
    return torch.stack(losses)


def enumerate_eight(student: Tensor, teacher: Tensor) -> Tensor:
    """BiLD as its authors compute it: 28 pairs per leader, all tokens at once."""
    total = 0.0
    m, n = torch.triu_indices(8, 8, offset=1, device=student.device)
    for leader in (teacher, student.detach()):
        indices = leader.topk(8).indices
        s, t = student.gather(1, indices), teacher.gather(1, indices)
        q = ((s[:, m] - s[:, n]) / TEMPERATURE).log_softmax(-1)
        p = ((t[:, m] - t[:, n]) / TEMPERATURE).log_softmax(-1)
        total = total + (q.exp() * (q - p)).sum(-1)
    return total


def truncated(student: Tensor, teacher: Tensor) -> Tensor:
    """DBiLD with the knee searched only among the 256 largest logits: cheap, but another loss."""
    orders = []
    for leader in (student.detach(), teacher):
        values, indices = leader.topk(256)
        k = knee(values)
        mask = torch.arange(256, device=student.device) < k[:, None]
        threshold = values.gather(1, k[:, None] - 1).squeeze(1)
        indices = indices.where(mask, indices[:, :1])
        orders.append(Order(indices, mask, k, threshold, leader.amin(-1), leader.amax(-1)))
    return logit_difference_kl(student, teacher, tuple(orders), TEMPERATURE)


def without_kernels(loss: Loss) -> Loss:
    """The same loss with the knee computed by torch's operations."""

    def run_with_torch(student: Tensor, teacher: Tensor) -> Tensor:
        chosen, knee_module.BACKEND = knee_module.BACKEND, "torch"
        try:
            return loss(student, teacher)
        finally:
            knee_module.BACKEND = chosen

    return run_with_torch


def implementations(vocab: int, device: str) -> dict[str, tuple[Loss, int]]:
    """Name -> (loss, largest number of tokens at once)."""
    ours, rkl = LossFactory("dbild")(temperature=TEMPERATURE), LossFactory("rkl")(temperature=TEMPERATURE)
    return {
        "full-vocabulary reverse KL": (rkl, 10**9),
        "DBiLD, ours (exact, O(k))": (ours, 10**9),
        **({"DBiLD, ours, without Triton": (without_kernels(ours), 10**9)} if device == "cuda" else {}),
        "DBiLD, pairs enumerated at the knee (exact)": (lambda s, t: enumerate_pairs(s, t, None), 2),
        "BiLD, pairs enumerated at k = 8": (enumerate_eight, 10**9),
        "knee of the top 256 (another loss)": (truncated, 10**9),
        **(liger() if device == "cuda" else {}),
    }


def liger() -> dict[str, tuple[Loss, int]]:
    """Liger's JSD on logits; only on CUDA, if installed."""
    try:
        from liger_kernel.transformers import LigerJSD
    except ImportError:
        return {}
    jsd = LigerJSD(beta=0.5)
    return {
        "Liger JSD (another loss)": (
            lambda s, t: jsd((s / TEMPERATURE).log_softmax(-1), (t / TEMPERATURE).log_softmax(-1)).expand(len(s)),
            10**9,
        )
    }


def run(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    leaf = student.detach().requires_grad_()
    loss(leaf, teacher).sum().backward()
    if student.is_cuda:
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds; on the CPU those of this process only, so that others on the machine do not count."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def timed(loss: Loss, student: Tensor, teacher: Tensor) -> float:
    start = clock(student.device.type)
    run(loss, student, teacher)
    return (clock(student.device.type) - start) / len(student)


def peak_memory(name: str, tokens: int, vocab: int, device: str) -> float:
    """Peak bytes per token, without the logits of the two sides."""
    if device == "cuda":
        loss, _ = implementations(vocab, device)[name]
        student, teacher = language_model_logits(tokens, vocab, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, student, teacher)
        return (torch.cuda.max_memory_allocated() - before) / tokens
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_grown, (name, tokens, vocab))


def _grown(name: str, tokens: int, vocab: int) -> float:
    torch.set_num_threads(1)
    loss, _ = implementations(vocab, "cpu")[name]
    student, teacher = language_model_logits(tokens, vocab, "cpu")
    run(LossFactory("rkl")(), student[:1, :64], teacher[:1, :64])
    peak, before = peak_resident(lambda: run(loss, student, teacher))
    return (peak - before) / tokens


def compare(tokens: int, vocab: int, device: str, repeats: int) -> list[list[str]]:
    table = implementations(vocab, device)
    student, teacher = language_model_logits(tokens, vocab, device)
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for repeat in range(repeats + 1):
        for name, (loss, most) in table.items():
            if most < 10 and repeat > 2:
                continue  # the enumeration takes seconds per token and varies little
            value = timed(loss, student[:most], teacher[:most])
            if repeat:  # the first round warms up
                seconds[name].append(value)
    base = statistics.median(seconds["full-vocabulary reverse KL"])
    rows = []
    for name, (_, most) in table.items():
        median = statistics.median(seconds[name])
        memory = peak_memory(name, min(tokens, most), vocab, device)
        rows.append([f"{vocab:,}", name, f"{median * 1e3:.3g}", f"{median / base:.2f}", f"{memory / 2**20:.3g}"])
    return rows


def real_like_logits(tokens: int, vocab: int, device: str) -> tuple[Tensor, Tensor]:
    """Logits with bulks of varying skewness: at 49,152 the knees spread like a language model's (1,600 to 4,700)."""
    generator = torch.Generator().manual_seed(0)

    def between(low: float, high: float) -> Tensor:
        return torch.empty(tokens, 1).uniform_(low, high, generator=generator)

    bulk = torch.randn(tokens, vocab, generator=generator)
    teacher = 2 * (bulk + (0.3 * between(0, 1).square() - 0.03) * (bulk.square() - 1))
    teacher[:, :200] += between(6, 16) * torch.rand(tokens, 200, generator=generator)
    student = teacher + 0.7 * torch.randn(tokens, vocab, generator=generator)
    return student.to(device), teacher.to(device)


def ratios(tokens: int, vocabularies: list[int], device: str, repeats: int) -> list[dict]:
    """Time of exact DBiLD relative to full-vocabulary reverse KL, run in turn: ratio of the shortest of many times.

    With one thread, CPU time is measured; with several threads wall-clock time, because waiting threads use the CPU.
    """
    ours, base = LossFactory("dbild")(temperature=TEMPERATURE), LossFactory("rkl")(temperature=TEMPERATURE)
    threads = torch.get_num_threads()
    now = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
    shapes = [(language_model_logits, "simulated", vocab) for vocab in vocabularies]
    rows = []
    for make, kind, vocab in [*shapes, (real_like_logits, "skewed", 49_152)]:
        student, teacher = make(tokens, vocab, device)
        found = []
        for _ in range(repeats + 1):
            times = []
            for loss in (base, ours):
                start = now()
                run(loss, student, teacher)
                times.append(now() - start)
            found.append(times)
        least = [min(column) for column in zip(*found[1:], strict=True)]  # the first round warms up
        rows.append(
            {
                "torch": torch.__version__.partition("+")[0],
                "threads": threads,
                "tokens": tokens,
                "repeats": repeats,
                "logits": kind,
                "vocabulary": vocab,
                "mean knee": round(float(knee(teacher).double().mean())),
                "ratio": round(least[1] / least[0], 2),
            }
        )
        print(rows[-1], flush=True)
    return rows


def write_ratios(rows: list[dict]) -> None:
    """Write the section of docs/benchmarks.md and the rows of README.md from the `ratios` of all environments."""
    environments = sorted({(row["threads"], row["torch"]) for row in rows})
    lines = []
    for kind, vocab, mean_knee in sorted({(row["logits"], row["vocabulary"], row["mean knee"]) for row in rows}):
        cells = {
            (row["threads"], row["torch"]): f"{row['ratio']:.2f}"
            for row in rows
            if (row["logits"], row["vocabulary"]) == (kind, vocab)
        }
        line = [f"{vocab:,}, {kind}", f"{mean_knee:,}", *(cells.get(environment, "") for environment in environments)]
        lines.append([*line, f"{min(cells.values())} to {max(cells.values())}"])
    names = [f"{threads} thread{'s' * (threads > 1)}, {version}" for threads, version in environments]
    repeats = " or ".join(map(str, sorted({row["repeats"] for row in rows})))
    write_section(
        "loss-ratios",
        "Exact DBiLD over full-vocabulary reverse KL, by torch's version and threads (cpu)",
        [(["vocabulary, logits", "mean knee", *names, "range"], lines)],
        machine().partition(",")[0],
        note=f"Forward and backward of {rows[0]['tokens']} tokens, float32, alternating, {repeats} times each. The "
        "ratio is that of the shortest times: CPU time with one thread, wall-clock time with two, while other work ran "
        'on the machine. "Skewed" logits are shaped like a language model\'s. From `docs/loss_ratios.json`.',
    )
    for kind, start in (("simulated", "| exact DBiLD, forward"), ("skewed", "| the same on logits shaped")):
        found = [row["ratio"] for row in rows if row["logits"] == kind]
        readme_cell(start, f"{min(found):.2f} to {max(found):.2f}")


def slope(xs: list[float], ys: list[float]) -> float:
    """Least-squares slope of log y over log x."""
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = statistics.mean(lx), statistics.mean(ly)
    return sum((a - mx) * (b - my) for a, b in zip(lx, ly, strict=True)) / sum((a - mx) ** 2 for a in lx)


def growth(device: str, repeats: int) -> list[list[str]]:
    """Growth of the pair term with k for a given order, and of the whole loss with the vocabulary."""

    def median(function: Callable[[], None]) -> float:
        function()
        values = []
        for _ in range(repeats):
            start = clock(device)
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            values.append(clock(device) - start)
        return statistics.median(values)

    def linear(k: int) -> float:
        tokens = max(4, knee_module.NATIVE_FROM // k)  # enough to use the kernels
        student, teacher = language_model_logits(tokens, k, device)
        orders = leading(student, k), leading(teacher, k)
        leaf = student.requires_grad_()
        return median(lambda: logit_difference_kl(leaf, teacher, orders, TEMPERATURE)) / tokens

    def quadratic(k: int) -> float:
        student, teacher = language_model_logits(1, k, device)
        return median(lambda: run(lambda s, t: enumerate_pairs(s, t, k), student, teacher))

    ks_linear, ks_pairs = [1024, 4096, 16384, 65536], [256, 512, 1024, 2048]
    vocabularies = [16_000, 32_000, 64_000, 128_000]
    loss = LossFactory("dbild")(temperature=TEMPERATURE)
    whole = []
    for vocab in vocabularies:
        student, teacher = language_model_logits(32, vocab, device)
        whole.append(median(lambda s=student, t=teacher: run(loss, s, t)))
    return [
        ["pair term, ours", "k", _range(ks_linear), f"{slope(ks_linear, [linear(k) for k in ks_linear]):.2f}"],
        ["pair term, enumerated", "k", _range(ks_pairs), f"{slope(ks_pairs, [quadratic(k) for k in ks_pairs]):.2f}"],
        ["whole loss, ours", "vocabulary", _range(vocabularies), f"{slope(vocabularies, whole):.2f}"],
    ]


def _range(values: list[int]) -> str:
    return f"{values[0]:,} to {values[-1]:,}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per call (default 64)")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 49_152, 151_936], help="vocabulary sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7, help="repeats after a warm-up; medians are printed")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument(
        "--ratios",
        metavar="FILE",
        help="only the ratio of DBiLD to reverse KL, added to this JSON file for this torch and number of threads",
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.ratios:
        file = Path(args.ratios)
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        found = ratios(args.tokens, args.vocab, args.device, args.repeats)
        again = {(row["torch"], row["threads"]) for row in found}
        rows = [row for row in known if (row["torch"], row["threads"]) not in again] + found
        file.write_text("[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
        write_ratios(rows)
        return
    rows = [row for vocab in args.vocab for row in compare(args.tokens, vocab, args.device, args.repeats)]
    grown = growth(args.device, args.repeats)
    if args.device == "cpu":
        readme_cell("| growth of its pair term with k", grown[0][-1], f"{grown[1][-1]} with all pairs enumerated")
    write_section(
        f"loss-{args.device}",
        f"Distillation losses, forward and backward ({args.device})",
        [
            (
                [
                    "vocabulary",
                    "loss",
                    "CPU ms per token" if args.device == "cpu" else "ms per token",
                    "x reverse KL",
                    "peak MiB per token",
                ],
                rows,
            ),
            (["what grows", "with", "range", "log-log slope"], grown),
        ],
        machine(),
        note=f"{args.tokens} tokens at once, float32 logits (enumeration: 2 tokens, the most that is possible here)."
        + (f" Knee computed by {knee_module.BACKEND}." if args.device == "cuda" else ""),
    )


if __name__ == "__main__":
    main()
