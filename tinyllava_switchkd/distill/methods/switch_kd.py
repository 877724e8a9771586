"""Switch-KD: the student's own logits and the visual switch's, both against the teacher's (arXiv 2604.14629).

    loss = CE(z^S) + align_weight * DBiLD(z^T, z^S) + switch_weight * DBiLD(z^T, z^Switch)

z^Switch are the teacher's logits when it sees through the student's vision tower (Section 3.2, Figure 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from ..objective import LogitTerm
from .base import Method, make_loss, register_method, setting


@register_method("switch_kd")
@dataclass
class SwitchKD(Method):
    """Switch-KD (the default): DBiLD on the student's logits and on the visual switch's."""

    loss: str = setting("dbild", "Loss between the logits of teacher and student.", flag="distill_loss")
    temperature: float = setting(3.0, "Temperature of the loss between logits.")
    align_weight: float = setting(1.0, "Weight of the loss on the student's own logits.")
    switch_weight: float = setting(1.0, "Weight of the loss on the visual switch's logits; 0 leaves its pass out.")
    loss_settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def loss_module(self) -> nn.Module:
        return make_loss(self.loss, self.temperature, self.loss_settings)

    @property
    def terms(self) -> list[LogitTerm]:
        align = LogitTerm("align", self.loss_module, self.align_weight, title="align", ranking=True)
        switch = LogitTerm(
            "visual_switch", self.loss_module, self.switch_weight, pathway="switch", title="visual switch"
        )
        return [align, switch]

    @property
    def switch(self) -> bool:
        return self.switch_weight > 0
