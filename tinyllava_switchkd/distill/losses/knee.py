"""The logits that count: those up to the knee of a token's sorted logits, in order.

In Switch-KD (Eq. 8-9) the *leader* (the side whose order is used) determines how many of its largest logits enter the
loss: sort all N logits, normalise ranks to x_i = i / N and values to y_i = (z_i - z_min) / (z_max - z_min), and take k
= argmax_i (1 - x_i) - y_i. On a real vocabulary k is in the thousands, and a full sort of 151,936 logits costs more
than the rest of the loss. A full sort is not needed: x is the upper tail of the empirical distribution, so a histogram
gives a value below which there can be no knee. Only the logits above it are collected and sorted, once for both the
knee and the order. The result is bit for bit that of the full sort.

This file needs only torch. If the kernels' files are beside it and can be compiled, they do the work: `knee_triton.py`
makes the histogram and collects the logits on CUDA, `native.py` does everything on a CPU.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FULL_SORT_BELOW = 4096
"""Smaller vocabularies are sorted completely, because the histogram would cost more than it saves."""

BINS = 1024
"""Bins of the histogram, a power of two. More bins leave fewer logits to sort, but cost more to scan."""

BLOCK_ELEMENTS = (2**27, 2**20)
"""Logits per histogram block, on an accelerator and on the CPU (there 8 MiB of buffers)."""

NATIVE_FROM = 2**18
"""Minimum number of logits for the C kernels on a CPU; for fewer, compiling is not worthwhile."""

BACKEND = os.environ.get("SWITCHKD_KERNELS", "triton")
"""The implementation: "triton" for kernels (Triton on CUDA, C on a CPU), or "torch". The results are the same."""

_checked: set[tuple[str, torch.device, torch.dtype]] = set()
"""Kernels that have been compared with torch's operations."""


class Order(NamedTuple):
    """The largest logits of every token, in descending order; equal logits are in vocabulary order.

    Rows have different lengths. Entries that do not count are on the right and repeat the row's first entry.

    Attributes:
        indices: [tokens, width] into the vocabulary.
        mask: [tokens, width], true at entries that count.
        k: [tokens], number of entries that count.
        threshold: [tokens], the smallest logit that counts.
        low: [tokens], the smallest finite logit of the whole row; NaN if the row has a NaN, 0 if none is finite.
        high: [tokens], the largest finite logit, likewise.
    """

    indices: Tensor
    mask: Tensor
    k: Tensor
    threshold: Tensor
    low: Tensor
    high: Tensor


