"""Cross-entropy and any number of losses between logits, computed in chunks of tokens.

Logits of a real vocabulary are the largest tensors of a step (8 x 1,024 tokens x 151,936 in float32: 5 GB per copy), so
they only exist for one chunk of tokens at a time. Within a chunk, the teacher's logits, their order and their knee are
computed once for all terms.

The gradient of a chunk is computed right after its loss and kept as the (small) gradient of the hidden states and of
the student's head, so the backward pass recomputes nothing. If a head's parameters only exist while its module runs
(ZeRO-3), the backward pass recomputes the chunk instead, and each head runs twice. Every run of such a head is also a
collective operation, so all ranks use as many chunks as the rank with the most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyllava_switchkd.distill.losses import LogitLoss
from tinyllava_switchkd.distill.losses.knee import Order

CHUNK_ELEMENTS = 2**26
"""Logits of one side per chunk: 441 tokens of Qwen2.5's vocabulary, 256 MiB in float32."""

CE = "ce"
"""Name of the cross-entropy, which every task has."""

RANKING = ("knee_teacher", "knee_student", "topk_overlap")
"""Additional numbers that a term can report if its loss ranks logits, see `LogitTerm.ranking`."""


class LogitTerm(NamedTuple):
    """A weighted loss between the logits of a pathway and the teacher's, at the same tokens.

    Attributes:
        name: name under which it is reported, unweighted.
        loss: called with (pathway's logits, teacher's logits), both [tokens, shared vocabulary]; returns [tokens].
        weight: factor of its mean in the training loss.
        pathway: "student" or "switch", whose logits are trained.
        tokens: "supervised" (positions that predict a supervised token) or "visual" (positions of visual tokens).
        title: for curves and documentation; the name if empty.
        ranking: also report the knees of both leaders and their overlap, if the loss ranks logits.
    """

    name: str
    loss: nn.Module
    weight: float = 1.0
    pathway: str = "student"
    tokens: str = "supervised"
    title: str = ""
    ranking: bool = False

    @property
    def per(self) -> str:
        """The unit of the term's mean."""
        return self.tokens

    @property
    def reports(self) -> tuple[str, ...]:
        """Names of the numbers that the term reports: its own, and those of `RANKING` if requested and possible."""
        return (self.name, *RANKING) if self.ranking and ranks(self.loss) else (self.name,)


def ranks(loss: nn.Module) -> TypeGuard[LogitLoss]:
    """Whether a loss ranks logits, so that each side can lead and has a knee."""
    return isinstance(loss, LogitLoss) and type(loss).order is not LogitLoss.order


class Tokens(NamedTuple):
    """Input of the heads: last hidden states of the same tokens in each pathway.

    Attributes:
        student: [tokens, student width].
        labels: [tokens] the tokens to predict; None without cross-entropy.
        teacher: [tokens, teacher width]; None without a teacher.
        switch: [first tokens, teacher width], tokens of samples with images, which come first; None without a switch.
    """

    student: Tensor
    labels: Tensor | None
    teacher: Tensor | None = None
    switch: Tensor | None = None


