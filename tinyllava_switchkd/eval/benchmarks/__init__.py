"""The benchmarks: one module each, registered by name. None of them imports torch."""

from tinyllava_switchkd.eval.benchmarks import gqa, mmbench, mme, mmmu, pope, scienceqa, textvqa, vizwiz, vqav2  # noqa: F401  # they register themselves
from tinyllava_switchkd.eval.benchmarks.base import (
    Answer,
    Benchmark,
    BenchmarkFactory,
    ExpectedFile,
    JudgeFactory,
    Option,
    Question,
    QuestionFileBenchmark,
    Reading,
    Score,
    answer_key,
    read_answers,
    register_benchmark,
    register_judge,
)

BENCHMARKS = ("mme", "mmbench", "mmbench_cn", "vqav2", "gqa", "scienceqa", "mmmu", "textvqa", "vizwiz", "pope")
"""The paper's ten, in the order of its tables."""


def names() -> list[str]:
    """All registered benchmarks, each once: the paper's in its order, then the others by name."""
    registered = {BenchmarkFactory(name).name for name in BenchmarkFactory.list()}
    return [*BENCHMARKS, *sorted(registered - set(BENCHMARKS))]


__all__ = [
    "BENCHMARKS",
    "Answer",
    "Benchmark",
    "BenchmarkFactory",
    "ExpectedFile",
    "JudgeFactory",
    "Option",
    "Question",
    "QuestionFileBenchmark",
    "Reading",
    "Score",
    "answer_key",
    "names",
    "read_answers",
    "register_benchmark",
    "register_judge",
]
