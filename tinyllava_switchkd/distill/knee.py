"""Which logits count: the knee of a token's sorted logits, and the tokens above it in order.

Switch-KD (Eq. 8-9) lets the *leader* (the side whose order is used) choose how many of its largest logits enter the
loss: sort all N logits, normalise ranks to x_i = i / N and values to y_i = (z_i - z_min) / (z_max - z_min), and take
k = argmax_i (1 - x_i) - y_i. On a real vocabulary k falls in the thousands, and a full sort of 151,936 logits is nearly
all of the loss's time. It is not needed: x is the upper tail of the empirical distribution, so a histogram brackets the
knee, and only the logits of the bracketed bins are sorted. The result is that of the full sort, bit for bit.

The file needs nothing but torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FULL_SORT_BELOW = 4096
"""Vocabularies smaller than this are sorted whole: there the histogram costs more than it saves."""

BINS = 4096
"""Bins of the histogram. More bins leave fewer logits to sort and cost more to scan."""

BLOCK_ELEMENTS = (2**27, 2**20)
"""Logits whose histogram is made at one time, on an accelerator and on the CPU (there: 12 MiB of buffers)."""


class Order(NamedTuple):
    """The largest logits of every token, in descending order; equal logits stay in vocabulary order.

    Rows have different lengths, so they are padded on the right: `indices` [tokens, width] into the vocabulary,
    `mask` [tokens, width] true where an entry counts, `k` [tokens] the number that count, `threshold` [tokens] the
    smallest logit that counts.
    """

    indices: Tensor
    mask: Tensor
    k: Tensor
    threshold: Tensor


def finite(logits: Tensor) -> Tensor:
    """Logits with infinities replaced by the row's largest or smallest finite value (zeros in a row that has none).

    A logit of minus infinity marks a token that can't occur; as the row's smallest value it takes part in no pair that
    matters, and neither the knee nor a gradient becomes undefined. A NaN makes its whole row NaN: a broken model is
    seen.
    """
    values = logits.detach()
    low, high = _extremes(values)
    if bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        return logits
    infinite = torch.isinf(values)
    low = values.masked_fill(infinite, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(infinite, -torch.inf).amax(-1, keepdim=True)
    low, high = (bound.masked_fill(torch.isinf(bound), 0.0) for bound in (low, high))
    logits = torch.where(infinite, torch.where(values > 0, high, low), logits)
    return logits.masked_fill(values.isnan().any(-1, keepdim=True), torch.nan)


@torch.no_grad()
def knee(logits: Tensor) -> Tensor:
    """Number of leading logits up to the knee (Switch-KD Eq. 8-9).

    The first maximum wins; k is at least 2; constant logits have no knee and give 2; infinite logits count as the
    row's extreme finite ones.

    Args:
        logits: [tokens, vocab], any floating dtype; computed in float64 where it decides.

    Returns:
        k [tokens], int64.

    Raises:
        ValueError: `logits` is not a matrix, or the vocabulary has fewer than 2 entries.
    """
    _check(logits)
    return _knee(_comparable(finite(logits.detach())))[0]


@torch.no_grad()
def leading(logits: Tensor, k: int | None = None) -> Order:
    """The logits up to the knee, or the `k` largest, in descending order.

    Args:
        logits: [tokens, vocab], finite (see `finite`).
        k: a fixed number for every token (BiLD's 8), or None for each token's knee.
    """
    _check(logits)
    z = _comparable(logits.detach())
    tokens, vocab = z.shape
    if k is None:
        counts, threshold = _knee(z)
    else:
        if k < 2:
            raise ValueError(f"top_k must be at least 2 (a pair needs two logits), not {k}.")
        k = min(k, vocab)
        counts = torch.full((tokens,), k, device=z.device)
        threshold = z.topk(k, dim=-1).values[:, -1]
    if tokens == 0:
        return Order(counts.new_zeros(0, 2), counts.new_zeros(0, 2, dtype=torch.bool), counts, threshold)
    # All logits from the threshold up, ties included, in vocabulary order; a stable sort then leaves ties in that
    # order, and whatever ties stand beyond k fall to the mask.
    rows, columns = (z >= threshold[:, None]).nonzero(as_tuple=True)
    indices, values = _pad_rows(rows, columns, z)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    width = int(counts.max())
    indices = indices.gather(1, order[:, :width])
    mask = torch.arange(width, device=z.device) < counts[:, None]
    return Order(indices.masked_fill_(~mask, 0), mask, counts, threshold.to(logits.dtype))


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"Logits must be [tokens, vocab] with a vocabulary of at least 2, not {tuple(logits.shape)}.")


def _extremes(z: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest logit of each row [tokens, 1]; two passes, which on the CPU beat `torch.aminmax` tenfold."""
    return z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)


