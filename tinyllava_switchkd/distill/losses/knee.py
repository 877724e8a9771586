"""Which logits count: the knee of a token's sorted logits, and the tokens above it in order.

Switch-KD (Eq. 8-9) lets the *leader* (the side whose order is used) choose how many of its largest logits enter the
loss: sort all N logits, normalise ranks to x_i = i / N and values to y_i = (z_i - z_min) / (z_max - z_min), and take
k = argmax_i (1 - x_i) - y_i. On a real vocabulary k falls in the thousands, and a full sort of 151,936 logits costs
more than the rest of the loss. It is not needed: x is the upper tail of the empirical distribution, so a histogram
tells below which value no knee can lie, and only the logits above it are collected and sorted, once, for the knee and
for the order alike. The result is that of the full sort, bit for bit.

The file needs nothing but torch. Where the files of kernels lie beside it and can be compiled, those do the work:
`knee_triton.py` makes the histogram and collects the logits on CUDA, `native.py` does all of it on a CPU.
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
"""Vocabularies smaller than this are sorted whole: there the histogram costs more than it saves."""

BINS = 1024
"""Bins of the histogram. More bins leave fewer logits to sort and cost more to scan; a power of two."""

BLOCK_ELEMENTS = (2**27, 2**20)
"""Logits whose histogram is made at one time, on an accelerator and on the CPU (there: 8 MiB of buffers)."""

NATIVE_FROM = 2**18
"""Logits from which the C kernels do the work on a CPU; for fewer it is not worth compiling them."""

BACKEND = os.environ.get("SWITCHKD_KERNELS", "triton")
"""What does the work: kernels ("triton" on CUDA, C on a CPU), or "torch" operations. The answers are the same."""

_checked: set[tuple[str, torch.device, torch.dtype]] = set()
"""Which kernels have been compared with torch's operations."""


class Order(NamedTuple):
    """The largest logits of every token, in descending order; equal logits stay in vocabulary order.

    Rows have different lengths. Entries that do not count stand on the right and repeat the row's first.

    Attributes:
        indices: [tokens, width] into the vocabulary.
        mask: [tokens, width], true where an entry counts.
        k: [tokens], the number that count.
        threshold: [tokens], the smallest logit that counts.
        low: [tokens], the smallest finite logit of the whole row; NaN if the row has a NaN, 0 if it has none finite.
        high: [tokens], the largest, likewise.
    """

    indices: Tensor
    mask: Tensor
    k: Tensor
    threshold: Tensor
    low: Tensor
    high: Tensor


