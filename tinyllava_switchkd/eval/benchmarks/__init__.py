"""The ten benchmarks: one module each, registered by name, none of which imports torch."""

from .base import (
    Answer,
    Benchmark,
    BenchmarkFactory,
    NoGroundTruth,
    Question,
    QuestionFileBenchmark,
    Score,
    answer_key,
    read_answers,
    register_benchmark,
)
from .gqa import GQA
from .mmbench import MMBench, MMBenchCN
from .mme import MME
from .mmmu import MMMU
from .pope import POPE
from .scienceqa import ScienceQA
from .textvqa import TextVQA
from .vizwiz import VizWiz
from .vqav2 import VQAv2

BENCHMARKS = ("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "mme", "mmbench", "mmbench_cn", "pope", "mmmu")
"""The paper's ten, in the order of its tables."""

__all__ = [
    "BENCHMARKS",
    "GQA",
    "MME",
    "MMMU",
    "POPE",
    "Answer",
    "Benchmark",
    "BenchmarkFactory",
    "MMBench",
    "MMBenchCN",
    "NoGroundTruth",
    "Question",
    "QuestionFileBenchmark",
    "ScienceQA",
    "Score",
    "TextVQA",
    "VQAv2",
    "VizWiz",
    "answer_key",
    "read_answers",
    "register_benchmark",
]
