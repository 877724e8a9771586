"""The runs of the tables at full scale: the stages of scripts/train, then the ten benchmarks of scripts/eval."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllava_switchkd.eval.results import read_results
from tinyllava_switchkd.io import JsonObject, read_json, write_json
from tinyllava_switchkd.launch import stages
from tinyllava_switchkd.launch.__main__ import playground
from tinyllava_switchkd.launch.devices import Devices, find_devices
from tinyllava_switchkd.launch.processes import Commands
from tinyllava_switchkd.launch.recipe import Item, Recipe, Settings, read_recipe
from tinyllava_switchkd.launch.variables import read
from tinyllava_switchkd.quickstart.experiment import StageError

from . import dry
from .tables import SWITCH, TABLES, WAYS, Flags, Way, cached

RECIPE = "switchkd_qwen2.5_0.5b_from_3b"
MODELS = {
    "teacher": "Qwen/Qwen2.5-3B",
    "student": "Qwen/Qwen2.5-0.5B",
    "larger-teacher": "Qwen/Qwen2.5-7B",
    "larger-student": "Qwen/Qwen2.5-1.5B",
    "tower": "google/siglip-so400m-patch14-384",
    "small-tower": "google/siglip-base-patch16-224",
}
"""The models of `tables` -> names on the hub, as the paper's Table 6 pairs them."""

SAMPLES = {"pretrain": 558_128, "finetune": 665_298, "distill": 665_298}
"""Of LLaVA-558K and LLaVA-Mix-665K, each seen once."""

USUAL = Devices(tuple("01234567"), 8)
"""What a dry run counts with on a machine without a GPU."""

OURS = ("SCALE", "SEEDS", "ABLATE_OUT")
"""Variables of the tables' scripts, which a training has not."""


@dataclass(frozen=True)
class Step:
    """One training and what it is."""

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
    """The commands of runs, each made once and in an order in which they can be run."""

    def __init__(self, environment: Mapping[str, str], devices: Devices | None = None) -> None:
        own = {name: value for name, value in environment.items() if name not in OURS}
        self.variables = read(own, training=True)
        python = self.variables.get("PYTHON") or sys.executable
        self.request = stages.Request(self.variables, devices or find_devices(own, python), python, playground())
        self.recipe = read_recipe(RECIPE)

    def steps(self, way: Way, seed: int) -> list[Step]:
        """Teacher's PT and SFT, student's PT or DPT, and SFT or DFT."""
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
            Item(stage, "student", distills=way.tuning is not None, settings=_settings(way.tuning)),
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
    """A way's flags as a stage's settings; Switch-KD's that it does not have are taken out."""
    if flags is None:
        return {}
    removed: Settings = {name: "null" for name in SWITCH if name not in flags}
    return removed | {name: str(value) for name, value in flags.items()}


def plan(names: Sequence[str], environment: Mapping[str, str], seed: int = 1) -> list[dry.Planned]:
    """What the tables train for one seed, each training once."""
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
    f"Hours of all GPUs together running. They rest on operations counted from the configurations, "
    f"{dry.PEAK / 1e12:.0f} TFLOP/s a GPU ({dry.PEAK_OF}), of which a step reaches {dry.SHARE:.0%} ({dry.SHARE_OF}), "
    f"and {dry.TEXT_TOKENS['pretrain']} tokens of text a sample in pre-training and {dry.TEXT_TOKENS['finetune']} in "
    f"fine-tuning, which are assumed. No GPU has been measured; loading and evaluation come on top."
)


def run_tables(names: Sequence[str], seeds: Sequence[int], root: Path, say: Callable[[str], object] = print) -> Path:
    """Train and evaluate what is missing, seeds outermost; the file of results.

    A finished training says so and ends at once, and an evaluation goes on where it was; so running again resumes.

    Raises:
        StageError: a command failed.
    """
    paper, file = Paper(os.environ), root / "ablations.json"
    stored: JsonObject = read_json(file) if file.is_file() else {"runs": {}, "search": {}}
    with Commands().listening() as commands:

        def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
            code = commands.run(list(command), dict(environment))
            if code or commands.interrupted:
                raise StageError(f"{' '.join(command[:4])} ... ended with exit code {code}; run this again to go on.")

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
        raise ValueError("SCALE=paper has no table of base models drawn anew: Qwen2.5 and SigLIP come as they are.")
    return keys


def _row(folder: Path, name: str) -> JsonObject:
    """Scores of a checkpoint's benchmarks: Avg10 where all ten are there, else the mean of those that are."""
    results = Path(os.environ.get("RESULTS_DIR") or playground() / "results") / name
    (row,) = read_results([str(results)])
    ten = row.average("Avg10", include_val=True).value
    history = read_json(folder / "trainer_state.json")["log_history"]
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    score = ten if ten is not None else sum(row.scores.values()) / len(row.scores)
    return {"score": score, "by_type": row.scores, "complete": ten is not None, "seconds": seconds}
