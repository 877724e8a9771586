"""Runs of the tables at quickstart scale, by the quickstart's `Experiment`."""

from __future__ import annotations

import copy
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean

from PIL import Image

from tinyllava_switchkd.ablations import dry
from tinyllava_switchkd.ablations.memory import MARK
from tinyllava_switchkd.ablations.tables import KNEE_MEASURES, TABLES, WAYS, Flags, Way, cached, grid
from tinyllava_switchkd.io import JsonObject, read_json, write_json
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.quickstart.base_models import write_llm, write_vision_tower
from tinyllava_switchkd.quickstart.bases import BasePlan, make_bases
from tinyllava_switchkd.quickstart.experiment import COMMON, FINETUNE, MADE, TOWER, Experiment, StageError, words_of
from tinyllava_switchkd.train.command_line.argv import check_command_line
from tinyllava_switchkd.visualize.attention import Look, likeness, look
from tinyllava_switchkd.visualize.curves import GRADIENT, read_history, series

SMALL_TOWER, LARGER_TEACHER = "base-small-siglip", "larger-teacher"
WIDTHS = {SMALL_TOWER: 48, LARGER_TEACHER: 96}
PADDING = 32
"""Extra vocabulary rows of the larger teacher, as Qwen2.5-7B has more than 0.5B."""

MODELS = {
    "teacher": "teacher",
    "student": "student",
    "larger-teacher": LARGER_TEACHER,
    "larger-student": "teacher",
    "tower": TOWER,
    "small-tower": SMALL_TOWER,
}
"""The models of `tables` -> names of base models; those that are not shipped are made first."""

TUNING_SEED = 100
"""Seed of data and order in the search; no reported student has it."""

RESULTS = "ablations.json"

LOOKING = ("sft", "switch_kd")
SCENES_LOOKED_AT, SCENES_DRAWN = 200, 3
GRADIENTS_EVERY = 20
MEMORY_STEPS = 20

RESTS_ON = (
    "Hours of one core, from the seconds in docs/ablation_runs.json. Not included: answering, the search on validation "
    "scenes, and base models that are not shipped, with their teachers."
)