Candidates = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Logits that may count, as returned by `candidates`."""


def finite(logits: Tensor) -> Tensor:
    """Logits with infinities replaced by the row's largest or smallest finite value (0 in a row without finite values).

    A logit of minus infinity marks an impossible token. As the row's smallest value it is in no pair that matters, and
    neither the knee nor a gradient becomes undefined. A NaN makes its whole row NaN, so that a broken model is noticed.
    """
    return _finite(logits)[0]


@torch.no_grad()
def knee(logits: Tensor, *, window: int = 0, temperature: float | None = None) -> Tensor:
    """Number of leading logits up to the knee (Switch-KD Eq. 8-9).

    If there are several maxima, the first one is used. k is at least 2; constant logits have no knee and give 2.
    Infinite logits count as the row's extreme finite ones.

    Args:
        logits: [tokens, vocab], any floating dtype; comparisons that decide are in float64.
        window: look for the knee among this many of the largest logits, as if there were no others; 0 uses all, as in
            the paper.
        temperature: look for the knee of softmax(logits / temperature); None uses the logits, as in the paper.

    Returns:
        k [tokens], int64.

    Raises:
        ValueError: `logits` is not a matrix, the vocabulary has fewer than 2 entries, or `window` is 1 or negative.
    """
    return leading(logits, window=window, temperature=temperature).k


@torch.no_grad()
def leading(
    logits: Tensor,
    k: int | None = None,
    *,
    window: int = 0,
    temperature: float | None = None,
    kernels: bool = True,
) -> Order:
    """The logits up to the knee, or the `k` largest, in descending order.

    Args:
        logits: [tokens, vocab], any floating dtype. Infinities count as the row's extreme finite logits. A row with a
            NaN has no meaningful order; there the first logits of the vocabulary are used.
        k: a fixed number for every token (8 in BiLD), or None for each token's knee.
        window: see `knee`.
        temperature: see `knee`.
        kernels: whether kernels may be used, if available.

    Raises:
        ValueError: `logits` is not a matrix, the vocabulary has fewer than 2 entries, or `k` or `window` is too small.
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"Logits must be [tokens, vocab] with a vocabulary of at least 2, not {tuple(logits.shape)}.")
    if k is not None and k < 2:
        raise ValueError(f"top_k must be at least 2 (a pair needs two logits), not {k}.")
    if window != 0 and window < 2:
        raise ValueError(f"The knee's window must be 0 (the whole vocabulary) or at least 2, not {window}.")
    logits = logits.detach()
    tokens, vocab = logits.shape
    if tokens == 0:
        none = logits.new_zeros(0)
        indices = torch.zeros(0, 2, dtype=torch.long, device=logits.device)
        return Order(indices, indices.bool(), indices[:, 0], none, none, none)
    settings = (k, 0 if window >= vocab else window, temperature)
    if kernels and settings == (None, 0, None) and vocab >= FULL_SORT_BELOW:
        order: Order | None = try_kernels("native", "knees", logits, logits)
        if order:
            return order
        found: Candidates | None = try_kernels("knee_triton", "above_knee", logits, logits)
        if found:
            return cut(*found, logits)
    return cut(*candidates(logits, *settings), logits, *settings)


def as_order(columns: Tensor, k: Tensor, threshold: Tensor, low: Tensor, high: Tensor) -> Order:
    """The order of columns [tokens, the largest k], the first k of which count in each row."""
    mask = torch.arange(columns.shape[1], device=columns.device) < k[:, None]
    return Order(torch.where(mask, columns, columns[:, :1]).long(), mask, k, threshold, low, high)


def candidates(logits: Tensor, k: int | None = None, window: int = 0, temperature: float | None = None) -> Candidates:
    """The logits that may count: all up to the knee, or the `k` largest, and a few more; not sorted yet.

    Args:
        logits: [tokens, vocab], any floating dtype.
        k: a fixed number for every token, or None for each token's knee.
        window: see `knee`.
        temperature: see `knee`.

    Returns:
        values, columns and counted: [tokens, width], in the order of the vocabulary; `counted` is false at the padding
            of shorter rows.
        low and high: [tokens, 1], the row's smallest and largest finite logit.
    """
    z, low, high = _finite(logits if logits.dtype in (torch.float32, torch.float64) else logits.float())
    if bool(low.isnan().any()):
        z = z.masked_fill(low.isnan(), 0.0)
    if k is not None:
        columns, counted = _largest(z, k)
    else:
        columns, counted = _above_knee(z, low.nan_to_num(), high.nan_to_num(), window, temperature)
    return z.gather(1, columns), columns, counted, low, high


def cut(
    values: Tensor,
    columns: Tensor,
    counted: Tensor,
    low: Tensor,
    high: Tensor,
    logits: Tensor,
    k: int | None = None,
    window: int = 0,
    temperature: float | None = None,
) -> Order:
    """Sort the candidates of `logits` and keep those that count: up to the knee, or the first `k`."""
    tokens, vocab = logits.shape
    values, columns = _descending(values, columns, counted)
    if k is None:
        if window:
            ks, threshold = _highest(values[:, :window], values[:, window - 1 : window], high, window, temperature)
        else:
            ks, threshold = _highest(values, low, high, vocab, temperature)
        width = int(ks.max())
    else:
        width = min(k, vocab)
        ks, threshold = torch.full((tokens,), width, device=columns.device), values[:, width - 1]
    return as_order(columns[:, :width], ks, threshold.to(logits.dtype), low.squeeze(1), high.squeeze(1))


