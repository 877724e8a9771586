"""Which runs each table has. A run that several tables have is one entry here, and is trained once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

Flags = Mapping[str, object]

ALIGN: Flags = {"distill_method": "logit_kd", "distill_loss": "dbild", "temperature": 3.0, "align_weight": 1.0}
"""Align only: the paper's loss on the student's own logits, without the switch."""
SWITCH: Flags = {
    "distill_method": "switch_kd",
    "distill_loss": "dbild",
    "temperature": 3.0,
    "align_weight": 1.0,
    "switch_weight": 1.0,
}
"""Switch-KD as the paper sets it (Section 4.1)."""


@dataclass(frozen=True)
class Way:
    """How a student is trained: pre-training, then fine-tuning, either of them distilled or not.

    Attributes:
        key: its name in files and folders.
        label: in tables.
        tuning: flags of distillation in fine-tuning (DFT); None for SFT.
        pretraining: flags of distillation in pre-training (DPT); None for PT.
        teacher, student, tower: which of the scale's models.
        settings: other flags of fine-tuning, such as a learning rate.
        anew: whether each seed has base models, and a teacher, of its own.
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
        """Student's language model and tower: ways with the same ones are compared in pairs."""
        return self.student, self.tower


def _loss(name: str, label: str) -> Way:
    return Way(name, label, {**ALIGN, "distill_loss": name})


def _knee(key: str, label: str, **settings: object) -> Way:
    return Way(key, label, {**SWITCH, **settings})


WINDOW = 32
"""Largest logits among which `knee_window` looks for the knee; the quickstart's vocabulary has about 300 tokens."""

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
    """A table.

    Attributes:
        key: of the command.
        title: what it is about.
        ways: its rows, in order; one of each student is SFT.
        columns: logged measures beside score, time and memory.
        labels: of rows that are called otherwise in this table.
        memory: whether peak memory is measured.
        tuned: whether learning rate and weights are those that the search chose.
        ours: the row that the others are compared with besides SFT.
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
        """The script in scripts/train that makes it."""
        return "compare_methods.sh" if self.key == "methods" else f"ablate_{self.key}.sh"

    def label(self, key: str) -> str:
        return self.labels.get(key, WAYS[key].label)

    def reference(self, key: str) -> str:
        """The row that a row's difference is taken to: plain SFT of the same student."""
        same = [other for other in self.ways if WAYS[other].pair == WAYS[key].pair]
        return next(other for other in same if not WAYS[other].distils)


KNEE_MEASURES = ("knee_teacher", "knee_student", "topk_overlap")

TABLES = {
    table.key: table
    for table in (
        Table(
            "methods",
            "Methods beside one another",
            ("sft", "logit_kd", "llava_kd", "align_kd", "switch_kd"),
            memory=True,
            tuned=True,
            ours="switch_kd",
        ),
        Table(
            "losses",
            "Losses between the student's own logits and the teacher's",
            ("sft", "fkl", "rkl", "bild_fkl", "bild_rkl", "dbild_fkl", "align"),
            labels={"align": "DBiLD-RKL"},
            ours="align",
        ),
        Table(
            "switch",
            "Without and with the visual switch",
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
            "Where the knee is looked for, on what, and over which pairs",
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
        Table(
            "bases",
            "Base models drawn anew for each seed",
            ("anew_sft", "anew_align", "anew_switch"),
            ours="anew_switch",
        ),
        Table(
            "sizes",
            "Two teachers and two students",
            ("sft", "switch_kd", "larger_teacher", "larger_sft", "larger_student", "larger_both"),
        ),
    )
}
"""Every table by the word of its command, the most telling first."""

GRID: Mapping[str, tuple[float, ...]] = {"rate": (1.0, 2.0), "weight": (1.0, 2.0)}
"""What is searched on validation for every row of a tuned table: factors on the fine-tuning's learning rate, and on all
of a method's weights together. SFT has no weights."""


def grid(way: Way) -> list[Way]:
    """The candidates of a way, as it stands first."""
    weights = GRID["weight"] if way.tuning is not None else (1.0,)
    return [tuned(way, rate, weight) for rate in GRID["rate"] for weight in weights]


def tuned(way: Way, rate: float, weight: float) -> Way:
    """A way with other learning rates and weights; itself where both factors are 1."""
    if (rate, weight) == (1.0, 1.0):
        return way
    tuning = way.tuning
    if tuning is not None and weight != 1.0:
        tuning = {**tuning, **{name: weight * value for name, value in weights_of(tuning).items()}}
    return dataclasses.replace(
        way, key=f"{way.key}-rate{rate:g}-weight{weight:g}", tuning=tuning, settings={**way.settings, "rate": rate}
    )


def weights_of(flags: Flags) -> dict[str, float]:
    """The weights of a method's terms: those in the flags, else the method's own."""
    from tinyllava_switchkd.distill.methods import MethodFactory

    method = MethodFactory(str(flags["distill_method"]))
    names = [name for name in method.settings() if name.endswith("_weight")]
    own = method()
    return {name: float(str(flags.get(name, getattr(own, name)))) for name in names}


def cached(flags: Flags) -> bool:
    """Whether a teacher cache serves the method of these flags."""
    from tinyllava_switchkd.distill.methods import MethodFactory
    from tinyllava_switchkd.distill.trace import BLIND

    return MethodFactory(str(flags["distill_method"]))().teacher_sight == BLIND
