"""Runs of the tables at full scale: the stages of scripts/train, then the ten benchmarks of scripts/eval."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_switchkd.ablations import dry
from tinyllava_switchkd.ablations.tables import SWITCH, TABLES, WAYS, Flags, Way, cached
from tinyllava_switchkd.eval.results import read_results
from tinyllava_switchkd.io import JsonObject, read_json, write_json
from tinyllava_switchkd.launch import stages
from tinyllava_switchkd.launch.__main__ import playground
from tinyllava_switchkd.launch.devices import Devices, find_devices
from tinyllava_switchkd.launch.processes import Commands
from tinyllava_switchkd.launch.recipe import Item, Recipe, Settings, read_recipe
from tinyllava_switchkd.launch.variables import read
from tinyllava_switchkd.quickstart.experiment import StageError

RECIPE = "switchkd_qwen2.5_0.5b_from_3b"
MODELS = {
    "teacher": "Qwen/Qwen2.5-3B",
    "student": "Qwen/Qwen2.5-0.5B",
    "larger-teacher": "Qwen/Qwen2.5-7B",
    "larger-student": "Qwen/Qwen2.5-1.5B",
    "tower": "google/siglip-so400m-patch14-384",
    "small-tower": "google/siglip-base-patch16-224",
}
"""The models of `tables` -> names on the hub, paired as in the paper's Table 6."""

WHOLE_STUDENT: Settings = {"tune_type_vision_tower": "full"}
"""Settings of every row's last stage: SFT trains what the distilled rows train, so that only the teacher differs."""

SAMPLES = {"pretrain": 558_128, "finetune": 665_298, "distill": 665_298}
"""Samples of LLaVA-558K and LLaVA-Mix-665K, one epoch each."""

USUAL = Devices(tuple("01234567"), 8)
"""Devices that a dry run assumes on a machine without a GPU."""

OURS = ("SCALE", "SEEDS", "ABLATE_OUT")
"""Variables of the tables' scripts that are not variables of a training."""


@dataclass(frozen=True)
class Step:
    """One training of a run."""

    name: str
    stage: str
    training: stages.Training
    student: tuple[str, str]
    teacher: tuple[str, str] | None

    @property
    def flags(self) -> Settings:
        words = self.training.command
        entry = next(place for place, word in enumerate(words) if word.endswith(("train.train", "train.py")))
        return stages.parse_flags(words[entry + 1 :])


class Paper:
    """Builds the trainings of runs in the order in which they can be run."""

    def __init__(self, environment: Mapping[str, str], devices: Devices | None = None) -> None:
        own = {name: value for name, value in environment.items() if name not in OURS}
        self.variables = read(own, training=True)
        for name in ("TEACHER_PATH", "PRETRAINED_PATH"):
            if name in self.variables:
                raise ValueError(
                    f"{name} is one model, but the tables train teachers and starts of their own; unset it."
                )
        python = self.variables.get("PYTHON") or sys.executable
        self.request = stages.Request(self.variables, devices or find_devices(own, python), python, playground())
        self.recipe = read_recipe(RECIPE)

    def steps(self, way: Way, seed: int) -> list[Step]:
        """The teacher's PT and SFT if it has one, the student's PT or DPT, and its SFT or DFT."""
        steps, guide = [], None
        if way.distils:
            teacher = (MODELS[way.teacher], MODELS["tower"])
            for stage in ("pretrain", "finetune"):
                steps.append(self._step(f"{way.teacher}: {stage}", Item(stage, "teacher"), teacher, "tables", 42))
            guide = (teacher, steps[-1].training.output_dir)
        student = (MODELS[way.student], MODELS[way.tower])
        kind = "dpt" if way.pretraining is not None else "pt"
        start = self._step(
            f"{kind.upper()}, {_names(way)}",
            Item("pretrain", "student", distills=kind == "dpt", settings=_settings(way.pretraining)),
            student,
            f"{kind}-seed{seed}",
            seed,
            guide if kind == "dpt" else None,
        )
        stage = "finetune" if way.tuning is None else "distill"
        last = self._step(
            f"{way.key}, {_names(way)}",
            Item(stage, "student", distills=way.tuning is not None, settings=WHOLE_STUDENT | _settings(way.tuning)),
            student,
            f"{way.key}-seed{seed}",
            seed,
            guide if way.tuning is not None else None,
            start.training.output_dir,
        )
        return [*steps, start, last]

    def _step(
        self,
        name: str,
        item: Item,
        models: tuple[str, str],
        version: str,
        seed: int,
        guide: tuple[tuple[str, str], str] | None = None,
        start: str = "",
    ) -> Step:
        recipe: Recipe = dataclasses.replace(
            self.recipe, version=version, models={item.model: models[0]}, stages=(item,)
        )
        variables = {**self.variables, "VISION_TOWER": models[1], "VERSION": version}
        variables |= {"TEACHER_PATH": guide[1]} if guide else {}
        if guide and not cached({"distill_method": "switch_kd", **item.settings}):
            variables.pop("TEACHER_CACHE", None)
            variables.pop("TEACHER_CACHE_DTYPE", None)
        flags: Settings = {"seed": str(seed), **({"pretrained_model_path": start} if start else {})}
        (training,) = stages.whole_recipe(recipe, dataclasses.replace(self.request, variables=variables, flags=flags))
        return Step(name, item.stage, training, models, guide[0] if guide else None)


