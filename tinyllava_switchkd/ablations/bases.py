"""Base models beyond the shipped three: a smaller tower for the bridge, a larger teacher for the sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tinyllava_switchkd.quickstart.bases import BasePlan, make_bases
from tinyllava_switchkd.quickstart.experiment import TOWER, Experiment

from .tables import Way

SMALL_TOWER, LARGER_TEACHER = "base-small-siglip", "larger-teacher"
WIDTHS = {SMALL_TOWER: 48, LARGER_TEACHER: 96}
PADDING = 32
"""Rows that the larger teacher's vocabulary has beyond the student's, as Qwen2.5-7B's beside 0.5B's."""


def make_bases_of(experiment: Experiment, ways: Iterable[Way], say: Callable[[str], object]) -> None:
    """Make the base models of some ways that are neither shipped nor made, as the shipped ones were made.

    Raises:
        StageError: one did not learn what bases have to know.
    """
    ways = list(ways)
    if any(way.tower == "small-tower" for way in ways):
        plan = BasePlan(towers=((SMALL_TOWER, WIDTHS[SMALL_TOWER]),), widths=())
        make_bases(experiment.root, plan, say)
    if any(way.distils and way.teacher == "larger-teacher" for way in ways):
        plan = BasePlan(towers=(), widths=((LARGER_TEACHER, WIDTHS[LARGER_TEACHER]),), padding=PADDING)
        make_bases(experiment.root, plan, say, experiment.base(TOWER))
