"""Plain logit distillation: a loss between the student's and the teacher's logits at answer tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from tinyllava_switchkd.distill.methods.base import Method, make_loss, register_method, setting
from tinyllava_switchkd.distill.objective import LogitTerm


@register_method("logit_kd")
@dataclass
class LogitKD(Method):
    """Logit distillation: any registered loss on the student's own logits (Switch-KD's Table 4, "align only")."""

    loss: str = setting("dbild", "Loss between the logits of teacher and student.", flag="distill_loss")
    temperature: float = setting(3.0, "Temperature of the loss between logits.")
    align_weight: float = setting(1.0, "Weight of the loss on the student's own logits.")
    loss_settings: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def loss_module(self) -> nn.Module:
        return make_loss(self.loss, self.temperature, self.loss_settings)

    @property
    def terms(self) -> list[LogitTerm]:
        return [LogitTerm("align", self.loss_module, self.align_weight, title="align", ranking=True)]
