"""Triton kernels for `pairs.py`: the pair KL of one order, directly from the logits, one program per token.

The torch operations of `pairs.py` take some forty passes over float64 buffers of [tokens, k]. Here a token's k leading
logits are read a few times and only the gradient is written. Sums are in float64 but in another order than torch's, so
the results agree up to rounding. Exclusive sums are sums of shifted entries. Subtracting the entry itself would lose
values that are small compared with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .knee import Order, leading

TILE = 512
WARPS = 4


@triton.jit
def _scaled(logits, row_indices, at, inside, low, high, shift, scale):
    """Logits / tau in leader order, clamped to the finite ones and shifted; 0 outside."""
    index = tl.load(row_indices + at, mask=inside, other=0)
    value = tl.load(logits + index, mask=inside, other=0.0).to(tl.float64)
    clamped = tl.where(value < low, low, tl.where(value > high, high, value))
    return tl.where(inside, (clamped - shift) * scale, 0.0), value


@triton.jit
def _ups(x, inside):
    return tl.where(inside, tl.exp(x), 0.0)


@triton.jit
def _settings_of(row):
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit(do_not_specialize=["width"])
def pair_losses(
    q, p, indices, ks, settings, statistics, gradient, stride, width,
    REVERSE: tl.constexpr, GRADIENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """KL(q || p) of a row's order, and the part of its gradient that needs prefix sums.

    `settings` has q's low and high, p's low and high, and 1 / tau for each row. The kernel writes q's and p's largest
    logit, E, 1 / Z_q, 1 / Z_p, the loss and the larger spread to `statistics`.
    """
    row = tl.program_id(0).to(tl.int64)
    q += row * stride
    p += row * stride
    indices += row * width
    k = tl.load(ks + row)
    q_low, q_high, p_low, p_high, scale = _settings_of(settings + row * 5)
    places = tl.arange(0, TILE)
    infinity = float("inf")

    q_max = tl.full([TILE], -infinity, tl.float64)
    p_max = tl.full([TILE], -infinity, tl.float64)
    q_min = tl.full([TILE], infinity, tl.float64)
    p_min = tl.full([TILE], infinity, tl.float64)
    for start in range(0, k, TILE):
        inside = start + places < k
        a, _ = _scaled(q, indices, start + places, inside, q_low, q_high, 0.0, 1.0)
        b, _ = _scaled(p, indices, start + places, inside, p_low, p_high, 0.0, 1.0)
        q_max, q_min = (
            tl.maximum(q_max, tl.where(inside, a, -infinity)),
            tl.minimum(q_min, tl.where(inside, a, infinity)),
        )
        p_max, p_min = (
            tl.maximum(p_max, tl.where(inside, b, -infinity)),
            tl.minimum(p_min, tl.where(inside, b, infinity)),
        )
    q_top, p_top = tl.max(q_max, 0), tl.max(p_max, 0)
    spread = tl.maximum(q_top - tl.min(q_min, 0), p_top - tl.min(p_min, 0)) * scale

    z_q = tl.zeros([TILE], tl.float64)
    z_p = tl.zeros([TILE], tl.float64)
    numerator = tl.zeros([TILE], tl.float64)
    q_sum = q_top * 0.0
    p_sum = q_top * 0.0
    ahead_sum = q_top * 0.0
    for start in range(0, k, TILE):
        at = start + places
        inside = at < k
        earlier = inside & (at > 0)
        a, _ = _scaled(q, indices, at, inside, q_low, q_high, q_top, scale)
        b, _ = _scaled(p, indices, at, inside, p_low, p_high, p_top, scale)
        a_before, _ = _scaled(q, indices, at - 1, earlier, q_low, q_high, q_top, scale)
        b_before, _ = _scaled(p, indices, at - 1, earlier, p_low, p_high, p_top, scale)
        up = _ups(a_before, earlier)
        up_p = _ups(b_before, earlier)
        before = q_sum + tl.cumsum(up, 0)
        ahead = ahead_sum + tl.cumsum(up * (a_before - b_before), 0)
        down = _ups(-a, inside)
        z_q += down * before
        z_p += _ups(-b, inside) * (p_sum + tl.cumsum(up_p, 0))
        numerator += down * (ahead - (a - b) * before)
        q_sum += tl.sum(up, 0)
        p_sum += tl.sum(up_p, 0)
        ahead_sum += tl.sum(up * (a_before - b_before), 0)
    q_z, p_z = tl.sum(z_q, 0), tl.sum(z_p, 0)
    expected = tl.sum(numerator, 0) / q_z
    broken = (q_low + q_high + p_low + p_high) * 0.0  # NaN if a logit is
    loss = expected - tl.log(q_z) + tl.log(p_z) + broken
    out = statistics + row * 7
    tl.store(out, q_top)
    tl.store(out + 1, p_top)
    tl.store(out + 2, expected)
    q_share, p_share = 1.0 / q_z, 1.0 / p_z
    tl.store(out + 3, q_share)
    tl.store(out + 4, p_share)
    tl.store(out + 5, loss)
    tl.store(out + 6, spread)

    if GRADIENT:
        q_sum = q_top * 0.0
        p_sum = q_top * 0.0
        ahead_sum = q_top * 0.0
        for start in range(0, k, TILE):
            at = start + places
            inside = at < k
            earlier = inside & (at > 0)
            a, _ = _scaled(q, indices, at, inside, q_low, q_high, q_top, scale)
            b, _ = _scaled(p, indices, at, inside, p_low, p_high, p_top, scale)
            a_before, _ = _scaled(q, indices, at - 1, earlier, q_low, q_high, q_top, scale)
            b_before, _ = _scaled(p, indices, at - 1, earlier, p_low, p_high, p_top, scale)
            up = _ups(a_before, earlier)
            before = q_sum + tl.cumsum(up, 0)
            q_sum += tl.sum(up, 0)
            down = _ups(-a, inside)
            if REVERSE:
                ahead = ahead_sum + tl.cumsum(up * (a_before - b_before), 0)
                ahead_sum += tl.sum(up * (a_before - b_before), 0)
                part = down * ((a - b + expected) * before - ahead) * q_share
            else:
                up_p = _ups(b_before, earlier)
                part = down * before * q_share - _ups(-b, inside) * (p_sum + tl.cumsum(up_p, 0)) * p_share
                p_sum += tl.sum(up_p, 0)
            tl.store(gradient + row * width + at, part, mask=inside)


@triton.jit(do_not_specialize=["width"])
def finish_gradient(
    q, p, indices, ks, settings, statistics, gradient, stride, width,
    REVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the part that needs suffix sums to `gradient` and divide by tau; 0 at the student's infinite logits."""
    row = tl.program_id(0).to(tl.int64)
    q += row * stride
    p += row * stride
    indices += row * width
    k = tl.load(ks + row)
    q_low, q_high, p_low, p_high, scale = _settings_of(settings + row * 5)
    out = statistics + row * 7
    q_top, p_top, expected = tl.load(out), tl.load(out + 1), tl.load(out + 2)
    q_share, p_share = tl.load(out + 3), tl.load(out + 4)
    broken = tl.load(out + 5) * 0.0
    places = tl.arange(0, TILE)
    q_sum = q_top * 0.0
    other_sum = q_top * 0.0
    tiles = tl.cdiv(k, TILE)
    for tile in range(0, tiles):
        at = (tiles - 1 - tile) * TILE + places
        inside = at < k
        later = at + 1 < k
        a, raw_q = _scaled(q, indices, at, inside, q_low, q_high, q_top, scale)
        b, raw_p = _scaled(p, indices, at, inside, p_low, p_high, p_top, scale)
        a_after, _ = _scaled(q, indices, at + 1, later, q_low, q_high, q_top, scale)
        b_after, _ = _scaled(p, indices, at + 1, later, p_low, p_high, p_top, scale)
        down = _ups(-a_after, later)
        after = q_sum + tl.cumsum(down, 0, reverse=True)
        q_sum += tl.sum(down, 0)
        if REVERSE:
            behind = other_sum + tl.cumsum(down * (a_after - b_after), 0, reverse=True)
            other_sum += tl.sum(down * (a_after - b_after), 0)
            part = _ups(a, inside) * ((a - b - expected) * after - behind) * q_share
            raw = raw_q
        else:
            down_p = _ups(-b_after, later)
            part = _ups(b, inside) * (other_sum + tl.cumsum(down_p, 0, reverse=True)) * p_share
            part -= _ups(a, inside) * after * q_share
            other_sum += tl.sum(down_p, 0)
            raw = raw_p
        slot = gradient + row * width + at
        part = (part + tl.load(slot, mask=inside, other=0.0)) * scale + broken
        tl.store(slot, tl.where(tl.abs(raw) < float("inf"), part, 0.0), mask=inside)


