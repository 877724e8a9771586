"""Base models beyond the shipped three: a smaller tower, a larger teacher, and sets from other random weights."""

from __future__ import annotations

import copy
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


def with_bases_of(experiment: Experiment, seed: int) -> Experiment:
    """The same experiment in a folder of a seed's own, with whatever base models `make_bases_anew` left there."""
    own = copy.copy(experiment)
    own.root = experiment.root / f"bases{seed}"
    return own


def make_bases_anew(experiment: Experiment, seed: int, say: Callable[[str], object]) -> None:
    """Make all three base models from random weights that no other seed begins with, nor the shipped ones did.

    Raises:
        StageError: one did not learn what bases have to know.
    """
    make_bases(with_bases_of(experiment, seed).root, BasePlan(first_start=seed * BasePlan.starts), say)
