"""Builds LLaVA's evaluation folders from primary sources, and tells what a folder lacks.

``python -m tinyllava_switchkd.eval.prepare BENCH`` is the command; `PreparerFactory` the registry behind it.
"""

from . import mmbench, reasoning, vqa, yes_no  # noqa: F401  (registers the ten benchmarks)
from .base import ExpectedFile, Finding, Job, Preparer, PreparerFactory, check, register_preparer

__all__ = ["ExpectedFile", "Finding", "Job", "Preparer", "PreparerFactory", "check", "register_preparer"]
