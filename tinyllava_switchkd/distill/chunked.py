"""One pass over the supervised tokens in chunks: heads, cross-entropy and both distillation terms.

Logits of a real vocabulary are the largest tensors of a step (8 x 1,024 tokens x 151,936 in float32: 5 GB a copy), so
they never exist for more than one chunk of supervised tokens. Inside a chunk the teacher's logits, their order and
their knee are computed once and serve the align and the visual-switch term.

The gradient of a chunk is taken as soon as its loss is known and kept as the (small) gradient of the hidden states and
of the student's head; nothing is recomputed in the backward pass. Where a head's parameters exist only while its own
module runs (ZeRO-3), the chunk is recomputed in the backward pass instead, which costs each head a second time. There
every run of a head is a collective operation, too, so all ranks make as many chunks as the one with the most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .losses import LogitLoss

CHUNK_ELEMENTS = 2**26
"""Logits of one side in one chunk: 441 tokens of Qwen2.5's vocabulary, 256 MiB in float32."""

PARTS = ("ce", "align", "visual_switch", "knee_teacher", "knee_student", "topk_overlap")
"""Sums over tokens that a chunk reports, in order."""


@dataclass
class SupervisedTokens:
    """What reaches the heads: hidden states of the positions that predict a supervised token.

    Tokens of samples with images come first; `switch` covers exactly these.

    Attributes:
        student: [tokens, student width].
        labels: [tokens].
        teacher: [tokens, teacher width], or None without a teacher.
        switch: [tokens of samples with images, teacher width], or None without a switch pass.
    """

    student: Tensor
    labels: Tensor
    teacher: Tensor | None = None
    switch: Tensor | None = None


