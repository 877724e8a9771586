"""Slow, literal definitions from Switch-KD (Eq. 4-9): every pair enumerated, every list sorted. float64 only."""

from __future__ import annotations

import torch


def knee(z: torch.Tensor) -> int:
    values = z.sort(descending=True).values
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


def logit_difference_loss(student, teacher, tau: float, reverse: bool, top_k: int | None = None) -> torch.Tensor:
    """[tokens, vocab] logits -> [tokens]; teacher-led plus student-led."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for leader in (t, s):
            leader = leader.detach()
            k = min(top_k, len(leader)) if top_k else knee(leader)
            indices = leader.argsort(descending=True, stable=True)[:k]
            total = total + pair_kl(s[indices], t[indices], tau, reverse)
        losses.append(total)
    return torch.stack(losses)