def logit_difference_kl(
    student: Tensor,
    teacher: Tensor,
    orders: tuple[Order, Order],
    temperature: float,
    reverse: bool,
    needs_gradient: bool,
    most: float,
) -> tuple[Tensor, list[Tensor]] | None:
    """Loss [tokens] in float64 and, for every order, its gradient by the student's logits at `order.indices`.

    None if scaled logits differ by more than `most`, whose exponentials would exceed float64.
    """
    student, teacher = (side if side.stride(1) == 1 else side.contiguous() for side in (student, teacher))
    if student.stride(0) != teacher.stride(0):
        student, teacher = student.contiguous(), teacher.contiguous()
    sides, owners = ((student, teacher), orders) if reverse else ((teacher, student), orders[::-1])
    bounds = [bound.double() for order in owners for bound in (order.low, order.high)]
    settings = torch.stack([*bounds, torch.full_like(bounds[0], 1 / temperature)], 1)  # [tokens, 5]
    tokens = len(student)
    launched = []
    for order in orders:
        width = order.indices.shape[1]
        statistics = torch.empty(tokens, 7, dtype=torch.float64, device=student.device)
        gradient = torch.zeros(tokens, width if needs_gradient else 0, dtype=torch.float64, device=student.device)
        arguments = (*sides, order.indices.contiguous(), order.k, settings, statistics, gradient)
        sizes = (student.stride(0), width)
        options = {"REVERSE": reverse, "TILE": TILE, "num_warps": WARPS}
        pair_losses[(tokens,)](*arguments, *sizes, GRADIENT=needs_gradient, **options)
        launched.append((arguments, sizes, options))
    results = [arguments[5] for arguments, _, _ in launched]
    if float(torch.stack([statistics[:, 6] for statistics in results]).nan_to_num(nan=0.0).max()) > most:
        return None
    if needs_gradient:
        for arguments, sizes, options in launched:
            finish_gradient[(tokens,)](*arguments, *sizes, **options)
    loss = torch.stack([statistics[:, 5] for statistics in results]).sum(0)
    return loss, [arguments[6].to(student.dtype) for arguments, _, _ in launched] if needs_gradient else []


def check(like: Tensor) -> None:
    """Compare the kernels, as compiled for the device and dtype of `like`, with torch's operations.

    Raises:
        RuntimeError: they disagree by more than rounding.
    """
    from .pairs import LINEAR_RANGE, by_blocks

    noise = (78.233 * torch.arange(1, 8001, device=like.device).double().view(2, 2, -1)).sin().mul_(43758.5453)
    student, teacher = noise.frac().mul_(9).to(like.dtype)
    orders = leading(student, 1100), leading(teacher, 1100)
    for reverse in (True, False):
        found = logit_difference_kl(student, teacher, orders, 3.0, reverse, True, LINEAR_RANGE)
        if found is None:
            raise RuntimeError("as compiled here, the loss's kernels refuse logits that are close together")
        loss, gradients = found
        expected, slopes = by_blocks(student, teacher, orders, 3.0, reverse, True)
        agree = [torch.allclose(loss, expected, rtol=1e-9, atol=1e-12)]
        agree += [torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(gradients, slopes, strict=True)]
        if not all(agree):
            raise RuntimeError("as compiled here, the loss's kernels compute another loss than torch's operations")