@dataclass
class TokenObjective:
    """Sum of cross-entropy and weighted logit terms over tokens.

    Attributes:
        student_head: student hidden states -> logits over the student's vocabulary.
        teacher_head: teacher hidden states -> logits over the teacher's; None for plain supervised training.
        terms: losses between logits.
        vocab_size: number of token ids that both vocabularies share, to which padded heads are cut.
        chunk_size: tokens per chunk; None means `CHUNK_ELEMENTS` / vocabulary.
        recompute: recompute chunks in the backward pass; None decides by the head's parameters.
    """

    student_head: nn.Module
    teacher_head: nn.Module | None = None
    terms: Sequence[LogitTerm] = ()
    vocab_size: int | None = None
    chunk_size: int | None = None
    recompute: bool | None = None

    def names(self, tokens: Tokens) -> tuple[str, ...]:
        """Names of the sums of `__call__`, in order."""
        return (*([CE] if tokens.labels is not None else []), *(name for term in self.terms for name in term.reports))

    def __call__(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The weighted loss (with gradient) and each of `names` unweighted (without), summed over all tokens."""
        trained = (self.student_head, *(term.loss for term in self.terms))
        parameters = list({p: None for module in trained for p in module.parameters() if p.requires_grad})
        size = self.chunk_size or max(64, CHUNK_ELEMENTS // self._head_rows())
        count = -(-len(tokens.student) // size)
        sharded = any(hasattr(p, "ds_id") for p in self.student_head.parameters())
        if sharded:
            count = max(1, _most_of_all_ranks(count, tokens.student.device))  # a rank's additional chunks are empty
        chunks = [slice(index * size, (index + 1) * size) for index in range(count)]
        if not chunks:
            # No tokens: a zero that depends on the same tensors as the other ranks' losses.
            inputs = [x for x in (tokens.student, tokens.switch, *parameters) if x is not None and x.requires_grad]
            zero = tokens.student.new_zeros((), dtype=torch.float32)
            return sum((x.sum() * 0.0 for x in inputs), zero), zero.new_zeros(len(self.names(tokens)))
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
        return _summed(results)

    def _head_rows(self) -> int:
        weight = getattr(self.student_head, "weight", None)
        rows = getattr(self.student_head, "out_features", None) or (weight.shape[0] if weight is not None else 0)
        return max(rows, self.vocab_size or 1)

    def _chunk(self, tokens: Tokens, chunk: slice, student: Tensor, switch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weighted loss and sums of one chunk; `student` and `switch` are its hidden states."""
        logits = self.student_head(student)  # [chunk, student vocab]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        sums = dict.fromkeys(self.names(tokens), logits.new_zeros(()))
        total = logits.new_zeros(())
        if tokens.labels is not None:
            total = sums[CE] = F.cross_entropy(logits, tokens.labels[chunk], reduction="sum")
        if self.terms:
            assert self.teacher_head is not None and tokens.teacher is not None
            with torch.no_grad():
                teacher = self.teacher_head(tokens.teacher[chunk])[:, : self.vocab_size].to(logits.dtype)
            comparison = _Comparison(teacher)
            sides = {"student": logits[:, : self.vocab_size]}
            for term in self.terms:
                if term.pathway == "switch" and "switch" not in sides:
                    if switch is None or not len(switch):  # no sample in this chunk has an image
                        continue
                    sides["switch"] = self.teacher_head(switch)[:, : self.vocab_size].to(logits.dtype)
                side = sides[term.pathway]
                sums[term.name], order = comparison.of(term.loss, side)
                total = total + term.weight * sums[term.name]
                if term.ranking and order is not None and ranks(term.loss):
                    sums |= zip(RANKING, comparison.ranking(term.loss, side, order), strict=True)
        return total, torch.stack([value.detach().to(logits.dtype) for value in sums.values()])


class _Comparison:
    """Losses of several terms against the same teacher logits [tokens, vocab], which are ranked once."""

    def __init__(self, teacher: Tensor) -> None:
        self._teacher = teacher
        self._orders: dict[nn.Module, Order | None] = {}

    def of(self, loss: nn.Module, side: Tensor) -> tuple[Tensor, Order | None]:
        """Sum of a loss over a side's tokens (the teacher's first ones), and the side's order if the loss has one."""
        teacher = self._teacher[: len(side)]
        if not isinstance(loss, LogitLoss):
            return loss(side, teacher).sum(), None
        theirs, ours = self._order(loss), loss.order(side)
        if theirs is not None and len(side) < len(self._teacher):
            theirs = type(theirs)(*(part[: len(side)] for part in theirs))
        return loss(side, teacher, student_order=ours, teacher_order=theirs).sum(), ours

    def ranking(self, loss: LogitLoss, side: Tensor, order: Order) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of `RANKING` over the tokens."""
        theirs = self._order(loss)
        assert theirs is not None, "the loss ranks"
        return theirs.k.sum(), order.k.sum(), _overlap(theirs, side, order)

    def _order(self, loss: LogitLoss) -> Order | None:
        if loss not in self._orders:
            self._orders[loss] = loss.order(self._teacher)
        return self._orders[loss]


class _GradientInForward(torch.autograd.Function):
    """Runs each chunk forward and backward at once, and keeps the gradients of hidden states and head parameters."""

    @staticmethod
    def forward(
        ctx,
        run_chunk: Callable[..., tuple[Tensor, Tensor]],
        tokens: Tokens,
        chunks: list[slice],
        student: Tensor,
        switch: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        hidden_grads = [torch.zeros_like(x) if x is not None and x.requires_grad else None for x in (student, switch)]
        # In bfloat16, a sum over chunks would be rounded at every addition.
        accumulate = [torch.promote_types(p.dtype, torch.float32) if len(chunks) > 1 else p.dtype for p in parameters]
        parameter_grads: list[Tensor | None] = [None] * len(parameters)
        results = []
        for chunk in chunks:
            with torch.enable_grad():
                leaves = [
                    None if x is None else x[chunk].detach().requires_grad_(x.requires_grad) for x in (student, switch)
                ]
                loss, chunk_parts = run_chunk(tokens, chunk, *leaves)
                wanted = [x for x in (*leaves, *parameters) if x is not None and x.requires_grad]
                grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else ())
            for out in hidden_grads:
                if out is not None and (grad := next(grads, None)) is not None:
                    out[chunk][: len(grad)] = grad
            for i, dtype in enumerate(accumulate):
                grad = next(grads, None)
                if grad is not None:
                    have = parameter_grads[i]
                    parameter_grads[i] = grad.to(dtype) if have is None else have.add_(grad)
            results.append((loss.detach(), chunk_parts))
        total, parts = _summed(results)
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
    """The largest count of all ranks; they would wait forever if they gathered a head different numbers of times."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _summed(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    losses, parts = zip(*results, strict=True)
    return sum(losses[1:], losses[0]), sum(parts[1:], parts[0])


def _rows(hidden: Tensor | None, chunk: slice) -> Tensor | None:
    return None if hidden is None else hidden[chunk]


def _overlap(teacher_order: Order, student_logits: Tensor, student_order: Order) -> Tensor:
    """Share of the teacher's leading tokens that are among the student's leading tokens, summed over tokens."""
    theirs = student_logits.detach().gather(1, teacher_order.indices)
    both = (theirs >= student_order.threshold[:, None].to(theirs.dtype)) & teacher_order.mask
    return (both.sum(1) / teacher_order.k).sum()