def _comparable(logits: Tensor) -> Tensor:
    """In a dtype to compare in; rows of NaN, whose order means nothing, become constant."""
    z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    broken = z[:, :1].isnan()
    return z.masked_fill(broken, 0.0) if bool(broken.any()) else z


def _knee(z: Tensor) -> tuple[Tensor, Tensor]:
    """k [tokens] and the value of the k-th largest logit [tokens]."""
    tokens, vocab = z.shape
    if tokens == 0:
        return z.new_zeros(0, dtype=torch.long), z.new_zeros(0)
    low, high = _extremes(z)
    if vocab < FULL_SORT_BELOW:
        values = z.sort(dim=-1, descending=True).values
        ranks = torch.arange(1, vocab + 1, device=z.device).expand_as(values)
        return _highest(values, ranks, low, high, vocab)
    # Blocks of tokens keep the work in buffers that are allocated once; fresh memory costs more than the arithmetic.
    block = min(tokens, max(1, BLOCK_ELEMENTS[z.device.type == "cpu"] // vocab))
    buffers = (torch.empty_like(z[:block]), torch.empty(block, vocab, dtype=torch.long, device=z.device))
    found = []
    for rows in torch.arange(tokens).split(block):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        values, ranks = _candidates(z[part], low[part], high[part], *(buffer[: len(rows)] for buffer in buffers))
        found.append(_highest(values, ranks, low[part], high[part], vocab))
    k, threshold = zip(*found, strict=True)
    return torch.cat(k), torch.cat(threshold)


def _highest(values: Tensor, ranks: Tensor, low: Tensor, high: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Rank and value where (1 - x) - y of Eq. 9 is highest, in float64; entries of rank 0 are padding."""
    y = (values.double() - low.double()) / (high.double() - low.double())
    height = ((1 - ranks.double() / vocab) - y).masked_fill_(ranks == 0, -torch.inf)
    best = height.argmax(dim=-1, keepdim=True)
    constant = ~(high > low)
    k = ranks.gather(1, best).clamp_(min=2).masked_fill_(constant, 2)
    return k.squeeze(1), torch.where(constant, high, values.gather(1, best)).squeeze(1)


def _candidates(z: Tensor, low: Tensor, high: Tensor, work: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that can be the knee, in descending order, with their ranks among all; padding has rank 0.

    Bin b (0 holds the largest logits) begins after `above_b` larger logits, so its largest logit has rank
    above_b + 1 and its height is at least b / BINS - (above_b + 1) / N, while no logit of it is higher than
    (b + 1) / BINS - (above_b + 1) / N. Bins whose upper bound stays below the best lower bound can't hold the knee.
    """
    tokens, vocab = z.shape
    # The binning is monotone in z whatever the rounding, so bins never mix the order. NaN goes to bin 0.
    scale = BINS / (high - low).clamp(min=1e-30)
    bins.copy_(torch.sub(high, z, out=work).mul_(scale).nan_to_num_(0.0).clamp_(max=BINS - 1))
    counts = torch.zeros(tokens, BINS, dtype=torch.long, device=z.device)
    counts.scatter_add_(1, bins, torch.ones((), dtype=torch.long, device=z.device).expand_as(bins))
    above = counts.cumsum(1) - counts
    lower = torch.arange(BINS, device=z.device) / BINS - (above + 1).double() / vocab
    best = lower.masked_fill(counts == 0, -torch.inf).amax(1, keepdim=True)
    # Two bins of slack absorb the rounding of the binning itself.
    chosen = (lower + 3 / BINS >= best) & (counts > 0)
    rows, columns = chosen.gather(1, bins).nonzero(as_tuple=True)
    indices, values = _pad_rows(rows, columns, z)
    values, order = values.sort(dim=-1, descending=True)
    chosen_counts = counts * chosen
    shift = above - (chosen_counts.cumsum(1) - chosen_counts)
    bin_of = bins.gather(1, indices.gather(1, order))
    ranks = torch.arange(1, values.shape[1] + 1, device=z.device) + shift.gather(1, bin_of)
    return values, ranks.masked_fill_(values == -torch.inf, 0)


def _pad_rows(rows: Tensor, columns: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Ragged (row, column) lists, sorted by row, as padded `indices` [tokens, width] and their `values` (-inf: pad)."""
    lengths = torch.bincount(rows, minlength=z.shape[0])
    within = torch.arange(len(rows), device=z.device) - (lengths.cumsum(0) - lengths)[rows]
    width = int(lengths.max())
    indices = torch.zeros(z.shape[0], width, dtype=torch.long, device=z.device)
    values = torch.full((z.shape[0], width), -torch.inf, dtype=z.dtype, device=z.device)
    indices[rows, within] = columns
    values[rows, within] = z[rows, columns]
    return indices, values
