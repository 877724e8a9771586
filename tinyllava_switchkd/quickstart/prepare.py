"""What the stages read: scenes in LLaVA's JSON, and folders of base models."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..model import load_pretrained_model
from . import base_models, scenes
from .evaluate import QuestionSet
from .plan import Workspace, fingerprint
from .runner import is_made, read_stamp, write_stamp

BASE_SEED, TEACHER_SEED, TEST_SEED = 0, 0, 0
"""Seeds of scenes that are the same in every run; the student's come from ``--seeds``."""


WEIGHT_SEEDS = {"tower": 0, "student": 2, "teacher": 11}
"""Seeds of the random weights. Of four starts tried, one (the teacher's with seed 1) was still learning to look things
up when the others had long known; base models that know every question were chosen, as Qwen2.5 and SigLIP are."""


def make_data(space: Workspace, seeds: tuple[int, ...]) -> None:
    """Write every training file that is not there yet."""
    plan = space.plan
    wanted = [("font", "font", plan.font_scenes, BASE_SEED), ("teacher", "handwriting", plan.teacher_scenes, 0)]
    wanted += [(f"student{seed}", "handwriting", plan.student_scenes, seed) for seed in seeds]
    for name, domain, number, seed in wanted:
        mark = fingerprint(name, domain, number, seed, _source(scenes), _versions("scikit-learn", "matplotlib"))
        captions, questions = space.data(f"{name}_captions"), space.data(f"{name}_questions")
        if is_made(captions, mark) and is_made(questions, mark):
            continue
        made = scenes.make_scenes(domain, "train", number, seed)
        names = scenes.save_images(made, space.images, name)
        scenes.write_json(scenes.caption_samples(made, names), captions)
        # The young base models learn from descriptions what those adapted later know: more of them
        share = 0.5 if domain == "font" else 0.1
        scenes.write_json(scenes.conversation_samples(made, names, seed, caption_share=share), questions)
        for file in (captions, questions):
            write_stamp(file, mark)


def make_random_models(space: Workspace) -> None:
    """Write the folders that base training starts from."""
    plan = space.plan
    widths = {"tower": plan.student_width, "teacher": plan.teacher_width, "student": plan.student_width}
    for who, width in widths.items():
        seed = WEIGHT_SEEDS[who]
        _make(
            space.random_llm(who),
            fingerprint(width, plan.layers, seed, _source(base_models)),
            lambda folder, width=width, seed=seed: base_models.write_llm(folder, width, plan.layers, seed=seed),
        )
    _make(
        space.random_tower,
        fingerprint(plan.tower_width, _source(base_models)),
        lambda folder: base_models.write_vision_tower(folder, plan.tower_width),
    )


def extract_tower(space: Workspace) -> None:
    """Keep the tower of a trained VLM as a base model, in the shape in which SigLIP comes."""

    def write(folder: Path, model: Any, tokenizer: Any, image_processor: Any) -> None:
        model.vision_tower._vision_tower.vision_model.save_pretrained(folder)
        image_processor.save_pretrained(folder)

    _extract(space.tower_stage().output, space.base_tower, write)


def extract_llm(space: Workspace, who: str) -> None:
    """Keep the language model of a trained VLM as a base model, in the shape in which Qwen2.5 comes."""

    def write(folder: Path, model: Any, tokenizer: Any, image_processor: Any) -> None:
        model.language_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _extract(space.llm_stage(who).output, space.base_llm(who), write)


def _extract(checkpoint: Path, folder: Path, write: Callable[..., None]) -> None:
    def load_and_write(folder: Path) -> None:
        write(folder, *load_pretrained_model(checkpoint, device="cpu")[:3])

    _make(folder, fingerprint("part of", read_stamp(checkpoint)["fingerprint"]), load_and_write)


def question_set(space: Workspace, split: str) -> QuestionSet:
    """Handwriting scenes of the validation or test digits, and a question of every type about each."""
    number = {"val": space.plan.val_scenes, "test": space.plan.test_scenes}[split]
    made = scenes.make_scenes("handwriting", split, number, TEST_SEED)
    names = [f"{split}_{index:05d}.png" for index in range(number)]
    questions = scenes.test_questions(made, names, TEST_SEED)
    scene_of = [index for index in range(number) for _ in scenes.QUESTION_TYPES]
    return QuestionSet(made, questions, scene_of)


def probe_scenes(space: Workspace) -> list[scenes.Scene]:
    """Scenes of training digits, in an arrangement that no model was trained on."""
    return scenes.make_scenes("handwriting", "train", space.plan.probe_scenes, 10_000)


def _make(folder: Path, mark: str, write: Callable[[Path], None]) -> None:
    if is_made(folder, mark):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write(folder)
    write_stamp(folder, mark)


def _source(module: object) -> str:
    """A module's text: when it changes, what it made is made anew."""
    return Path(module.__file__).read_text(encoding="utf-8")


def _versions(*packages: str) -> list[str]:
    return [importlib.metadata.version(package) for package in packages]