class Toy:
    """Makes the missing runs of tables and stores their results in one file.

    Args:
        experiment: a quickstart experiment in a separate folder.
        teacher_cache: folder of a teacher cache, shared by all runs whose method can use it; their seconds then do not
            include the teacher's own pass.
    """

    def __init__(self, experiment: Experiment, teacher_cache: str | None = None) -> None:
        self.experiment, self.file = experiment, experiment.root / RESULTS
        self.teacher_cache = teacher_cache
        self.stored: JsonObject = read_json(self.file) if self.file.is_file() else {"runs": {}, "search": {}}

    def train(self, way: Way, seed: int) -> Path:
        """Train the student of a way and a seed."""
        experiment = self._experiment(way, seed)
        names = {"who": MODELS[way.student], "tower": MODELS[way.tower]}
        guide = {"teacher_path": experiment.teacher(MODELS[way.teacher])} if way.distils else {}
        start = None
        if way.pretraining is not None:
            start = experiment.student_start(
                seed, {**guide, **self._distilled(way.pretraining)}, way="distilled-pretrain", **names
            )
        flags = dict(way.settings)
        rate = float(str(flags.pop("rate", 1.0)))
        if rate != 1.0:
            for name in ("learning_rate", "vision_tower_lr"):
                flags[name] = rate * float(str(FINETUNE[name]))
        if way.tuning is not None:
            flags |= {**guide, **self._distilled(way.tuning)}
        return experiment.student(way.key, seed, flags, start, **names)

    def make_bases(self, ways: Iterable[Way], say: Callable[[str], object]) -> None:
        """Make the base models of some ways that are missing, in the same way as the shipped ones.

        Raises:
            StageError: a base model did not learn every kind of question.
        """
        ways, root = list(ways), self.experiment.root
        if any(way.tower == "small-tower" for way in ways):
            make_bases(root, BasePlan(towers=((SMALL_TOWER, WIDTHS[SMALL_TOWER]),), widths=()), say)
        if any(way.distils and way.teacher == "larger-teacher" for way in ways):
            plan = BasePlan(towers=(), widths=((LARGER_TEACHER, WIDTHS[LARGER_TEACHER]),), padding=PADDING)
            make_bases(root, plan, say, self.experiment.base(TOWER))

    def make_bases_anew(self, seed: int, say: Callable[[str], object]) -> None:
        """Make all three base models from random weights that neither another seed nor the shipped ones started from.

        Raises:
            StageError: a base model did not learn every kind of question.
        """
        make_bases(self._with_bases_of(seed).root, BasePlan(first_start=seed * BasePlan.starts), say)

    def _with_bases_of(self, seed: int) -> Experiment:
        """The same experiment in a folder for one seed, with the base models made there."""
        own = copy.copy(self.experiment)
        own.root = self.experiment.root / f"bases{seed}"
        return own

    def _experiment(self, way: Way, seed: int) -> Experiment:
        return self._with_bases_of(seed) if way.anew else self.experiment

    def _distilled(self, flags: Flags) -> Flags:
        """Flags of distillation, with the teacher cache if the method can use it."""
        return {**flags, "teacher_cache": self.teacher_cache} if self.teacher_cache and cached(flags) else flags

    def run(self, way: Way, seed: int) -> JsonObject:
        """Make and store a run: scores on test scenes, seconds, and means of its logged measures."""
        experiment, checkpoint = self._experiment(way, seed), self.train(way, seed)
        found = experiment.scores(checkpoint)
        row = {name: found[name] for name in ("score", "by_type", "probe", "seconds", "steps")}
        history = read_history(checkpoint)
        for name in KNEE_MEASURES:
            values = series(history, name)[1]
            if len(values):
                row[name] = fmean(values)
        self._store("runs", f"{way.key}/{seed}", {"way": way.key, "seed": seed, **row})
        for stage in list(self._noted(way, seed))[:-1]:
            spent = read_json(experiment.root / "checkpoints" / stage / MADE)["seconds"]
            self._store("stages", stage.replace(f"-seed{seed}-", "-seed1-"), {"seconds": spent})
        return row

    def _noted(self, way: Way, seed: int) -> dict[str, dict[str, object]]:
        """Name -> flags of all trainings of a run in order."""
        noting = NotingExperiment(self.experiment.root, self.experiment.plan, self.experiment.bases)
        Toy(noting).train(way, seed)
        return noting.trainings

    def memory(self, way: Way, seed: int) -> None:
        """Measure the peak memory of a few steps of a way, in a separate process."""
        if way.key in self.stored.setdefault("memory", {}):
            return
        *_, last = self._noted(way, seed).values()
        words = words_of({**last, "max_steps": MEMORY_STEPS})
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tinyllava_switchkd.ablations.memory", *words, "--output_dir", folder]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise StageError(f"Measuring the memory of {way.key} failed:\n{done.stderr[-2000:]}")
        found = re.search(rf"^{MARK} (\S+)$", done.stdout, re.MULTILINE)
        self._store("memory", way.key, {"peak_mib": float(found[1]) if found else None, "steps": MEMORY_STEPS})

    def search(self, way: Way) -> Way:
        """The way with the learning rate and weights of the grid that score best on validation scenes."""
        candidates = grid(way).values()
        scores = {}
        for candidate in candidates:
            checkpoint = self.train(candidate, TUNING_SEED)
            scores[candidate.key] = self.experiment.scores(checkpoint, "val")["score"]
            self._store("search", way.key, {"scores": scores})
        best = max(candidates, key=lambda candidate: scores[candidate.key])
        self._store("search", way.key, {"scores": scores, "chosen": best.key})
        return best

    def attention(self, seed: int) -> None:
        """Correlate the students' attention maps with the teacher's, one value per test scene (Figure 3)."""
        models = [self.experiment.teacher(), *(self.train(WAYS[key], seed) for key in LOOKING)]
        source = [read_json(path / MADE)["mark"] for path in models]
        if self.stored.setdefault("attention", {}).get(str(seed), {}).get("of") == source:
            return
        looks = [[found for _, found in self._looks(path, SCENES_LOOKED_AT)] for path in models]
        values = dict(zip(LOOKING, likeness(looks), strict=True))
        self._store("attention", str(seed), {"of": source, **values})

    def figure(self, seed: int) -> None:
        """Store the maps of teacher and students on the first scenes, to be drawn side by side (Figure 3)."""
        students = {WAYS[key].label: self.train(WAYS[key], seed) for key in LOOKING}
        scenes: dict[int, JsonObject] = {}
        for label, path in {"Teacher": self.experiment.teacher(), **students}.items():
            for row, found in self._looks(path, SCENES_DRAWN):
                cells = None if found.attention is None else found.attention.of().round(4).tolist()
                scene = scenes.setdefault(row["question_id"], {"question": row["question"], "maps": {}})
                scene["maps"][label] = {"answer": found.answer, "cells": cells}
        self._store("figure", "scenes", {"seed": seed, "by_question": scenes})

    def _looks(self, path: Path, number: int) -> list[tuple[JsonObject, Look]]:
        """Test questions about a single digit, each with a checkpoint's answer and attention map."""
        asked = self.experiment.questions("test")
        rows = [row for row in asked.questions if row["type"] in ("position", "colour")][:number]
        model, tokenizer, processor, _ = load_pretrained_model(path, device="cpu")
        pictures = [Image.fromarray(asked.scenes[asked.scene_of[row["question_id"]]].pixels) for row in rows]
        asking = zip(pictures, (row["question"] for row in rows), strict=True)
        return list(
            zip(rows, (look(model, tokenizer, processor, *one, max_new_tokens=8) for one in asking), strict=True)
        )

    def inside(self, seed: int) -> None:
        """Train Switch-KD of a seed again and store its logged knees, overlap and gradient shares."""
        way = WAYS["switch_kd"]
        settings = {**way.settings, "log_gradient_shares": GRADIENTS_EVERY}
        checkpoint = self.train(dataclasses.replace(way, key=f"{way.key}-inside", settings=settings), seed)
        kept = [
            {name: value if name == "step" else round(value, 4) for name, value in row.items() if _is_inside(name)}
            for row in read_history(checkpoint)
        ]
        vocabulary = read_json(checkpoint / "config.json")["text_config"]["vocab_size"]
        self._store("inside", way.key, {"seed": seed, "vocabulary": vocabulary, "history": kept})

    def _store(self, part: str, key: str, value: Mapping[str, object]) -> None:
        self.stored.setdefault(part, {})[key] = dict(value)
        write_json(self.file, self.stored, indent=1)


