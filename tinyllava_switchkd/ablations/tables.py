"""The runs of each table. A run in several tables is defined once here, and trained once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

Flags = Mapping[str, object]

ALIGN: Flags = {"distill_method": "logit_kd", "distill_loss": "dbild", "temperature": 3.0, "align_weight": 1.0}
"""Align only: the paper's loss on the student's logits, without the switch."""
SWITCH: Flags = {
    "distill_method": "switch_kd",
    "distill_loss": "dbild",
    "temperature": 3.0,
    "align_weight": 1.0,
    "switch_weight": 1.0,
}
"""Switch-KD with the paper's settings (Section 4.1)."""


@dataclass(frozen=True)
class Way:
    """A way of training a student: pre-training, then fine-tuning, each with or without distillation.

    Attributes:
        key: its name in files and folders.
        label: its name in tables.
        tuning: flags of distillation in fine-tuning (DFT); None for SFT.
        pretraining: flags of distillation in pre-training (DPT); None for PT.
        teacher, student, tower: names of models, see `toy.MODELS` and `paper.MODELS`.
        settings: other flags of fine-tuning, such as a learning rate.
        anew: whether each seed has its own base models and teacher.
    """

    key: str
    label: str
    tuning: Flags | None = None
    pretraining: Flags | None = None
    teacher: str = "teacher"
    student: str = "student"
    tower: str = "tower"
    settings: Flags = field(default_factory=dict)
    anew: bool = False

    @property
    def distils(self) -> bool:
        return self.tuning is not None or self.pretraining is not None

    @property
    def pair(self) -> tuple[str, str]:
        """The student's language model and tower; a row is compared with SFT of the same pair."""
        return self.student, self.tower


def _loss(name: str, label: str) -> Way:
    return Way(name, label, {**ALIGN, "distill_loss": name})


def _knee(key: str, label: str, **settings: object) -> Way:
    return Way(key, label, {**SWITCH, **settings})


WINDOW = 32
"""`knee_window` looks for the knee among this many largest logits; the quickstart's vocabulary has about 300 tokens."""

