"""Losses between the two sides' logit differences: BiLD and DBiLD (Switch-KD Section 3.3 and Table 4).

DBiLD compares logit *differences*. A leader (first the teacher, then the student) selects its k largest logits and
their order. Both sides' differences over all pairs m < n of these become distributions, p = softmax(d / tau), which are
compared by reverse KL. A pair d_mn = z_m - z_n factorises under the softmax, so nothing of size k^2 is needed. With
a = z / tau in leader order,

    Z = sum_{m<n} exp(a_m) exp(-a_n)
    r_m = exp(a_m) sum_{n>m} exp(-a_n) / Z          (row marginals of the pair distribution)
    c_n = exp(-a_n) sum_{m<n} exp(a_m) / Z          (column marginals)
    KL(q || p) = sum_m (q_m - p_m) (r_m - c_m) - log Z_q + log Z_p          (r, c those of q)

Prefix and suffix sums compute this in O(k), gradient included.

This file needs torch, `knee.py` and `base.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .base import LogitLoss, both_sides, register_loss
from .knee import Order, leading, try_kernels

LINEAR_RANGE = 300.0
"""Maximum spread of scaled logits for sums of products of exponentials in float64 (exp(300) is 2e130)."""

CACHED_ELEMENTS = 2**17
"""Entries [rows, k] per block on the CPU: a float64 buffer of 1 MiB, which fits in the cache."""


class LogitDifferenceKL(LogitLoss):
    """Base class of KLs between both sides' distributions over logit differences, teacher-led plus student-led.

    Args:
        temperature: Tau, by which logit differences are divided; a positive number.
        top_k: A fixed number of leading logits for every token (BiLD), or None for each token's knee (DBiLD).
        knee_window: The number of largest logits among which the knee is searched, 0 for the whole vocabulary.
        knee_on: Whether the knee is that of the logits or of their softmax at tau.
        pairs: Whether one softmax runs over all pairs (triangle) or one over the pairs of each leading logit (row).
    """

    reverse: bool

    def __init__(
        self,
        temperature: float = 3.0,
        top_k: int | None = None,
        knee_window: int = 0,
        knee_on: Literal["logits", "probabilities"] = "logits",
        pairs: Literal["triangle", "row"] = "triangle",
    ) -> None:
        super().__init__(temperature)
        if top_k is not None and top_k < 2:
            raise ValueError(f"top_k must be at least 2 (a pair needs two logits), not {top_k}.")
        if knee_window != 0 and knee_window < 2:
            raise ValueError(f"knee_window must be 0 (the whole vocabulary) or at least 2, not {knee_window}.")
        if knee_on not in ("logits", "probabilities"):
            raise ValueError(f"knee_on must be 'logits' or 'probabilities', not {knee_on!r}.")
        if pairs not in ("triangle", "row"):
            raise ValueError(f"pairs must be 'triangle' or 'row', not {pairs!r}.")
        self.top_k, self.knee_window, self.knee_on, self.pairs = top_k, knee_window, knee_on, pairs

    def order(self, logits: Tensor) -> Order:
        temperature = self.temperature if self.knee_on == "probabilities" else None
        return leading(logits, self.top_k, window=self.knee_window, temperature=temperature)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        student_order: Order | None = None,
        teacher_order: Order | None = None,
    ) -> Tensor:
        student, teacher = both_sides(student_logits, teacher_logits)
        orders = student_order or self.order(student), teacher_order or self.order(teacher)
        return logit_difference_kl(student, teacher, orders, self.temperature, reverse=self.reverse, pairs=self.pairs)

    def extra_repr(self) -> str:
        where = f"top_k={self.top_k}" if self.top_k else f"knee_window={self.knee_window}, knee_on={self.knee_on}"
        return f"{super().extra_repr()}, {where}, pairs={self.pairs}"


class BiLD(LogitDifferenceKL):
    """Base class of the two BiLD losses.

    Args:
        temperature: Tau, by which logit differences are divided; a positive number.
        top_k: The number of the largest logits of each leader whose differences are compared, at least 2.
    """

    def __init__(self, temperature: float = 3.0, top_k: int = 8) -> None:
        super().__init__(temperature, top_k)


@register_loss("bild_fkl")
class BiLDForwardKL(BiLD):
    """BiLD with forward KL, KL(teacher || student) (Table 4, BiLD-FKL).

    Args:
        temperature: Tau, by which logit differences are divided; a positive number.
        top_k: The number of the largest logits of each leader whose differences are compared, at least 2.
    """

    reverse = False


@register_loss("bild_rkl")
class BiLDReverseKL(BiLD):
    """BiLD with reverse KL, KL(student || teacher) (Table 4, BiLD-RKL).

    Args:
        temperature: Tau, by which logit differences are divided; a positive number.
        top_k: The number of the largest logits of each leader whose differences are compared, at least 2.
    """

    reverse = True


class DBiLD(LogitDifferenceKL):
    """Base class of the two DBiLD losses.

    Args:
        temperature: Tau, by which logit differences are divided; a positive number.
        knee_window: The number of largest logits among which the knee is searched, 0 for the whole vocabulary.
        knee_on: Whether the knee is that of the logits or of their softmax at tau.
        pairs: Whether one softmax runs over all pairs (triangle) or one over the pairs of each leading logit (row).
    """

    def __init__(
        self,
        temperature: float = 3.0,
        knee_window: int = 0,
        knee_on: Literal["logits", "probabilities"] = "logits",
        pairs: Literal["triangle", "row"] = "triangle",
    ) -> None:
        super().__init__(temperature, None, knee_window, knee_on, pairs)


@register_loss("dbild_fkl")
class DBiLDForwardKL(DBiLD):
    """DBiLD with forward KL, KL(teacher || student) (Table 4, DBiLD-FKL).

    Args:
        temperature: Tau, by which logit differences are divided; a positive number.
        knee_window: The number of largest logits among which the knee is searched, 0 for the whole vocabulary.
        knee_on: Whether the knee is that of the logits or of their softmax at tau.
        pairs: Whether one softmax runs over all pairs (triangle) or one over the pairs of each leading logit (row).
    """

    reverse = False


@register_loss("dbild", "dbild_rkl")
class DBiLDReverseKL(DBiLD):
    """DBiLD as Switch-KD uses it, with reverse KL, KL(student || teacher) (Section 3.3; Table 4, DBiLD-RKL).

    Args:
        temperature: Tau, by which logit differences are divided; a positive number.
        knee_window: The number of largest logits among which the knee is searched, 0 for the whole vocabulary.
        knee_on: Whether the knee is that of the logits or of their softmax at tau.
        pairs: Whether one softmax runs over all pairs (triangle) or one over the pairs of each leading logit (row).
    """

    reverse = True


def logit_difference_kl(
    student: Tensor,
    teacher: Tensor,
    orders: tuple[Order, Order],
    temperature: float,
    *,
    reverse: bool = True,
    pairs: str = "triangle",
) -> Tensor:
    """KL between softmax(differences / tau) of both sides over all pairs of each order, summed over the orders; O(k).

    Args:
        student: [tokens, vocab] logits; gets the gradient, which is 0 at infinite logits.
        teacher: [tokens, vocab].
        orders: the order when the student leads, and when the teacher leads.
        temperature: tau.
        reverse: KL(student || teacher) if true, KL(teacher || student) otherwise.
        pairs: "triangle" for one softmax over all pairs m < n; "row" for one softmax over the pairs of each m, with
            the mean of the KLs of the k - 1 rows.

    Returns:
        [tokens], in the student's dtype; computed in float64; NaN if either side has a NaN.
    """
    needs_gradient = student.requires_grad and torch.is_grad_enabled()
    arguments = (student.detach(), teacher.detach(), orders, temperature, reverse, needs_gradient)
    found = None
    if len(student) and pairs == "triangle":
        for module in ("native", "pairs_triton"):
            found = found or try_kernels(module, "logit_difference_kl", student, *arguments, LINEAR_RANGE)
    loss, gradients = found or by_blocks(*arguments, pairs)
    loss = loss.to(student.dtype)
    if not needs_gradient:
        return loss
    places = *(order.indices for order in orders), *(order.k for order in orders)
    return _WithGradient.apply(student, loss, *places, *gradients)


def by_blocks(
    student: Tensor,
    teacher: Tensor,
    orders: tuple[Order, Order],
    temperature: float,
    reverse: bool,
    needs_gradient: bool,
    pairs: str = "triangle",
) -> tuple[Tensor, list[Tensor]]:
    """Loss [tokens] in float64 and, for every order, its gradient by the student's logits at `order.indices`."""
    tokens = len(student)
    loss = student.new_zeros(tokens, dtype=torch.float64)
    gradients = []
    for order in orders:
        width = order.indices.shape[1]
        gradients.append(student.new_empty(tokens, width if needs_gradient else 0))
        size = max(1, tokens if student.is_cuda else CACHED_ELEMENTS // width)
        for rows in (slice(start, start + size) for start in range(0, tokens, size)):
            raw = [side[rows].gather(1, order.indices[rows]) for side in (student, teacher)]  # [rows, k]
            bounds = [(o.low[rows, None], o.high[rows, None]) for o in orders]
            tops = [side.amax(-1, keepdim=True) for side in raw]
            spreads = [
                top - side.amin(-1, keepdim=True) + 0 * (low + high)
                for side, top, (low, high) in zip(raw, tops, bounds, strict=True)
            ]
            spread = float(torch.stack(spreads).max()) / temperature  # not finite if a logit is not
            if not math.isfinite(spread):
                infinite = raw[0].isinf()
                raw = [side.clamp(*bound) for side, bound in zip(raw, bounds, strict=True)]
                tops = [side.amax(-1, keepdim=True) for side in raw]
            mask = order.mask[rows]
            ours, theirs = (
                side.double().sub_(top.double()).div_(temperature) for side, top in zip(raw, tops, strict=True)
            )
            value, slope = pair_kl(
                ours, theirs, mask, reverse=reverse, needs_gradient=needs_gradient, spread=spread, pairs=pairs
            )
            loss[rows] += value
            if slope is not None:
                gradients[-1][rows] = slope.div_(temperature)
                if not math.isfinite(spread):
                    gradients[-1][rows].masked_fill_(infinite, 0.0)
    return loss, gradients


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is already known, at a few vocabulary entries of each token."""

    @staticmethod
    def forward(ctx, student: Tensor, loss: Tensor, *places_then_gradients: Tensor) -> Tensor:
        ctx.shape = student.shape
        ctx.save_for_backward(*places_then_gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        indices, ks, gradients = saved[:2], saved[2:4], saved[4:]
        out = grad_loss.new_empty(ctx.shape)
        if not try_kernels("native", "spread", out, out, grad_loss, indices, ks, gradients):
            out.zero_()
            for index, gradient in zip(indices, gradients, strict=True):
                out.scatter_add_(1, index, gradient * grad_loss[:, None])
        return out, None, *(None for _ in saved)


def pair_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    reverse: bool = True,
    needs_gradient: bool = True,
    spread: float = math.nan,
    pairs: str = "triangle",
) -> tuple[Tensor, Tensor | None]:
    """KL over all pairs m < n of one order, and its gradient.

    Args:
        student: [tokens, k] float64 logits / tau in leader order, minus the row's largest; padding on the right repeats
            an entry that counts.
        teacher: [tokens, k] at the same indices.
        mask: [tokens, k], true at entries that count (at least two per row).
        reverse: KL(student || teacher) if true, KL(teacher || student) otherwise.
        needs_gradient: whether to compute the gradient.
        spread: the negative of the smallest entry of both sides; computed here if not finite.
        pairs: one softmax over the "triangle" of all pairs, or one for each "row".

    Returns:
        loss [tokens] and its gradient by `student` [tokens, k] (zero at padding).
    """
    if student.numel() == 0:
        return student.sum(-1), student.clone() if needs_gradient else None
    if not math.isfinite(spread):
        spread = -float(torch.stack([side.amin(-1) for side in (student, teacher)]).nan_to_num_(nan=0.0).min())
    if pairs == "triangle" and spread <= LINEAR_RANGE:
        return _pair_kl_by_products(student, teacher, mask, reverse, needs_gradient)
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        by_logarithms = _row_kl if pairs == "row" else _pair_kl_by_logarithms
        loss = by_logarithms(*((leaf, teacher) if reverse else (teacher, leaf)), mask)
        gradient = torch.autograd.grad(loss.sum(), leaf)[0] if needs_gradient else None
    return loss.detach(), gradient


class _Side:
    """One side's exponentials: exp(a_m), exp(-a_n) of the entries that count, prefix sums of the former, and Z."""

    def __init__(self, a: Tensor, counts: Tensor) -> None:
        self.a = a
        self.up = a.exp()  # at most 1
        self.down = counts / self.up
        self.before = _before(self.up)
        self.z = (self.down[:, 1:] * self.before).sum(-1, keepdim=True)
        self.log_z = self.z.log().squeeze(-1)

    def flow(self) -> Tensor:
        """Row minus column marginals, r - c."""
        flow = torch.zeros_like(self.up)
        torch.mul(self.up[:, :-1], _after(self.down), out=flow[:, :-1])
        flow[:, 1:] -= self.down[:, 1:] * self.before
        return flow.div_(self.z)


def _pair_kl_by_products(
    student: Tensor, teacher: Tensor, mask: Tensor, reverse: bool, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    counts = mask.double()
    q, p = (_Side(side, counts) for side in ((student, teacher) if reverse else (teacher, student)))
    delta = q.a - p.a
    ahead = _before(q.up * delta)  # sum of exp(q_m) delta_m over m < n, for n = 2..k, as `before` without delta
    # E = sum_m delta_m (r_m - c_m) = sum_{m<n} exp(q_m) exp(-q_n) (delta_m - delta_n) / Z
    expected = (ahead - delta[:, 1:] * q.before).mul_(q.down[:, 1:]).sum(-1, keepdim=True).div_(q.z)
    loss = expected.squeeze(-1) - q.log_z + p.log_z
    if not needs_gradient:
        return loss, None
    if not reverse:
        return loss, p.flow().sub_(q.flow())
    # dKL/dx_mn = P_mn (delta_m - delta_n - E) for a pair's logit x_mn = q_m - q_n; summed over the pairs in which m is
    # first, minus those in which it is second.
    gradient = torch.zeros_like(q.up)
    first = (delta[:, :-1] - expected).mul_(_after(q.down)).sub_(_after(q.down * delta))
    torch.mul(first, q.up[:, :-1], out=gradient[:, :-1])
    second = (delta[:, 1:] + expected).mul_(q.before).sub_(ahead)
    gradient[:, 1:] += second.mul_(q.down[:, 1:])
    return loss, gradient.div_(q.z)


def _pair_kl_by_logarithms(q: Tensor, p: Tensor, mask: Tensor) -> Tensor:
    """The same with logsumexp and autograd, for logits that are too far apart for products of exponentials."""
    log_z_q, flow = _log_marginals(q, mask)
    log_z_p, _ = _log_marginals(p, mask)
    return ((q - p).masked_fill(~mask, 0.0) * flow).sum(-1) - log_z_q + log_z_p


def _log_marginals(a: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    nothing = -1e300
    up, down = a.masked_fill(~mask, nothing), (-a).masked_fill(~mask, nothing)
    before = up.logcumsumexp(-1)[:, :-1]  # log sum of exp(a) over m < n, for n = 2..k
    after = down.flip(-1).logcumsumexp(-1).flip(-1)[:, 1:]  # log sum of exp(-a) over n > m, for m = 1..k-1
    log_z = (before + down[:, 1:]).logsumexp(-1)
    rows = (up[:, :-1] + after - log_z[:, None]).exp()
    columns = (before + down[:, 1:] - log_z[:, None]).exp()
    pad = nn.functional.pad
    return log_z, pad(rows, (0, 1)) - pad(columns, (1, 0))


def _row_kl(q: Tensor, p: Tensor, mask: Tensor) -> Tensor:
    """Mean over m = 1..k-1 of the KL between softmaxes over the pairs of row m; autograd takes the gradient.

    In row m the first logit cancels: the softmax is that of -a_n over n > m. With V_m = sum_{n>m} exp(-q_n),

        KL_m = sum_{n>m} exp(-q_n) (p_n - q_n) / V_m - log V_m(q) + log V_m(p)
        sum_m KL_m = sum_n (p_n - q_n) exp(-q_n) sum_{m<n} 1 / V_m(q) - sum_m log V_m(q) + sum_m log V_m(p)
    """
    nothing = -1e300

    def log_v(a: Tensor) -> Tensor:
        return (-a).masked_fill(~mask, nothing).flip(-1).logcumsumexp(-1).flip(-1)[:, 1:]  # for m = 1..k-1

    counts = mask[:, 1:]  # row m = 1..k-1 has a pair if entry m + 1 counts
    log_v_q, log_v_p = (log_v(side).masked_fill(~counts, 0.0) for side in (q, p))
    columns = (-log_v_q).masked_fill(~counts, nothing).logcumsumexp(-1)
    weights = (columns - q[:, 1:]).masked_fill(~counts, nothing).exp()  # of the last entries n = 2..k, over all rows
    total = ((p - q)[:, 1:].masked_fill(~counts, 0.0) * weights).sum(-1) + (log_v_p - log_v_q).sum(-1)
    return total / counts.sum(-1)


def _before(values: Tensor) -> Tensor:
    """For all entries except the first, the sum of the entries before."""
    return values.cumsum(-1)[:, :-1]


def _after(values: Tensor) -> Tensor:
    """For all entries except the last, the sum of the entries after."""
    return values.flip(-1).cumsum_(-1)[:, :-1].flip(-1)
