"""How much is trained on real pretrained weights: steps, sizes, and what fits into the time."""

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
"""Models by name, where the hub is reached."""


class OutOfTimeError(RuntimeError):
    """The minutes are used up."""


@dataclass(frozen=True)
class Plan:
    """Steps of each stage, and what else decides the numbers.

    Attributes:
        student_layers: how many of the language model's layers a student keeps; None for all.
        held_out: held-out pictures of every kind.
        turns: of a training sample, at most.
        converge: steps are the most that are made; validation ends a stage.
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
        """As many steps as `minutes` of one core bear, what does not depend on steps counted first."""
        whole = cls()
        steps, rest = whole.seconds(seeds)
        factor = (60 * minutes - rest) / steps
        names = [field.name for field in dataclasses.fields(cls) if field.name.endswith("steps")]
        return dataclasses.replace(whole, **{name: max(2, round(factor * getattr(whole, name))) for name in names})

    def seconds(self, seeds: int) -> tuple[float, float]:
        """Seconds of one core that all steps take about, and all the rest, by `SECONDS`."""
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
"""Seconds of one core: of a step of four pictures, of scoring a checkpoint, of comparing terms at one temperature."""

UNTIL_CONVERGED = Plan(
    *(400, 2000, 400, 2000, 400),
    batch_size=16,
    image_size=224,
    student_layers=None,
    held_out=12,
    turns=4,
    converge=True,
)
"""Where there is a GPU."""


def plan_of(root: Path, wanted: Plan, hub: bool) -> Plan:
    """The plan that a folder began with, else `wanted`: a second call must not change what the first has trained."""
    file = root / "plan.json"
    if not file.is_file():
        wanted = dataclasses.replace(wanted, student_layers=None) if hub else wanted
        write_json(file, dataclasses.asdict(wanted))
    return Plan(**read_json(file))
