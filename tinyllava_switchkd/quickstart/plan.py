"""What the quickstart trains, in which order, with which settings: a list of calls of ``scripts/train/*.sh``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .base_models import CONV_VERSION

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "train"
EVAL_SCRIPTS = SCRIPTS.with_name("eval")

CONNECTOR = "mlp2x_gelu"
MAX_LENGTH = 256
"""Tokens of a sequence, images counted; the longest conversation has about 120."""


@dataclass(frozen=True)
class Plan:
    """Sizes and settings. They were chosen on validation scenes; the test scenes had no part in it."""

    font_scenes: int = 10_000
    """Scenes of font digits that the base models grow up on."""
    teacher_scenes: int = 10_000
    """Handwriting scenes that the teacher is adapted on."""
    student_scenes: int = 300
    """Handwriting scenes that the student gets, in every seed others."""
    val_scenes: int = 150
    test_scenes: int = 400
    probe_scenes: int = 400
    """Scenes of training digits that the linear probe is fitted on."""

    tower_width: int = 64
    teacher_width: int = 64
    student_width: int = 48
    layers: int = 2

    tower_steps: int = 1500
    llm_steps: int = 1500
    teacher_pt_steps: int = 300
    teacher_steps: int = 2000
    student_pt_steps: int = 200
    student_steps: int = 800


@dataclass(frozen=True)
class Stage:
    """One call of a training script.

    Attributes:
        title: for people.
        script: ``pretrain.sh``, ``finetune.sh`` or ``distill.sh``.
        arguments: the script's positional arguments.
        settings: its environment variables.
        output: the folder it writes.
        needs: folders and files that it reads; their fingerprints enter its own.
        steps: optimiser steps.
        cost: of a step, in steps of plain fine-tuning, for the estimate of the time left.
    """

    title: str
    script: str
    arguments: tuple[str, ...]
    settings: dict[str, str]
    output: Path
    needs: tuple[Path, ...]
    steps: int
    cost: float = 1.0
    common: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return ["bash", str(SCRIPTS / self.script), *self.arguments]

    @property
    def environment(self) -> dict[str, str]:
        logging_steps = max(1, min(10, self.steps // 40))  # forty points make a curve
        return {**self.common, **self.settings, "MAX_STEPS": str(self.steps), "LOGGING_STEPS": str(logging_steps)}


class Workspace:
    """Where everything of a quickstart lies.

    Args:
        root: the output folder (``QUICKSTART_OUT``).
        plan: sizes and settings.
    """

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root, self.plan = root, plan
        self.images = root / "data" / "images"
        self.checkpoints = root / "checkpoints"
        self.logs = root / "logs"
        self.eval_dir = root / "eval"
        self.results = root / "benchmarks"

    def data(self, name: str) -> Path:
        """A JSON file of samples."""
        return self.root / "data" / f"{name}.json"

    def random_llm(self, who: str) -> Path:
        return self.root / "models" / f"random-qwen2-{who}"

    @property
    def random_tower(self) -> Path:
        return self.root / "models" / "random-siglip"

    def base_llm(self, who: str) -> Path:
        """What stands for Qwen2.5: the language model of a base VLM."""
        return self.root / "models" / f"base-qwen2-{who}"

    @property
    def base_tower(self) -> Path:
        """What stands for SigLIP, for teacher and student alike."""
        return self.root / "models" / "base-siglip"

    def run(self, llm: Path, tower: Path, version: str, stage: str) -> Path:
        """The output folder that the scripts derive from the names (TinyLLaVA's rule)."""
        return self.checkpoints / f"tiny-llava-{llm.name}-{tower.name}-{version}-{stage}"

    # The stages

    def tower_stage(self) -> Stage:
        """The base tower learns to see: captions of font scenes, everything tuned, the language model thrown away."""
        llm, tower = self.random_llm("tower"), self.random_tower
        return self._pretrain(
            "base tower",
            "font_captions",
            llm,
            tower,
            "base",
            self.plan.tower_steps,
            {**_BASE, "TUNE_VISION_TOWER": "full"},
            cost=1.5,
        )

    def llm_stage(self, who: str) -> Stage:
        """A base language model learns to speak of what the base tower sees: descriptions of and questions about font
        scenes, from random weights. (Those that grew up with the tower know cells by their order, and hardly unlearn
        it.)"""
        return self._pretrain(
            f"{who}'s base language model",
            "font_questions",
            self.random_llm(who),
            self.base_tower,
            "base",
            self.plan.llm_steps,
            {**_BASE, "EXTRA_ARGS": f"{_COMMON['EXTRA_ARGS']} --conv_version {CONV_VERSION}"},
            cost=2.0,
        )

    def teacher_stages(self) -> list[Stage]:
        """The teacher: base models adapted on many handwriting scenes (PT, SFT)."""
        llm, tower = self.base_llm("teacher"), self.base_tower
        return [
            self._pretrain("teacher PT", "teacher_captions", llm, tower, "handwriting", self.plan.teacher_pt_steps, {}),
            self._finetune(
                "teacher SFT", "teacher_questions", llm, tower, "handwriting", self.plan.teacher_steps, _FINETUNE
            ),
        ]

    @property
    def teacher(self) -> Path:
        return self.teacher_stages()[-1].output

    def student_pt(self, seed: int) -> Stage:
        """What the three students of a seed start from."""
        llm, tower = self.base_llm("student"), self.base_tower
        settings = {"SEED": str(seed)}
        return self._pretrain(
            f"student PT, seed {seed}",
            f"student{seed}_captions",
            llm,
            tower,
            f"seed{seed}",
            self.plan.student_pt_steps,
            settings,
        )

    def student_sft(self, seed: int, steps: int | None = None) -> Stage:
        """SFT of a seed's student; with `steps`, the run of equal time, from the same point."""
        llm, tower = self.base_llm("student"), self.base_tower
        settings = {**_FINETUNE, "SEED": str(seed)}
        title, version = f"student SFT, seed {seed}", f"seed{seed}"
        if steps is not None:
            title, version = f"student SFT at equal time, seed {seed}", f"seed{seed}-equal-time"
            settings["PRETRAINED_PATH"] = str(self.student_pt(seed).output)
        steps = self.plan.student_steps if steps is None else steps
        return self._finetune(
            title, f"student{seed}_questions", llm, tower, version, steps, settings, self.student_pt(seed).output
        )

    def equal_time(self, seed: int, sft_seconds: float, switch_seconds: float) -> Stage:
        """SFT of as many steps as take Switch-KD's time, by the speeds measured."""
        return self.student_sft(seed, steps=round(self.plan.student_steps * switch_seconds / sft_seconds))

    def student_switch(self, seed: int) -> Stage:
        """Switch-KD of a seed's student: SFT's data, order and settings, and the teacher."""
        sft = self.student_sft(seed)
        llm, tower = self.base_llm("student"), self.base_tower
        return self._stage(
            f"student Switch-KD, seed {seed}",
            "distill.sh",
            (*sft.arguments, self.teacher),
            sft.settings,
            self.run(llm, tower, f"seed{seed}", "distill"),
            (*sft.needs, self.teacher),
            sft.steps,
            cost=2.7,
        )

    def _pretrain(
        self,
        title: str,
        data: str,
        llm: Path,
        tower: Path,
        version: str,
        steps: int,
        settings: dict[str, str],
        cost: float = 1.0,
    ) -> Stage:
        return self._stage(
            title,
            "pretrain.sh",
            (self.data(data), self.images, llm, tower, "", CONNECTOR, version, "common", MAX_LENGTH),
            {"LEARNING_RATE": "3e-3", **settings},
            self.run(llm, tower, version, "pretrain"),
            (self.data(data), llm, tower),
            steps,
            cost,
        )

    def _finetune(
        self,
        title: str,
        data: str,
        llm: Path,
        tower: Path,
        version: str,
        steps: int,
        settings: dict[str, str],
        start: Path | None = None,
    ) -> Stage:
        arguments = (self.data(data), self.images, llm, tower, "", CONNECTOR, CONV_VERSION)
        return self._stage(
            title,
            "finetune.sh",
            (*arguments, version, "common", MAX_LENGTH),
            settings,
            self.run(llm, tower, version, "finetune"),
            (self.data(data), start or self.run(llm, tower, version, "pretrain")),
            steps,
        )

    def _stage(
        self,
        title: str,
        script: str,
        arguments: Sequence[object],
        settings: dict[str, str],
        output: Path,
        needs: tuple[Path, ...],
        steps: int,
        cost: float = 1.0,
    ) -> Stage:
        common = {**_COMMON, "OUTPUT_ROOT": str(self.checkpoints)}
        return Stage(title, script, tuple(map(str, arguments)), settings, output, needs, steps, cost, common)


_COMMON = {
    "DEVICE": "cpu",
    "LAUNCHER": "python",
    "GLOBAL_BATCH_SIZE": "16",
    "PER_DEVICE_BATCH_SIZE": "16",
    "WEIGHT_DECAY": "0.01",
    "WARMUP": "0.05",
    "REPORT_TO": "none",
    "GROUP_BY_MODALITY": "False",
    "SELECT_LAYER": "-1",
    "SEED": "0",
    # A stage takes a minute, so there is nothing to resume.
    # One visual token a cell: TinyLLaVA's "patch" would drop the first one, and with it a quarter of the scene.
    "EXTRA_ARGS": "--mm_vision_select_feature cls_patch --adam_beta2 0.98 --max_grad_norm 1.0 --save_strategy no",
    "OMP_NUM_THREADS": "1",  # models this small run fastest on one thread, and the other core has a run of its own
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
_BASE = {"TUNE_LLM": "full", "GLOBAL_BATCH_SIZE": "32", "PER_DEVICE_BATCH_SIZE": "32"}
_FINETUNE = {"LEARNING_RATE": "2e-3", "TUNE_VISION_TOWER": "full", "VISION_TOWER_LR": "1e-3"}


def fingerprint(*parts: object) -> str:
    """A short digest of settings (JSON-able) that decides whether what is there can be reused."""
    content = json.dumps([asdict(part) if isinstance(part, Plan) else part for part in parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