Candidates = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Logits that may lead, as `candidates` gives them."""


def finite(logits: Tensor) -> Tensor:
    """Logits with infinities replaced by the row's largest or smallest finite value (zeros in a row that has none).

    A logit of minus infinity marks a token that can't occur; as the row's smallest value it takes part in no pair that
    matters, and neither the knee nor a gradient becomes undefined. A NaN makes its whole row NaN: a broken model is
    seen.
    """
    return _finite(logits)[0]


@torch.no_grad()
def knee(logits: Tensor, *, window: int = 0, temperature: float | None = None) -> Tensor:
    """Number of leading logits up to the knee (Switch-KD Eq. 8-9).

    The first maximum wins; k is at least 2; constant logits have no knee and give 2; infinite logits count as the
    row's extreme finite ones.

    Args:
        logits: [tokens, vocab], any floating dtype; computed in float64 where it decides.
        window: look for the knee among this many of the largest logits, as if there were no others; 0 takes all, as
            the paper writes it.
        temperature: look for the knee of softmax(logits / temperature); None takes the logits themselves, as the paper
            writes it.

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
        logits: [tokens, vocab], any floating dtype. Infinities count as the row's extreme finite logits; in a row with
            a NaN, whose order means nothing, the first logits of the vocabulary lead.
        k: a fixed number for every token (BiLD's 8), or None for each token's knee.
        window: where the knee is looked for; see `knee`.
        temperature: on what the knee is looked for; see `knee`.
        kernels: whether kernels may do the work, where there are any.

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
    """An order of columns [tokens, the largest k] of which the first k of each row count."""
    mask = torch.arange(columns.shape[1], device=columns.device) < k[:, None]
    return Order(torch.where(mask, columns, columns[:, :1]).long(), mask, k, threshold, low, high)


def candidates(logits: Tensor, k: int | None = None, window: int = 0, temperature: float | None = None) -> Candidates:
    """The logits that may lead: all up to the knee, or the `k` largest, and a few more. They are not sorted yet.

    Args:
        logits: [tokens, vocab], any floating dtype.
        k: a fixed number for every token, or None for each token's knee.
        window: where the knee is looked for; see `knee`.
        temperature: on what the knee is looked for; see `knee`.

    Returns:
        values, columns and counted: [tokens, width], in the order of the vocabulary; `counted` is false where a row has
            fewer than others.
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
    """Sort what `candidates` found of `logits`, and keep what counts: up to the knee, or `k`."""
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
    """`finite`, and the smallest and the largest logit of every row of it [tokens, 1]."""
    values = logits.detach()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)  # on the CPU tenfold faster than aminmax
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
    """What a function of Triton kernels returns; None, with one warning, where they cannot run.

    Before their first use on a device and for a dtype, the kernels, as compiled there, are compared with torch's
    operations: each module has a `check(like)` for that, which raises.

    Args:
        module: a file beside this one.
        function: a function of it.
        like: a tensor of the device and dtype that count.
        arguments: the function's.
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
    except Exception as error:  # whatever the compiler or the driver objects to, training goes on
        BACKEND = "torch"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        name = "C" if module == "native" else "Triton"
        logger.warning("The %s kernels cannot run (%s); torch's operations do their work, slower.", name, reason)
        return None


def _worth_compiling(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() >= NATIVE_FROM


def _on_accelerator(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns [tokens, width] of the `k` largest logits, ties with the last included, and which entries count."""
    threshold = z.topk(min(k, z.shape[1]), dim=-1).values[:, -1:]
    return _padded(_positions(z.neg(), threshold.neg()), *z.shape)


def _above_knee(
    z: Tensor, low: Tensor, high: Tensor, window: int = 0, temperature: float | None = None
) -> tuple[Tensor, Tensor]:
    """Columns [tokens, width] of all logits that are or precede the knee (and some after it), and which entries count.

    With a window, these are the window's logits (and some more).

    Bin b (0 holds the largest logits) of B begins after `above_b` larger logits, so its largest logit has rank
    above_b + 1 and its height is at least b / B - (above_b + 1) / N, while no logit of it is higher than
    (b + 1) / B - (above_b + 1) / N. Bins whose upper bound stays below the best lower bound can't hold the knee; all
    logits down to the last bin that can are taken.
    """
    tokens, vocab = z.shape
    if vocab < FULL_SORT_BELOW:
        columns = torch.arange(vocab, device=z.device).expand(tokens, vocab)
        return columns, torch.ones_like(columns, dtype=torch.bool)
    by_softmax = temperature is not None and not window
    if temperature is not None and by_softmax:  # whose normaliser cancels in Eq. 9
        z = ((z - high) / temperature).exp()
        low, high = ((low - high) / temperature).exp(), torch.ones_like(high)
    scale = bin_scale(low, high)
    # Blocks of tokens keep the work in buffers that are allocated once; fresh memory costs more than the arithmetic.
    block = min(tokens, max(1, BLOCK_ELEMENTS[z.device.type == "cpu"] // vocab))
    work = torch.empty(block, vocab, dtype=z.dtype, device=z.device)
    bins = torch.empty(block, vocab, dtype=torch.int32, device=z.device)
    first_bin = torch.arange(0, block * BINS, BINS, dtype=torch.int32, device=z.device)[:, None]
    found = []
    for start in range(0, tokens, block):
        rows = slice(start, min(start + block, tokens))
        size = rows.stop - rows.start
        # The binning is monotone in z whatever the rounding, so bins never mix the order. A quarter can't overflow.
        torch.sub(high[rows] / 4, z[rows], alpha=0.25, out=work[:size]).mul_(scale[rows])
        bins[:size].copy_(work[:size]).add_(first_bin[:size])
        counts = bins[:size].view(-1).bincount(minlength=size * BINS).view(size, BINS)
        if window:
            last = (counts.cumsum(1) < window).sum(1, keepdim=True, dtype=torch.int32)
        else:
            # exp may round its results out of order, so that a logit before the knee falls a bin behind it.
            last = last_bin(counts, vocab, high[rows] > low[rows]) + by_softmax
        found.append(_positions(bins[:size], first_bin[:size] + last).add_(start * vocab))
    return _padded(torch.cat(found), tokens, vocab)


def bin_scale(low: Tensor, high: Tensor) -> Tensor:
    """Bins to a quarter of a logit [tokens, 1]; 0, a single bin, where the row's range is beyond the arithmetic."""
    spread = high.double() - low.double()
    return torch.where((spread > 1e-30) & (spread < 1e38), 4 * (BINS - 1) / spread, 0.0).to(low.dtype)


def last_bin(counts: Tensor, vocab: int, varies: Tensor) -> Tensor:
    """Last bin that can hold the knee [tokens, 1], int32; -1 in rows that do not vary."""
    numbers = torch.arange(BINS, dtype=torch.int32, device=counts.device)
    counts = counts.float()
    above = counts.cumsum(1).sub_(counts)
    lower = torch.add(numbers.float() / (BINS - 1) - 1 / vocab, above, alpha=-1 / vocab).where(counts > 0, -torch.inf)
    # Half a bin of slack absorbs the rounding of the binning, and of this.
    able = lower >= lower.amax(1, keepdim=True) - 1.5 / (BINS - 1)
    return numbers.where(able, -1).amax(1, keepdim=True).where(varies, -1)


def _positions(values: Tensor, most: Tensor) -> Tensor:
    """Where in the flattened `values` [tokens, n] stands at most the row's `most` [tokens, 1], ascending."""
    return (values <= most).view(-1).nonzero().view(-1)


def _padded(positions: Tensor, tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Ascending positions in a [tokens, vocab] matrix as columns [tokens, width], and which entries count.

    A row of none, which is constant, gets the vocabulary's first two.
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
    """Values and columns by descending value, equal values by column; where `counted` is false: last, minus infinity.

    `columns` ascend among those counted.
    """
    values = values.masked_fill(~counted, -torch.inf)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _highest(values: Tensor, low: Tensor, high: Tensor, vocab: int, temperature: float | None) -> tuple[Tensor, Tensor]:
    """Rank and value [tokens] where (1 - x) - y of Eq. 9 is highest, in float64, of values in descending order."""
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