WAYS = {
    way.key: way
    for way in (
        Way("sft", "SFT"),
        Way("align", "align only (DBiLD-RKL)", ALIGN),
        Way("switch_kd", "Switch-KD", SWITCH),
        _loss("fkl", "FKL"),
        _loss("rkl", "RKL"),
        _loss("bild_fkl", "BiLD-FKL"),
        _loss("bild_rkl", "BiLD-RKL"),
        _loss("dbild_fkl", "DBiLD-FKL"),
        Way("dpt_sft", "DPT-SFT", None, ALIGN),
        Way("dpt_dft", "DPT-DFT", ALIGN, ALIGN),
        _knee("knee_window", f"knee in the top {WINDOW}", knee_window=WINDOW),
        _knee("knee_probabilities", "knee on probabilities", knee_on="probabilities"),
        _knee("row_pairs", "softmax by row", pairs="row"),
        Way("logit_kd", "logit KD (FKL, tau 1)", {**ALIGN, "distill_loss": "fkl", "temperature": 1.0}),
        Way("llava_kd", "LLaVA-KD", {"distill_method": "llava_kd"}),
        Way("align_kd", "Align-KD", {"distill_method": "align_kd"}),
        Way("bridge_sft", "SFT", tower="small-tower"),
        Way("bridge_align", "align only", ALIGN, tower="small-tower"),
        Way("bridge_switch", "switch through the bridge", SWITCH, tower="small-tower"),
        Way("anew_sft", "SFT", anew=True),
        Way("anew_align", "align only", ALIGN, anew=True),
        Way("anew_switch", "Switch-KD", SWITCH, anew=True),
        Way("larger_teacher", "Switch-KD, larger teacher", SWITCH, teacher="larger-teacher"),
        Way("larger_sft", "SFT, larger student", student="larger-student"),
        Way("larger_student", "Switch-KD, larger student", SWITCH, student="larger-student"),
        Way("larger_both", "Switch-KD, both larger", SWITCH, teacher="larger-teacher", student="larger-student"),
    )
}


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        key: its name on the command line.
        title: its title.
        ways: its rows in order, including SFT for each student.
        columns: logged measures shown in addition to score, time and memory.
        labels: row -> its name in this table, if it differs from the way's label.
        memory: whether peak memory is measured.
        tuned: whether learning rate and weights are chosen by the search.
        ours: the row with which the others are compared, in addition to SFT.
    """

    key: str
    title: str
    ways: tuple[str, ...]
    columns: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    memory: bool = False
    tuned: bool = False
    ours: str = ""

    @property
    def script(self) -> str:
        """The script in scripts/train that makes this table."""
        return "compare_methods.sh" if self.key == "methods" else f"ablate_{self.key}.sh"

    def label(self, key: str) -> str:
        return self.labels.get(key, WAYS[key].label)

    def reference(self, key: str) -> str:
        """The row that is subtracted from a row: plain SFT of the same student."""
        same = [other for other in self.ways if WAYS[other].pair == WAYS[key].pair]
        return next(other for other in same if not WAYS[other].distils)


KNEE_MEASURES = ("knee_teacher", "knee_student", "topk_overlap")

TABLES = {
    table.key: table
    for table in (
        Table(
            "methods",
            "Comparison of methods",
            ("sft", "logit_kd", "llava_kd", "align_kd", "switch_kd"),
            memory=True,
            tuned=True,
            ours="switch_kd",
        ),
        Table(
            "losses",
            "Losses between the student's logits and the teacher's",
            ("sft", "fkl", "rkl", "bild_fkl", "bild_rkl", "dbild_fkl", "align"),
            labels={"align": "DBiLD-RKL"},
            ours="align",
        ),
        Table(
            "switch",
            "With and without the visual switch",
            ("sft", "align", "switch_kd"),
            labels={"sft": "PT-SFT", "align": "without the switch", "switch_kd": "with the switch"},
            ours="switch_kd",
        ),
        Table(
            "schemes",
            "Where distillation takes place (align only)",
            ("sft", "dpt_sft", "align", "dpt_dft"),
            labels={"sft": "PT-SFT", "align": "PT-DFT"},
            ours="align",
        ),
        Table(
            "knee",
            "Where and on what the knee is searched, and which pairs are compared",
            ("sft", "switch_kd", "knee_window", "knee_probabilities", "row_pairs"),
            columns=KNEE_MEASURES,
            labels={"switch_kd": "whole vocabulary, logits, triangle"},
            ours="switch_kd",
        ),
        Table(
            "bridge",
            "A student with a smaller, different tower",
            ("bridge_sft", "bridge_align", "bridge_switch"),
            ours="bridge_switch",
        ),
        Table("bases", "New base models for each seed", ("anew_sft", "anew_align", "anew_switch"), ours="anew_switch"),
        Table(
            "sizes",
            "Two teachers and two students",
            ("sft", "switch_kd", "larger_teacher", "larger_sft", "larger_student", "larger_both"),
        ),
    )
}
"""All tables by name, the most informative first."""

GRID: Mapping[str, tuple[float, ...]] = {"rate": (1.0, 2.0), "weight": (1.0, 2.0)}
"""The grid searched on validation scenes for every row of a tuned table: factors of the learning rate of fine-tuning,
and of all the method's weights together. SFT has no weights."""


def grid(way: Way) -> dict[tuple[float, float], Way]:
    """Factors of learning rate and weights -> candidate; the first candidate is the way itself."""
    weights = GRID["weight"] if way.tuning is not None else (1.0,)
    return {(rate, weight): tuned(way, rate, weight) for rate in GRID["rate"] for weight in weights}


def tuned(way: Way, rate: float, weight: float) -> Way:
    """A way with its learning rates and weights multiplied by factors; the way itself if both factors are 1."""
    if (rate, weight) == (1.0, 1.0):
        return way
    tuning = way.tuning
    if tuning is not None and weight != 1.0:
        tuning = {**tuning, **{name: weight * value for name, value in weights_of(tuning).items()}}
    return dataclasses.replace(
        way, key=f"{way.key}-rate{rate:g}-weight{weight:g}", tuning=tuning, settings={**way.settings, "rate": rate}
    )


def weights_of(flags: Flags) -> dict[str, float]:
    """The weights of a method's terms: from the flags, else the method's defaults."""
    from tinyllava_switchkd.distill.methods import MethodFactory

    method = MethodFactory(str(flags["distill_method"]))
    names = [name for name in method.settings() if name.endswith("_weight")]
    own = method()
    return {name: float(str(flags.get(name, getattr(own, name)))) for name in names}


def cached(flags: Flags) -> bool:
    """Whether the method of these flags can use a teacher cache."""
    from tinyllava_switchkd.distill.methods import MethodFactory
    from tinyllava_switchkd.distill.trace import BLIND

    return MethodFactory(str(flags["distill_method"]))().teacher_sight == BLIND
