"""Triton kernels for `knee.py`: the logits up to the knee, without any [tokens, vocab] buffer.

Three passes read the logits. The first finds each row's finite extremes, the second counts its histogram. The third
writes the logits down to the last bin that can contain the knee, in the order of the vocabulary, to rows as wide as the
longest. A row is divided among several programs, so that a few tokens also fill a GPU. Each program counts its own
part, and the counts of the programs before it give its output position, so the result does not depend on the order in
which they run. The host waits once, for the width. The logits taken are those of the torch operations of `knee.py`, up
to the rounding of the bins' edges, so the knee and the order are bit for bit the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .knee import BINS, bin_scale, candidates, cut, last_bin

TILE = 4096
"""Logits of a row that a program reads at a time; half of it in the pass that also writes, which needs more
registers."""

WARPS = 8

PROGRAMS = 2048
"""Intended number of programs: several for each of the 108 to 160 multiprocessors of a data-centre GPU."""


@triton.jit
def _read(z, row, start, stride, vocab, TILE: tl.constexpr, FLOAT: tl.constexpr):
    columns = start + tl.arange(0, TILE)
    inside = columns < vocab
    return columns, inside, tl.load(z + row * stride + columns, mask=inside, other=0.0).to(FLOAT)


@triton.jit
def _bins(value, low, high, scale, BINS: tl.constexpr):
    # A quarter of a logit cannot overflow. The clamp is only for NaN, whose row is ignored.
    bins = ((high * 0.25 - value * 0.25) * scale).to(tl.int32)
    return tl.minimum(tl.maximum(bins, 0), BINS - 1)


@triton.jit
def extremes(z, low, high, stride, vocab, span, TILE: tl.constexpr, FLOAT: tl.constexpr):
    """Smallest and largest finite logit of a part of a row (inf and -inf if it has none); NaN if it has a NaN."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    infinity = float("inf")
    smallest = tl.full([TILE], infinity, FLOAT)
    largest = tl.full([TILE], -infinity, FLOAT)
    broken = tl.zeros([TILE], tl.int32)
    for start in range(part * span, tl.minimum((part + 1) * span, vocab), TILE):
        _, inside, value = _read(z, row, start, stride, vocab, TILE, FLOAT)
        finite = inside & (tl.abs(value) < infinity)
        smallest = tl.minimum(smallest, tl.where(finite, value, infinity))
        largest = tl.maximum(largest, tl.where(finite, value, -infinity))
        broken = broken | (value != value).to(tl.int32)
    out = row * tl.num_programs(1) + part
    any_broken = tl.max(broken, 0) > 0
    tl.store(low + out, tl.where(any_broken, float("nan"), tl.min(smallest, 0)))
    tl.store(high + out, tl.where(any_broken, float("nan"), tl.max(largest, 0)))


