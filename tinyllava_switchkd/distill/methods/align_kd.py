"""Align-KD: first-layer attention of text, the projector's tokens, and the answers (arXiv 2412.01282, CVPR 2025).

    loss = CE + logits_weight * L_logits + features_weight * L_v + features_top_weight * L_top
              + attention_weight * L_attn

    L_logits   KL(student || teacher) over answer tokens, temperature 1
    L_v        MSE(f_v(v_T), v_S) over all visual tokens v after the connector; f_v linear, teacher's width -> student's
    L_top      the same over the `top` visual tokens of each image that the teacher's text attends to most in layer 1
    L_attn     MSE(f_a(A_T), A_S); A the first layer's attention after softmax, rows text, columns visual tokens; f_a
               maps the teacher's heads to the student's

f_a and f_v are trained with the student. This follows the paper. Its released code differs: its mask is transposed, so
that its attention term is the bias of f_a; it assumes visual tokens at positions 1 to 144; its ranking also counts
text; f_a and f_v are in no optimiser; and its logit term is forward KL over all positions. Means are over the step's
answer tokens (L_logits), images (L_v, L_top) and samples with images (L_attn).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyllava_switchkd.distill.losses import LossFactory
from tinyllava_switchkd.distill.methods.base import (
    DenseTerm,
    Method,
    Term,
    Views,
    register_method,
    same_visual_tokens,
    setting,
)
from tinyllava_switchkd.distill.objective import LogitTerm
from tinyllava_switchkd.distill.trace import Sight

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava


class HeadMap(nn.Module):
    """f_a: each head of the student as a weighted sum of the teacher's; initialised with the mean of a group of them.

    A 1 x 1 convolution over heads. It has no bias, so that the attention of text before the image stays zero.
    """

    def __init__(self, teacher_heads: int, student_heads: int) -> None:
        super().__init__()
        self.teacher_heads, self.student_heads = teacher_heads, student_heads
        group = torch.arange(teacher_heads) * student_heads // teacher_heads
        start = F.one_hot(group, student_heads).t().float()  # [student heads, teacher heads]
        if student_heads > teacher_heads:
            start = F.one_hot(torch.arange(student_heads) * teacher_heads // student_heads, teacher_heads).float()
        self.weight = nn.Parameter((start / start.sum(1, keepdim=True)).contiguous())  # DeepSpeed views its bytes

    def forward(self, attention: Tensor) -> Tensor:
        """[teacher heads, entries] -> [student heads, entries]."""
        return self.weight.to(attention.dtype) @ attention


@register_method("align_kd")
@dataclass
class AlignKD(Method):
    """Align-KD: first-layer attention of text to visual tokens, projector features, reverse KL on answers."""

    logits_weight: float = setting(1.0, "Weight of reverse KL on answer tokens.")
    features_weight: float = setting(1.0, "Weight of the loss on all of the projector's tokens.")
    features_top_weight: float = setting(1.0, "Weight of the loss on the projector's tokens with the most attention.")
    attention_weight: float = setting(1.0, "Weight of the loss on first-layer attention of text to visual tokens.")
    top: int = setting(16, "Number of visual tokens per image with the most attention; all if it has fewer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise ValueError(f"top must be at least 1 visual token, not {self.top}.")

    @property
    def student_sight(self) -> Sight:
        features = self.features_weight > 0 or self.features_top_weight > 0
        return Sight(projected=features, attention=(0,) if self.attention_weight else ())

    @property
    def teacher_sight(self) -> Sight:
        return self.student_sight | Sight(attention=(0,) if self.features_top_weight else ())

    @property
    def terms(self) -> list[Term]:
        logits = LogitTerm(
            "logits", LossFactory("rkl")(temperature=1.0), self.logits_weight, title="answers (reverse KL)"
        )
        dense = (
            DenseTerm("features", self._features, self.features_weight, per="images", title="projector tokens"),
            DenseTerm(
                "features_top", self._features_top, self.features_top_weight, per="images", title="attended tokens"
            ),
            DenseTerm("attention", self._attention, self.attention_weight, title="first-layer attention"),
        )
        return [logits, *(term for term in dense if term.weight)]

    def check(self, student: TinyLlava, teacher: TinyLlava) -> None:
        if self.features_weight or self.features_top_weight or self.attention_weight:
            same_visual_tokens(
                self.name, student, teacher, "--features_weight 0 --features_top_weight 0 --attention_weight 0"
            )

    def adapters(self, student: TinyLlava, teacher: TinyLlava) -> Mapping[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        if self.attention_weight:
            theirs, ours = (model.config.text_config.num_attention_heads for model in (teacher, student))
            found["attention_heads"] = HeadMap(theirs, ours)
        if self.features_weight or self.features_top_weight:
            widths = (model.config.hidden_size for model in (teacher, student))
            found["features"] = nn.Linear(*widths)
        return found

    def _mapped(self, views: Views) -> Tensor:
        """f_v(v_T) [images, visual tokens, student width]."""
        adapter = views.adapters["features"]
        return adapter(views.teacher.projected.to(next(adapter.parameters()).dtype))

    def _features(self, views: Views) -> Tensor:
        ours = views.student.projected
        return _squared(self._mapped(views), ours).mean((1, 2)).sum()

    def _features_top(self, views: Views) -> Tensor:
        error = _squared(self._mapped(views), views.student.projected).mean(-1)  # [images, visual tokens]
        images, tokens = error.shape
        if not images:
            return error.sum()
        received = torch.cat([attention.mean(0).sum(0) for attention in views.teacher.attention[0]])
        chosen = received.view(images, tokens).topk(min(self.top, tokens), dim=1).indices
        return error.gather(1, chosen).mean(1).sum()

    def _attention(self, views: Views) -> Tensor:
        adapter, hidden = views.adapters["attention_heads"], views.student.hidden
        assert isinstance(adapter, HeadMap)
        theirs, ours = views.teacher.attention[0], views.student.attention[0]
        nothing = hidden.new_zeros(1, 0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        # A single call for any number of samples, because under ZeRO-3 all ranks must call a module equally often.
        mapped = adapter(torch.cat([nothing.expand(adapter.teacher_heads, 0), *(one.flatten(1) for one in theirs)], 1))
        wanted = torch.cat([nothing.expand(adapter.student_heads, 0), *(one.flatten(1) for one in ours)], 1)
        error = _squared(mapped, wanted).mean(0)  # [entries of all samples' maps]
        means = [part.mean() for part in error.split([one[0].numel() for one in ours])]
        return sum(means, error.sum() * 0 + hidden.sum() * 0)


def _squared(ours: Tensor, theirs: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
    return (ours.to(dtype) - theirs.to(dtype)).square()
