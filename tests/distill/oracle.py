"""Slow, literal definitions: Switch-KD (Eq. 4-9) with every pair enumerated and every list sorted, and the losses over
the vocabulary with every probability in a loop. float64 only."""

from __future__ import annotations

import math

import torch


def knee(z: torch.Tensor, window: int = 0, temperature: float | None = None) -> int:
    values = z.sort(descending=True).values[: window or None]
    if temperature is not None:
        values = (values / temperature).softmax(0)
    n = len(values)
    low, high = float(values[-1]), float(values[0])
    if low == high:
        return 2
    best, best_height = 0, -float("inf")
    for i in range(1, n + 1):
        height = (1 - i / n) - (float(values[i - 1]) - low) / (high - low)
        if height > best_height:
            best, best_height = i, height
    return max(best, 2)


def pair_kl(student: torch.Tensor, teacher: torch.Tensor, tau: float, reverse: bool) -> torch.Tensor:
    """Both sides [k] in leader order."""
    m, n = torch.triu_indices(len(student), len(student), offset=1)
    q = ((student[m] - student[n]) / tau).log_softmax(0)
    p = ((teacher[m] - teacher[n]) / tau).log_softmax(0)
    if not reverse:
        q, p = p, q
    return (q.exp() * (q - p)).sum()


def row_kl(student: torch.Tensor, teacher: torch.Tensor, tau: float, reverse: bool) -> torch.Tensor:
    """Mean over m of the KL between the softmaxes over the differences m, n with n > m."""
    total, k = 0.0, len(student)
    for m in range(k - 1):
        q = ((student[m] - student[m + 1 :]) / tau).log_softmax(0)
        p = ((teacher[m] - teacher[m + 1 :]) / tau).log_softmax(0)
        if not reverse:
            q, p = p, q
        total = total + (q.exp() * (q - p)).sum()
    return total / (k - 1)


def logit_difference_loss(
    student, teacher, tau: float, reverse: bool, top_k: int | None = None, window: int = 0, on_softmax=False, kl=pair_kl
) -> torch.Tensor:
    """[tokens, vocab] logits -> [tokens]; teacher-led plus student-led."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for leader in (t, s):
            leader = leader.detach()
            k = min(top_k, len(leader)) if top_k else knee(leader, window, tau if on_softmax else None)
            indices = leader.argsort(descending=True, stable=True)[:k]
            total = total + kl(s[indices], t[indices], tau, reverse)
        losses.append(total)
    return torch.stack(losses)


def probabilities(z: torch.Tensor, tau: float) -> list[float]:
    exponentials = [math.exp((float(x) - float(z.max())) / tau) for x in z]
    return [x / sum(exponentials) for x in exponentials]


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mixture(a: list[float], b: list[float], share: float) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def vocabulary_loss(name: str, student: torch.Tensor, teacher: torch.Tensor, tau: float, share: float) -> float:
    """One token's loss; `share` is alpha or beta."""
    q, p = probabilities(student, tau), probabilities(teacher, tau)
    m = mixture(p, q, share)
    return {
        "fkl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "jsd": lambda: share * kl(p, m) + (1 - share) * kl(q, m),
        "skew_fkl": lambda: kl(p, m),
        "skew_rkl": lambda: kl(q, mixture(q, p, share)),
        "tvd": lambda: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
    }[name]()