@dataclass
class TokenLoss:
    """The objective of one chunk of tokens, summed: CE + align_weight * align + switch_weight * visual_switch.

    Attributes:
        student_head: student hidden states -> logits over the student's vocabulary.
        teacher_head: teacher hidden states -> logits over the teacher's; None for plain supervised training.
        loss: the distillation loss between logits.
        vocab_size: tokens that both vocabularies share; padded heads differ in length and are cut to it.
        chunk_size: tokens a chunk; None takes `CHUNK_ELEMENTS` / vocabulary.
        recompute: recompute chunks in the backward pass; None decides by the head's parameters.
    """

    student_head: nn.Module
    teacher_head: nn.Module | None = None
    loss: LogitLoss | None = None
    vocab_size: int | None = None
    align_weight: float = 1.0
    switch_weight: float = 1.0
    chunk_size: int | None = None
    recompute: bool | None = None
    _orders: bool = field(init=False)

    def __post_init__(self) -> None:
        self._orders = isinstance(self.loss, LogitLoss)

    def __call__(self, tokens: SupervisedTokens) -> tuple[Tensor, Tensor]:
        """Weighted loss (with gradient) and the `PARTS` (without), summed over all tokens."""
        parameters = [p for p in self.student_head.parameters() if p.requires_grad]
        size = self.chunk_size or max(64, CHUNK_ELEMENTS // self._head_rows())
        count = -(-len(tokens.labels) // size)
        sharded = any(hasattr(p, "ds_id") for p in self.student_head.parameters())
        if sharded:
            count = max(1, _most_of_all_ranks(count, tokens.labels.device))  # those beyond a rank's tokens are empty
        chunks = [slice(index * size, (index + 1) * size) for index in range(count)]
        if not chunks:
            # Nothing supervised: a zero that depends on whatever the other ranks' losses depend on.
            inputs = [x for x in (tokens.student, tokens.switch, *parameters) if x is not None and x.requires_grad]
            zero = tokens.student.new_zeros((), dtype=torch.float32)
            return sum((x.sum() * 0.0 for x in inputs), zero), tokens.student.new_zeros(len(PARTS)).float()
        recompute = sharded and bool(parameters) if self.recompute is None else self.recompute
        if not torch.is_grad_enabled():
            results = [
                self._chunk(tokens, chunk, tokens.student[chunk], _rows(tokens.switch, chunk)) for chunk in chunks
            ]
        elif recompute:
            results = [
                checkpoint(
                    self._chunk, tokens, chunk, tokens.student[chunk], _rows(tokens.switch, chunk), use_reentrant=False
                )
                for chunk in chunks
            ]
        else:
            return _GradientInForward.apply(self._chunk, tokens, chunks, tokens.student, tokens.switch, *parameters)
        return sum(loss for loss, _ in results), sum(parts for _, parts in results)

    def _head_rows(self) -> int:
        weight = getattr(self.student_head, "weight", None)
        rows = getattr(self.student_head, "out_features", None) or (weight.shape[0] if weight is not None else 0)
        return max(rows, self.vocab_size or 1)

    def _chunk(
        self, tokens: SupervisedTokens, chunk: slice, student: Tensor, switch: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss and parts of one chunk; `student` and `switch` are its hidden states."""
        logits = self.student_head(student)  # [chunk, student vocab]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        parts = dict.fromkeys(PARTS, logits.new_zeros(()))
        total = parts["ce"] = F.cross_entropy(logits, tokens.labels[chunk], reduction="sum")
        if self.teacher_head is not None:
            with torch.no_grad():
                teacher = self.teacher_head(tokens.teacher[chunk])[:, : self.vocab_size].to(logits.dtype)
            order = self.loss.order(teacher) if self._orders else None
            align, led = self._compare(logits[:, : self.vocab_size], teacher, order)
            total = total + self.align_weight * align
            parts["align"] = align
            if order is not None:
                parts["knee_teacher"], parts["knee_student"] = order.k.sum(), led.k.sum()
                parts["topk_overlap"] = _overlap(order, logits, led)
            if switch is not None and len(switch):
                images = len(switch)
                switched = self.teacher_head(switch)[:, : self.vocab_size].to(logits.dtype)
                first = None if order is None else type(order)(*(part[:images] for part in order))
                parts["visual_switch"], _ = self._compare(switched, teacher[:images], first)
                total = total + self.switch_weight * parts["visual_switch"]
        return total, torch.stack([parts[name].detach().float() for name in PARTS])

    def _compare(self, student, teacher, teacher_order):
        if not self._orders:
            return self.loss(student, teacher).sum(), None
        student_order = self.loss.order(student)
        values = self.loss(student, teacher, student_order=student_order, teacher_order=teacher_order)
        return values.sum(), student_order


class _GradientInForward(torch.autograd.Function):
    """Runs chunks forward and backward at once, keeping gradients of hidden states and head parameters."""

    @staticmethod
    def forward(
        ctx,
        run_chunk: Callable[..., tuple[Tensor, Tensor]],
        tokens: SupervisedTokens,
        chunks: list[slice],
        student: Tensor,
        switch: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs = [x is not None and x.requires_grad for x in (student, switch)]
        hidden_grads = [torch.zeros_like(x) if need else None for x, need in zip((student, switch), needs, strict=True)]
        # Sums over chunks would round in bfloat16 at every step.
        accumulate = [torch.promote_types(p.dtype, torch.float32) if len(chunks) > 1 else p.dtype for p in parameters]
        parameter_grads: list[Tensor | None] = [None] * len(parameters)
        total = parts = 0.0
        for chunk in chunks:
            with torch.enable_grad():
                leaves = [
                    _rows(x, chunk).detach().requires_grad_(need) if x is not None else None
                    for x, need in zip((student, switch), needs, strict=True)
                ]
                loss, chunk_parts = run_chunk(tokens, chunk, *leaves)
                wanted = [x for x in (*leaves, *parameters) if x is not None and x.requires_grad]
                grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ())
            for leaf, out in zip(leaves, hidden_grads, strict=True):
                grad = next(grads) if out is not None else None
                if grad is not None:
                    out[chunk][: len(leaf)] = grad
            for i, dtype in enumerate(accumulate):
                grad = next(grads)
                if grad is not None:
                    have = parameter_grads[i]
                    parameter_grads[i] = grad.to(dtype) if have is None else have.add_(grad)
            total, parts = total + loss.detach(), parts + chunk_parts
        ctx.dtypes = [None if x is None else x.dtype for x in (student, switch, *parameters)]
        ctx.save_for_backward(*hidden_grads, *parameter_grads)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total: Tensor, _grad_parts: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if grad is None else (grad * grad_total).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, None, *grads


def _most_of_all_ranks(count: int, device: torch.device) -> int:
    """The largest of the ranks' counts; ranks that gather a head a different number of times wait forever."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _rows(hidden: Tensor | None, chunk: slice) -> Tensor | None:
    return None if hidden is None else hidden[chunk]


def _overlap(teacher_order, student_logits: Tensor, student_order) -> Tensor:
    """Share of the teacher's leading tokens that are among the student's leading tokens too, summed over tokens."""
    theirs = student_logits.detach().gather(1, teacher_order.indices)
    both = (theirs >= student_order.threshold[:, None].to(theirs.dtype)) & teacher_order.mask
    return (both.sum(1) / teacher_order.k).sum()
