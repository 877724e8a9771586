"""Amount of training on real pretrained weights: steps and sizes that fit into the available time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tinyllava_switchkd.io import read_json, write_json

RESULTS = "real_weights.json"

HUB = {
    "teacher": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "student": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "tower": "google/siglip-base-patch16-224",
}
"""Models on the hub."""


class OutOfTimeError(RuntimeError):
    """The minutes are used up."""


@dataclass(frozen=True)
class Plan:
    """Steps of each stage, and all other settings on which the results depend.

    Attributes:
        student_layers: number of the language model's layers that a student keeps; None for all.
        held_out: held-out pictures per kind.
        turns: largest number of turns in a training sample.
        converge: validation ends a stage; the steps are an upper limit.
    """

    teacher_pt_steps: int = 24
    teacher_steps: int = 48
    student_pt_steps: int = 24
    student_steps: int = 48
    adapt_steps: int = 12
    batch_size: int = 4
    image_size: int = 84
    student_layers: int | None = 11
    held_out: int = 8
    turns: int = 2
    converge: bool = False

    @classmethod
    def within(cls, minutes: float, seeds: int) -> Plan:
        """The plan whose steps fit into `minutes` on one core, after the time that does not depend on steps."""
        whole = cls()
        steps, rest = whole.seconds(seeds)
        factor = (60 * minutes - rest) / steps
        names = [field.name for field in dataclasses.fields(cls) if field.name.endswith("steps")]
        return dataclasses.replace(whole, **{name: max(2, round(factor * getattr(whole, name))) for name in names})

    def seconds(self, seeds: int) -> tuple[float, float]:
        """Approximate seconds on one core of all steps, and of everything else, from `SECONDS`."""
        steps = self.teacher_pt_steps * SECONDS["teacher_pt"]
        steps += (self.teacher_steps + self.adapt_steps) * SECONDS["teacher"]
        steps += seeds * self.student_pt_steps * SECONDS["student_pt"]
        steps += seeds * self.student_steps * (SECONDS["sft"] + SECONDS["switch_kd"])
        return steps, 2 * seeds * SECONDS["scores"] + SECONDS["teacher_scores"] + 9 * SECONDS["terms"]


SECONDS = {
    "teacher_pt": 2.0,
    "teacher": 5.0,
    "student_pt": 1.1,
    "sft": 2.9,
    "switch_kd": 6.5,
    "scores": 60.0,
    "teacher_scores": 120.0,
    "terms": 40.0,
}
"""Seconds on one core: a step of four pictures, scoring a checkpoint, comparing terms at one temperature."""

UNTIL_CONVERGED = Plan(
    *(400, 2000, 400, 2000, 400),
    batch_size=16,
    image_size=224,
    student_layers=None,
    held_out=12,
    turns=4,
    converge=True,
)
"""The plan for a GPU."""


def plan_of(root: Path, wanted: Plan, hub: bool) -> Plan:
    """The plan stored in a folder, or else `wanted`: a second call must not change the plan of the first."""
    file = root / "plan.json"
    if not file.is_file():
        wanted = dataclasses.replace(wanted, student_layers=None) if hub else wanted
        write_json(file, dataclasses.asdict(wanted))
    return Plan(**read_json(file))