@triton.jit
def count(
    z, low, high, scale, counts, stride, vocab, span, BINS: tl.constexpr, TILE: tl.constexpr, FLOAT: tl.constexpr
):
    """Histogram of a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    bottom, top, factor = tl.load(low + row), tl.load(high + row), tl.load(scale + row)
    total = tl.zeros([BINS], tl.int32)
    for start in range(part * span, tl.minimum((part + 1) * span, vocab), TILE):
        _, inside, value = _read(z, row, start, stride, vocab, TILE, FLOAT)
        value = tl.minimum(tl.maximum(value, bottom), top)
        total += tl.histogram(_bins(value, bottom, top, factor, BINS), BINS, mask=inside)
    tl.store(counts + (row * tl.num_programs(1) + part) * BINS + tl.arange(0, BINS), total)


@triton.jit(do_not_specialize=["width"])
def collect(
    z, low, high, scale, last, offsets, values, columns_out, stride, vocab, span, width,
    BINS: tl.constexpr, TILE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Write values and columns of a part of a row down to bin `last`, in order, from the part's output position on."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    bottom, top, factor = tl.load(low + row), tl.load(high + row), tl.load(scale + row)
    limit = tl.load(last + row)
    place = tl.load(offsets + row * tl.num_programs(1) + part)
    for start in range(part * span, tl.minimum((part + 1) * span, vocab), TILE):
        columns, inside, value = _read(z, row, start, stride, vocab, TILE, FLOAT)
        value = tl.minimum(tl.maximum(value, bottom), top)
        taken = inside & (_bins(value, bottom, top, factor, BINS) <= limit)
        ones = taken.to(tl.int32)
        to = place + tl.cumsum(ones, 0) - ones
        taken = taken & (to < width)  # never write beyond the row
        tl.store(values + row * width + to, value, mask=taken)
        tl.store(columns_out + row * width + to, columns, mask=taken)
        place += tl.sum(ones, 0)


def above_knee(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The logits up to the knee, and some after it.

    Args:
        logits: [tokens, vocab], any floating dtype, at least one token.

    Returns:
        Values and columns [tokens, width] in the order of the vocabulary, and which entries count; the row's smallest
        and largest finite logit [tokens, 1] (both NaN if the row has a NaN, both 0 if none is finite), which replace
        infinite logits. Constant rows have the first two columns.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens, vocab = logits.shape
    dtype, FLOAT = (torch.float64, tl.float64) if logits.dtype == torch.float64 else (torch.float32, tl.float32)
    tiles = triton.cdiv(vocab, TILE)
    span = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, tokens))) * TILE
    grid = (tokens, triton.cdiv(vocab, span))
    sizes = (logits.stride(0), vocab, span)
    options = {"FLOAT": FLOAT, "num_warps": WARPS}

    low, high = torch.empty(2, *grid, dtype=dtype, device=logits.device)
    extremes[grid](logits, low, high, *sizes, TILE=TILE, **options)
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)  # [tokens, 1]
    none = low > high
    low, high = low.masked_fill(none, 0.0), high.masked_fill(none, 0.0)
    bottom, top = low.nan_to_num(), high.nan_to_num()
    scaled = (bottom, top, bin_scale(bottom, top))

    counts = torch.empty(*grid, BINS, dtype=torch.int32, device=logits.device)
    count[grid](logits, *scaled, counts, *sizes, BINS=BINS, TILE=TILE, **options)
    last = last_bin(counts.sum(1), vocab, top > bottom)  # [tokens, 1]
    within = torch.arange(BINS, device=logits.device) <= last
    taken = (counts * within[:, None]).sum(-1)  # [tokens, parts]
    lengths = taken.sum(1, keepdim=True)
    offsets = (taken.cumsum(1) - taken).int()
    width = max(2, int(lengths.max()))

    values = torch.full((tokens, width), -torch.inf, dtype=dtype, device=logits.device)
    columns = torch.zeros(tokens, width, dtype=torch.int32, device=logits.device)
    values[:, :2], columns[:, 1] = top, 1
    collect[grid](logits, *scaled, last, offsets, values, columns, *sizes, width, BINS=BINS, TILE=TILE // 2, **options)
    counted = torch.arange(width, device=logits.device) < lengths.clamp(min=2)
    return values, columns, counted, low, high


def check(like: Tensor) -> None:
    """Compare the kernels, as compiled for the device and dtype of `like`, with torch's operations.

    Raises:
        RuntimeError: they disagree on one of four rows: a long tail, ties, constant logits, infinities.
    """
    noise = (12.9898 * torch.arange(1, 80_001, device=like.device).double().view(4, -1)).sin().mul_(43758.5453)
    z = (1 - noise.frac().abs_()).log_().mul_(-2)
    z[1].mul_(4).round_().div_(4)
    z[2] = 1.5
    z[3, ::7], z[3, 5] = -torch.inf, torch.inf
    z = z.to(like.dtype)
    pairs = zip(cut(*above_knee(z), z, None), cut(*candidates(z, None), z, None), strict=True)
    if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
        raise RuntimeError("as compiled here, the knee's kernels find other logits than torch's operations")