def _finite(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `finite`, with the smallest and the largest logit of every row [tokens, 1]."""
    values = logits.detach()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)  # on a CPU ten times as fast as aminmax
    if bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        return logits, low, high
    infinite = torch.isinf(values)
    broken = values.isnan().any(-1, keepdim=True)
    low = values.masked_fill(infinite, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(infinite, -torch.inf).amax(-1, keepdim=True)
    low, high = (bound.masked_fill(torch.isinf(bound), 0.0).masked_fill(broken, torch.nan) for bound in (low, high))
    logits = torch.where(infinite, torch.where(values > 0, high, low), logits)
    return logits.masked_fill(broken, torch.nan), low, high


def try_kernels(module: str, function: str, like: Tensor, *arguments: object) -> Any:
    """The result of a function of a kernel module; None if its kernels cannot run, with one warning.

    Before the first use on a device and with a dtype, the module's `check(like)` compares its compiled kernels with
    torch's operations, and raises if they differ.

    Args:
        module: a module in this package.
        function: one of its functions.
        like: a tensor with the relevant device and dtype.
        arguments: of the function.
    """
    global BACKEND
    usable = _worth_compiling(like) if module == "native" else _on_accelerator(like)
    if BACKEND != "triton" or not usable:
        return None
    try:
        kernels = importlib.import_module(f".{module}", __package__)
        with torch.cuda.device_of(like):
            if (module, like.device, like.dtype) not in _checked:
                _checked.add((module, like.device, like.dtype))
                kernels.check(like)
            return getattr(kernels, function)(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # training continues after any error of the compiler or the driver
        BACKEND = "torch"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        name = "C" if module == "native" else "Triton"
        logger.warning("The %s kernels cannot run (%s); torch's slower operations are used instead.", name, reason)
        return None


def _worth_compiling(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() >= NATIVE_FROM


def _on_accelerator(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns [tokens, width] of the `k` largest logits and of ties with the last one, and which entries count."""
    threshold = z.topk(min(k, z.shape[1]), dim=-1).values[:, -1:]
    return _padded(_positions(z.neg(), threshold.neg()), *z.shape)


def _above_knee(
    z: Tensor, low: Tensor, high: Tensor, window: int = 0, temperature: float | None = None
) -> tuple[Tensor, Tensor]:
    """Columns [tokens, width] of all logits up to the knee (and some after it), and which entries count.

    With a window, these are the window's logits (and some more).

    There are `above_b` logits before bin b of B (bin 0 has the largest logits). So the bin's largest logit has rank
    above_b + 1 and a height of at least b / B - (above_b + 1) / N, and all its logits have a height of at most
    (b + 1) / B - (above_b + 1) / N. Bins whose upper bound is below the best lower bound cannot contain the knee. All
    logits down to the last bin that can are taken.
    """
    tokens, vocab = z.shape
    if vocab < FULL_SORT_BELOW:
        columns = torch.arange(vocab, device=z.device).expand(tokens, vocab)
        return columns, torch.ones_like(columns, dtype=torch.bool)
    by_softmax = temperature is not None and not window
    if temperature is not None and by_softmax:  # the softmax's normaliser cancels in Eq. 9
        z = ((z - high) / temperature).exp()
        low, high = ((low - high) / temperature).exp(), torch.ones_like(high)
    scale = bin_scale(low, high)
    # Blocks of tokens reuse buffers, because allocating memory costs more than the arithmetic.
    block = min(tokens, max(1, BLOCK_ELEMENTS[z.device.type == "cpu"] // vocab))
    work = torch.empty(block, vocab, dtype=z.dtype, device=z.device)
    bins = torch.empty(block, vocab, dtype=torch.int32, device=z.device)
    first_bin = torch.arange(0, block * BINS, BINS, dtype=torch.int32, device=z.device)[:, None]
    found = []
    for start in range(0, tokens, block):
        rows = slice(start, min(start + block, tokens))
        size = rows.stop - rows.start
        # Binning is monotone in z despite rounding, so bins keep the order. A quarter of a logit cannot overflow.
        torch.sub(high[rows] / 4, z[rows], alpha=0.25, out=work[:size]).mul_(scale[rows])
        bins[:size].copy_(work[:size]).add_(first_bin[:size])
        counts = bins[:size].view(-1).bincount(minlength=size * BINS).view(size, BINS)
        if window:
            last = (counts.cumsum(1) < window).sum(1, keepdim=True, dtype=torch.int32)
        else:
            # exp may round out of order, so that a logit before the knee ends up one bin after it.
            last = last_bin(counts, vocab, high[rows] > low[rows]) + by_softmax
        found.append(_positions(bins[:size], first_bin[:size] + last).add_(start * vocab))
    return _padded(torch.cat(found), tokens, vocab)


def bin_scale(low: Tensor, high: Tensor) -> Tensor:
    """Bins per quarter of a logit [tokens, 1]; 0, a single bin, if the row's range is too small or large to compute."""
    spread = high.double() - low.double()
    return torch.where((spread > 1e-30) & (spread < 1e38), 4 * (BINS - 1) / spread, 0.0).to(low.dtype)


def last_bin(counts: Tensor, vocab: int, varies: Tensor) -> Tensor:
    """Last bin that can contain the knee [tokens, 1], int32; -1 in rows that do not vary."""
    numbers = torch.arange(BINS, dtype=torch.int32, device=counts.device)
    counts = counts.float()
    above = counts.cumsum(1).sub_(counts)
    lower = torch.add(numbers.float() / (BINS - 1) - 1 / vocab, above, alpha=-1 / vocab).where(counts > 0, -torch.inf)
    # Half a bin of slack allows for rounding, of the bins and of these bounds.
    able = lower >= lower.amax(1, keepdim=True) - 1.5 / (BINS - 1)
    return numbers.where(able, -1).amax(1, keepdim=True).where(varies, -1)


def _positions(values: Tensor, most: Tensor) -> Tensor:
    """Ascending positions in the flattened `values` [tokens, n] of values up to the row's `most` [tokens, 1]."""
    return (values <= most).view(-1).nonzero().view(-1)


def _padded(positions: Tensor, tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Ascending positions in a [tokens, vocab] matrix as columns [tokens, width], and which entries count.

    An empty row, whose logits are constant, gets the vocabulary's first two columns.
    """
    starts = torch.arange(tokens + 1, device=positions.device) * vocab
    lengths = torch.searchsorted(positions, starts).diff()
    width = max(2, int(lengths.max()))
    counted = torch.arange(width, device=positions.device) < lengths[:, None]
    columns = torch.zeros(counted.shape, dtype=torch.long, device=positions.device)
    columns[:, 1] = 1
    columns.masked_scatter_(counted, positions - starts[:-1].repeat_interleave(lengths, output_size=len(positions)))
    counted[:, :2] = True
    return columns, counted


def _descending(values: Tensor, columns: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by descending value, equal values by column; entries that are not counted come last as minus infinity.

    Counted `columns` must be ascending.
    """
    values = values.masked_fill(~counted, -torch.inf)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _highest(values: Tensor, low: Tensor, high: Tensor, vocab: int, temperature: float | None) -> tuple[Tensor, Tensor]:
    """Rank and value [tokens] that maximise (1 - x) - y of Eq. 9, in float64, for values in descending order."""
    ranks = torch.arange(1, values.shape[1] + 1, device=values.device)
    low, high = low.double(), high.double()
    if temperature is None:
        y = ((values.double() - low) / (high - low)).nan_to_num_(neginf=torch.inf)  # padding
    else:
        y = 1 - ((values.double() - high) / temperature).expm1() / ((low - high) / temperature).expm1()
        y = y.nan_to_num_().masked_fill_(values.isneginf(), torch.inf)
    height = (1 - ranks.double() / vocab) - y
    best = height.argmax(dim=-1, keepdim=True)
    varies = high > low
    k = torch.where(varies, best + 1, 2)
    threshold = torch.where(varies, values.gather(1, best), high.nan_to_num().to(values.dtype))
    return k.squeeze(1), threshold.squeeze(1)