def _names(way: Way) -> str:
    return " and ".join(MODELS[name].rsplit("/", 1)[-1] for name in (way.student, way.tower))


def _settings(flags: Flags | None) -> Settings:
    """A way's flags as settings of a stage, without those of Switch-KD that the way does not have."""
    if flags is None:
        return {}
    removed: Settings = {name: "null" for name in SWITCH if name not in flags}
    return removed | {name: str(value) for name, value in flags.items()}


def plan(names: Sequence[str], environment: Mapping[str, str], seed: int = 1) -> list[dry.Planned]:
    """The trainings of some tables for one seed, each once."""
    devices = find_devices(environment, sys.executable)
    devices = devices if devices.gpus else USUAL
    paper = Paper(environment, devices)
    found: dict[str, dry.Planned] = {}
    for key in _ways(names):
        for step in paper.steps(WAYS[key], seed):
            flags = {**step.flags, "per_device_train_batch_size": step.training.batch.per_device}
            gpus = len(devices.gpus)
            planned = dry.Planned(step.name, step.stage, flags, step.student, step.teacher, gpus, SAMPLES[step.stage])
            found.setdefault(step.training.output_dir, planned)
    return list(found.values())


RESTS_ON = (
    f"The hours are wall-clock time with all GPUs. They are estimated from the operations of the configurations, "
    f"{dry.PEAK / 1e12:.0f} TFLOP/s per GPU ({dry.PEAK_OF}), of which a step reaches {dry.SHARE:.0%} "
    f"({dry.SHARE_OF}), and assumed text tokens per sample: {dry.TEXT_TOKENS['pretrain']} in pre-training, "
    f"{dry.TEXT_TOKENS['finetune']} in fine-tuning. No GPU has been measured. Loading and evaluation are not included."
)


def run_tables(names: Sequence[str], seeds: Sequence[int], root: Path, say: Callable[[str], object] = print) -> Path:
    """Train and evaluate whatever is missing, seed by seed; return the file of results.

    To resume, run it again: a finished training ends at once, and an evaluation continues where it stopped.

    Raises:
        StageError: a command failed.
    """
    paper, file = Paper(os.environ), root / "ablations.json"
    stored: JsonObject = read_json(file) if file.is_file() else {"runs": {}, "search": {}}
    with Commands().listening() as commands:

        def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
            code = commands.run(list(command), dict(environment))
            if code or commands.interrupted:
                raise StageError(f"{' '.join(command[:4])} ... ended with exit code {code}; run it again to continue.")

        for seed in seeds:
            for key in _ways(names):
                if f"{key}/{seed}" in stored["runs"]:
                    continue
                *_, last = steps = paper.steps(WAYS[key], seed)
                for step in steps:
                    say(f"== {step.name}, seed {seed} ==")
                    run(step.training.command, step.training.environment)
                folder, name = last.training.output_dir, f"{key}-seed{seed}"
                run([paper.request.python, "-m", "tinyllava_switchkd.launch", "eval", "all", folder, name], {})
                stored["runs"][f"{key}/{seed}"] = {"way": key, "seed": seed, **_row(Path(folder), name)}
                write_json(file, stored, indent=1)
    return file


def _ways(names: Sequence[str]) -> list[str]:
    keys = list(dict.fromkeys(key for name in names for key in TABLES[name].ways))
    if any(WAYS[key].anew for key in keys):
        raise ValueError("SCALE=paper has no table of new base models: Qwen2.5 and SigLIP are already trained.")
    return keys


def _row(folder: Path, name: str) -> JsonObject:
    """A checkpoint's benchmark scores: "score" is Avg10, or the mean of the available ones if some are missing."""
    results = Path(os.environ.get("RESULTS_DIR") or playground() / "results") / name
    (row,) = read_results([str(results)])
    ten = row.average("Avg10", include_val=True).value
    history = read_json(folder / "trainer_state.json")["log_history"]
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    score = ten if ten is not None else sum(row.scores.values()) / len(row.scores)
    return {"score": score, "by_type": row.scores, "complete": ten is not None, "seconds": seconds}