def _is_inside(name: str) -> bool:
    """Whether a logged measure is shown by `draw_inside`."""
    return name == "step" or name in KNEE_MEASURES or name.startswith(GRADIENT)


class NotingExperiment(Experiment):
    """Records requested trainings instead of making them."""

    @cached_property
    def trainings(self) -> dict[str, dict[str, object]]:
        """Name -> flags."""
        return {}

    def train(self, title: str, name: str, flags: Mapping[str, object]) -> Path:
        self.trainings.setdefault(name, {**COMMON, **flags})
        return self.root / "checkpoints" / name


class DryExperiment(NotingExperiment):
    """A `NotingExperiment` in an empty folder."""

    def base(self, name: str) -> Path:
        """A shipped base model, or random weights in place of one that a real run would make."""
        folder = super().base(name)
        if not folder.is_dir():
            folder = self.root / "models" / name
            if not folder.is_dir() and name == SMALL_TOWER:
                write_vision_tower(folder, WIDTHS[name])
            elif not folder.is_dir():
                write_llm(folder, WIDTHS[LARGER_TEACHER], BasePlan().layers, padding=PADDING)
        return folder

    def data(self, name: str, *_: object, **__: object) -> Path:
        return self.root / "data" / name


def plan(names: Sequence[str], stored: JsonObject, root: Path) -> list[dry.Planned]:
    """The trainings of some tables for one seed, each once, with the seconds of stored runs.

    Args:
        names: names of tables.
        stored: earlier runs.
        root: an empty folder for models that are not shipped.
    """
    experiment = DryExperiment(root)
    toy, found = Toy(experiment), {}
    for key in dict.fromkeys(key for name in names for key in TABLES[name].ways):
        way = WAYS[key]
        guide = experiment.base(f"base-qwen2-{MODELS[way.teacher]}"), experiment.base(TOWER)
        last = toy.train(way, 1).name
        for name, flags in experiment.trainings.items():
            if name in found:
                continue
            check_command_line([*words_of(flags), "--output_dir", name])
            stage = "finetune" if flags["tune_type_llm"] == "full" else "pretrain"
            teacher = "handwriting" in name
            runs = stored.get("runs", {}).values() if name == last else ()
            seconds = [run["seconds"] for run in runs if run["way"].partition("-rate")[0] == key]  # tuned or not
            if not seconds and name in stored.get("stages", {}):
                seconds = [stored["stages"][name]["seconds"]]
            found[name] = dry.Planned(
                f"teacher {MODELS[way.teacher]}, {stage}" if teacher else f"{way.student}, {name.split('-seed1-')[1]}",
                stage,
                flags,
                (str(flags["model_name_or_path"]), str(flags["vision_tower"])),
                (str(guide[0]), str(guide[1])) if "teacher_path" in flags else None,
                gpus=0,
                samples=0,
                seconds=fmean(seconds) if seconds else None,
            )
    return list(found.values())


def run_tables(toy: Toy, names: Sequence[str], seeds: Sequence[int], say: Callable[[str], object] = print) -> None:
    """Make all runs of some tables, seed by seed, so that all tables have about as many seeds if it is stopped."""
    tables = [TABLES[name] for name in names]
    ways = [WAYS[key] for table in tables for key in table.ways]
    toy.make_bases(ways, say)
    chosen: dict[str, Way] = {}
    for table in tables:
        if table.tuned:
            say(f"Search on validation scenes: {table.title}")
            chosen |= {key: toy.search(WAYS[key]) for key in table.ways}
    for seed in seeds:
        if any(way.anew for way in ways):
            toy.make_bases_anew(seed, say)
        for table in tables:
            say(f"{table.title}: students of seed {seed}")
            for key in table.ways:
                row = toy.run(chosen[key] if table.tuned else WAYS[key], seed)
                say(f"    {key}: {row['score']:.1f}")
        if "switch" in names:
            toy.attention(seed)
    if "switch" in names:
        toy.figure(seeds[0])
        toy.inside(seeds[0])
    for table in tables:
        for key in table.ways if table.memory else ():
            toy.memory(chosen.get(key, WAYS[key]), seeds[0])
