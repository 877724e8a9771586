"""Switch-KD: the student's own logits and the visual switch's, both against the teacher's (arXiv 2604.14629).

    loss = CE(z^S) + align_weight * DBiLD(z^T, z^S) + switch_weight * DBiLD(z^T, z^Switch)

z^Switch are the teacher's logits with the student's vision tower (Section 3.2, Figure 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyllava_switchkd.distill.methods.base import register_method, setting
from tinyllava_switchkd.distill.methods.logit_kd import LogitKD
from tinyllava_switchkd.distill.objective import LogitTerm


@register_method("switch_kd")
@dataclass
class SwitchKD(LogitKD):
    """Switch-KD (the default): DBiLD on the student's logits and on the visual switch's."""

    switch_weight: float = setting(1.0, "Weight of the loss on the visual switch's logits; 0 omits its pass.")

    @property
    def terms(self) -> list[LogitTerm]:
        switch = LogitTerm(
            "visual_switch", self.loss_module, self.switch_weight, pathway="switch", title="visual switch"
        )
        return [*super().terms, switch]

    @property
    def switch(self) -> bool:
        return self.switch_weight > 0
