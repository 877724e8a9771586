"""LLaVA-KD: answers, visual tokens and the relations between visual tokens (arXiv 2410.16236, ICCV 2025).

    loss = CE + response_weight * L_res + visual_weight * L_vis + relation_weight * L_rel

    L_res   KL(teacher || student) over answer tokens
    L_vis   KL(teacher || student) at the positions of visual tokens, not shifted because these predict nothing
    L_rel   1 - cos(vec(R_S), vec(R_T)), R = Y Y^T, Y the logits [visual tokens, vocabulary] of one sample

All at temperature 1 over the shared vocabulary. The weights 1, 1, 0.5 are the paper's; its released trainer (first
commit of the public training code) adds all terms with weight 1. Its batches have one sample. Here L_res is a mean over
the step's answer tokens, L_vis over its visual tokens, and L_rel over its samples with images. Samples without images
only have cross-entropy and L_res. A sample with several images has one R of all their tokens.
"""

from __future__ import annotations

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


@register_method("llava_kd")
@dataclass
class LLaVAKD(Method):
    """LLaVA-KD: forward KL on answers and on visual tokens, and the relations between visual tokens."""

    response_weight: float = setting(1.0, "Weight of forward KL on answer tokens.")
    visual_weight: float = setting(1.0, "Weight of forward KL on visual tokens; 0 omits their logits.")
    relation_weight: float = setting(0.5, "Weight of 1 - cosine of the visual tokens' relations; 0 omits them.")

    @property
    def student_sight(self) -> Sight:
        return Sight(visual=self.visual_weight > 0 or self.relation_weight > 0)

    @property
    def terms(self) -> list[Term]:
        kl = LossFactory("fkl")(temperature=1.0)
        terms: list[Term] = [LogitTerm("response", kl, self.response_weight, title="response (forward KL)")]
        if self.visual_weight:
            terms.append(LogitTerm("visual", kl, self.visual_weight, tokens="visual", title="visual (forward KL)"))
        if self.relation_weight:
            terms.append(DenseTerm("relation", relation, self.relation_weight, title="relation of visual tokens"))
        return terms

    def check(self, student: TinyLlava, teacher: TinyLlava) -> None:
        if self.student_sight.visual:
            same_visual_tokens(self.name, student, teacher, "--visual_weight 0 --relation_weight 0")


def relation(views: Views) -> Tensor:
    """Sum over samples with images of 1 - cos(vec(R_S), vec(R_T)); R is computed by `gram`, without logits."""
    student, teacher = views.student, views.teacher
    ours = gram(views.student_head, views.vocab_size)
    theirs = views.kept.get("gram")
    if theirs is None or (theirs.device, theirs.dtype) != (teacher.visual.device, ours.dtype):
        with torch.no_grad():
            theirs = views.kept["gram"] = gram(views.teacher_head, views.vocab_size).to(ours.dtype)
    total = student.visual.new_zeros((), dtype=ours.dtype) + ours.sum() * 0 + student.visual.sum() * 0
    for sample in student.sample_of_visual.unique().tolist():
        mine = related(student.visual[student.sample_of_visual == sample], ours)
        other = related(teacher.visual[teacher.sample_of_visual == sample], theirs)
        total = total + 1 - F.cosine_similarity(mine.flatten(), other.flatten(), dim=0)
    return total


def gram(head: nn.Linear, vocab_size: int) -> Tensor:
    """W^T W of an output head over the shared vocabulary; with a bias b, of [W, b].

    Y Y^T = [H, 1] [W, b]^T [W, b] [H, 1]^T for logits Y = H W^T + b, so a matrix of the hidden states' width replaces
    the whole vocabulary.

    Returns:
        [width, width], or [width + 1, width + 1] with a bias; at least float32; with gradient if the head is trained.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    if hasattr(weight, "ds_id"):
        # Under ZeRO-3 weights exist only while their module runs. It maps rows of the identity to columns of W, plus b.
        width = head.in_features
        bias = None if bias is None else head(weight.new_zeros(1, width))[0]
        columns = head(torch.eye(width, dtype=weight.dtype, device=weight.device))
        weight = (columns if bias is None else columns - bias).t()
    weight = weight[:vocab_size]
    if bias is not None:
        weight = torch.cat([weight, bias[:vocab_size, None]], dim=1)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.t() @ weight


def related(hidden: Tensor, gram: Tensor) -> Tensor:
    """Y Y^T [tokens, tokens] of hidden states [tokens, width] and their head's `gram`."""
    hidden = hidden.to(gram.dtype)
    if len(gram) > hidden.shape[1]:
        hidden = F.pad(hidden, (0, 1), value=1.0)
    return hidden @ gram @ hidden.t()
