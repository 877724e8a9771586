"""Builds training commands from a stage's arguments, the environment and a recipe."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinyllava_switchkd.launch.batch import Batch, batch_of
from tinyllava_switchkd.launch.devices import Devices
from tinyllava_switchkd.launch.launcher import find_launcher, launch_environment, launch_words
from tinyllava_switchkd.launch.recipe import (
    LAUNCH_SETTINGS,
    Item,
    Recipe,
    Settings,
    is_unset,
    read_recipe,
    setting_name,
)
from tinyllava_switchkd.launch.values import folder_name, split_words
from tinyllava_switchkd.launch.variables import STAGE_PREFIXES, TRAINING
from tinyllava_switchkd.train.command_line.argv import check_command_line
from tinyllava_switchkd.train.command_line.flags import pairs

BASE_RECIPE = "tinyllava"
"""The recipe of a stage that is run on its own."""

ARGUMENTS = {
    "pretrain": "DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION VERSION TRAIN_RECIPE "
    "MODEL_MAX_LENGTH",
    "finetune": "DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION CONV_VERSION VERSION TRAIN_RECIPE "
    "MODEL_MAX_LENGTH",
    "distill": "DATA_PATH IMAGE_PATH LLM_VERSION VT_VERSION VT_VERSION2 CN_VERSION CONV_VERSION VERSION TRAIN_RECIPE "
    "MODEL_MAX_LENGTH TEACHER_PATH",
    "custom": "DATA_PATH IMAGE_PATH MODEL_PATH CONV_VERSION OUTPUT_DIR",
}
"""The positional arguments of each stage, in TinyLLaVA's order."""

_FLAG_OF = {
    "DATA_PATH": "data_path",
    "IMAGE_PATH": "image_folder",
    "LLM_VERSION": "model_name_or_path",
    "VT_VERSION": "vision_tower",
    "VT_VERSION2": "vision_tower2",
    "CN_VERSION": "connector_type",
    "CONV_VERSION": "template",
    "TRAIN_RECIPE": "training_recipe",
    "MODEL_MAX_LENGTH": "model_max_length",
    "TEACHER_PATH": "teacher_path",
    "MODEL_PATH": "pretrained_model_path",
    "OUTPUT_DIR": "output_dir",
}

DISTILLATION = (
    *("distill_method", "distill_loss", "temperature", "align_weight", "switch_weight", "teacher_bits"),
    *("teacher_cache", "teacher_cache_dtype", "fill_teacher_cache"),
)
"""Settings that apply only to a stage with a teacher."""

ADAPTERS = ("lora_r", "lora_alpha")

_OF_ONE_STAGE = {
    "--output_dir": "set OUTPUT_ROOT",
    "--teacher_path": "set TEACHER_PATH",
    **dict.fromkeys(
        ("--pretrained_model_path", "PRETRAINED_PATH"),
        "run that stage on its own (train finetune or train distill)",
    ),
}
"""Flags and variables that are refused for several stages -> the remedy."""

_TITLES = {"pretrain": "pre-training", "finetune": "supervised fine-tuning", "distill": "distilled fine-tuning"}


@dataclass(frozen=True)
class Training:
    """One training, ready to be launched.

    Attributes:
        title: title to print; "" for a stage that is run on its own.
        command: the words of the command.
        environment: environment variables to set for the command.
        batch: the batch of a step.
        usual: samples per step that the recipe asks for.
        output_dir: the folder of the trained model.
    """

    title: str
    command: list[str]
    environment: dict[str, str]
    batch: Batch
    usual: int
    output_dir: str

    def __str__(self) -> str:
        return shlex.join(self.command)


@dataclass(frozen=True)
class Request:
    """The options of a training, except the recipe.

    Attributes:
        variables: the checked environment variables of a training.
        devices: the devices of this machine.
        python: the interpreter.
        playground: the folder of data and checkpoints, unless the variables name others.
        flags: settings from the command line, which override all others.
    """

    variables: Mapping[str, str]
    devices: Devices
    python: str
    playground: Path
    flags: Settings = field(default_factory=dict)

    @property
    def output_root(self) -> Path:
        """The folder that holds the runs' output folders."""
        return Path(self.variables.get("OUTPUT_ROOT") or self.playground / "checkpoints")

    @property
    def tiny(self) -> Path:
        """The folder of the tiny models and data."""
        return self.output_root / "debug"

    def expand(self, value: str) -> str:
        """Replace ``{data_root}`` and ``{tiny}`` in a value by this machine's folders."""
        data_root = self.variables.get("DATA_ROOT") or str(self.playground / "data")
        return value.replace("{data_root}", data_root).replace("{tiny}", str(self.tiny))


def variant(name: str) -> str:
    """The part of a model's name that is used in folder names: ``Qwen/Qwen2.5-0.5B`` -> ``Qwen2.5-0.5B``."""
    return name.rstrip("/").rsplit("/", 1)[-1].replace(":", "-")


def run_name(llm: str, vision_tower: str, version: str, stage: str) -> str:
    """The name of an output folder, as in TinyLLaVA.

    Raises:
        ValueError: the version is not a valid folder name.
    """
    wrong = folder_name(version)
    if wrong is not None:
        raise ValueError(f"VERSION is {version!r}; it must be {wrong}.")
    return f"tiny-llava-{variant(llm)}-{variant(vision_tower)}-{version}-{stage}"


def parse_flags(words: Sequence[str]) -> Settings:
    """Convert ``--name value ...`` words to settings; a flag without a value means True.

    Raises:
        ValueError: a value has no flag in front of it.
    """
    return {setting_name(name): values[0] if len(values) == 1 else values for name, values in pairs(words)}


def one_stage(stage: str, arguments: Sequence[str], request: Request) -> Training:
    """The training of a stage that is run on its own, with arguments as in `ARGUMENTS`.

    Raises:
        ValueError: an argument or setting is invalid.
    """
    names = ARGUMENTS[stage].split()
    given = dict(zip(names, arguments, strict=True))
    for name, value in given.items():
        if not value and name != "VT_VERSION2":
            raise ValueError(f"{name} is empty.")
        wrong = TRAINING[name].wrong(value) if value and name in TRAINING else None
        if wrong is not None:
            raise ValueError(f"{name} is {value!r}; it must be {wrong}.")
    settings: Settings = {_FLAG_OF[name]: value for name, value in given.items() if name in _FLAG_OF and value}
    if stage != "custom":
        names_of = (given["LLM_VERSION"], given["VT_VERSION"], given["VERSION"])
        settings["output_dir"] = str(request.output_root / run_name(*names_of, stage))
        if stage != "pretrain":
            start = request.output_root / run_name(*names_of, "pretrain")
            settings["pretrained_model_path"] = request.variables.get("PRETRAINED_PATH") or str(start)
    elif not given["OUTPUT_DIR"].strip("/."):
        raise ValueError(f"OUTPUT_DIR is {given['OUTPUT_DIR']!r}; name a folder for the tuned model.")
    variables = _of_stage(request.variables, "finetune" if stage == "custom" else stage)
    return _training(stage, read_recipe(BASE_RECIPE), Item(), variables, settings, request, "")


def whole_recipe(recipe: Recipe, request: Request) -> list[Training]:
    """The trainings of a recipe in order. The teacher's are left out if ``TEACHER_PATH`` names a teacher.

    Raises:
        ValueError: a setting is invalid or missing.
    """
    if not any(item.model for item in recipe.stages):
        _refuse_unread(recipe, request.variables)
    elif request.flags.get("teacher_path"):
        flags = dict(request.flags)
        teacher_too = {**request.variables, "TEACHER_PATH": str(flags.pop("teacher_path"))}
        request = dataclasses.replace(request, variables=teacher_too, flags=flags)
    variables = request.variables
    items = [item for item in recipe.stages if not (item.model == "teacher" and variables.get("TEACHER_PATH"))]
    if not items:
        raise ValueError(f"The recipe {recipe.name} has no stages; extend it by a recipe that has some.")
    if len(items) > 1:
        given = {f"--{name}" for name in parse_flags(split_words(variables.get("EXTRA_ARGS", ""))) | request.flags}
        for name, remedy in _OF_ONE_STAGE.items():
            if name in given | variables.keys():
                raise ValueError(
                    f"{name} is for one training, but the recipe {recipe.name} has {len(items)} stages; {remedy}."
                )
    trainings = []
    teacher = variables.get("TEACHER_PATH", "")
    for item in items:
        training = _item_training(recipe, item, item is items[-1], teacher, request)
        trainings.append(training)
        if item.model == "teacher":
            teacher = training.output_dir
    return trainings


def _refuse_unread(recipe: Recipe, variables: Mapping[str, str]) -> None:
    """Refuse variables that a recipe written by a run would ignore: it has all settings of one training."""
    for name in filter(variables.get, variables):
        prefix, _, rest = name.partition("_")
        variable = TRAINING.get(name)
        if variable is None and prefix in STAGE_PREFIXES:
            remedy = f"set {rest}"
        elif variable is not None and name != "DATA_ROOT" and (variable.recipe_only or name == "PRETRAINED_PATH"):
            remedy = f"pass --{variable.setting}" if variable.setting else "leave it out or change the recipe"
        else:
            continue
        raise ValueError(f"{name} does nothing with the recipe {recipe.name}, which names no stages; {remedy}.")


def _item_training(recipe: Recipe, item: Item, last: bool, teacher: str, request: Request) -> Training:
    variables = _of_stage(request.variables, item.stage)
    if not last:  # adapters are trained only in the last stage
        variables.pop("TRAIN_RECIPE", None)
    if not item.model:
        return _training(item.stage, recipe, item, variables, {}, request, "")
    variables.pop("TEACHER_PATH", None)
    settings: Settings = {}
    if item.distills:
        if not teacher and "teacher_path" not in recipe.settings[item.stage] | item.settings | request.flags:
            raise ValueError(f"The recipe {recipe.name} needs a teacher: set TEACHER_PATH to a trained one.")
        if teacher:
            settings["teacher_path"] = teacher
    llm = variables.get(f"{item.model.upper()}_LLM") or recipe.models.get(item.model, "")
    known = recipe.settings[item.stage] | item.settings | request.flags
    tower = variables.get("VISION_TOWER") or known.get("vision_tower", "")
    for name, value in ((f"{item.model.upper()}_LLM", llm), ("VISION_TOWER", tower)):
        if not value or not isinstance(value, str):
            raise ValueError(f"The recipe {recipe.name} does not name the {item.model}'s models: set {name}.")
    llm, tower = request.expand(llm), request.expand(str(tower))
    version = variables.get("VERSION") or recipe.version or recipe.name
    settings |= {
        "model_name_or_path": llm,
        "vision_tower": tower,
        "output_dir": str(request.output_root / run_name(llm, tower, version, item.stage)),
    }
    if item.stage != "pretrain":
        start = item.start or "pretrain"
        own = variables.get("PRETRAINED_PATH") if start == "pretrain" else None
        settings["pretrained_model_path"] = own or str(request.output_root / run_name(llm, tower, version, start))
    data = "pretrain" if item.stage == "pretrain" else "finetune"
    for setting, name in (("data_path", "DATA"), ("image_folder", "IMAGES")):
        if variables.get(f"{data.upper()}_{name}"):
            settings[setting] = variables[f"{data.upper()}_{name}"]
    what = _TITLES[item.stage] if item.stage != "pretrain" or not item.distills else "distilled pre-training"
    title = f"The {item.model}, {llm}: {what}" + (f" from {settings.get('teacher_path')}" if item.distills else "")
    return _training(item.stage, recipe, item, variables, settings, request, title)


def _of_stage(variables: Mapping[str, str], stage: str) -> dict[str, str]:
    """The variables of one stage: those with its prefix override those for all stages."""
    prefixes = tuple(f"{prefix}_" for prefix in STAGE_PREFIXES)
    common = {name: value for name, value in variables.items() if name in TRAINING or not name.startswith(prefixes)}
    prefix = f"{stage.upper()}_"
    own = {
        name.removeprefix(prefix): value
        for name, value in variables.items()
        if name.startswith(prefix) and name not in TRAINING
    }
    return {name: value for name, value in (common | own).items() if value}


def _training(
    stage: str,
    recipe: Recipe,
    item: Item,
    variables: Mapping[str, str],
    arguments: Settings,
    request: Request,
    title: str,
) -> Training:
    """Merge the layers of settings and build the command."""
    extra = parse_flags(split_words(variables.get("EXTRA_ARGS", ""))) | request.flags
    over = _from_variables(variables, recipe_too=bool(item.model)) | arguments | extra
    base, own = recipe.settings[stage], item.settings
    if str((base | own | over).get("distill_method") or "switch_kd") == "switch_kd":
        base = recipe.switch_kd[stage] | base
    adapters = _is_adapters((base | own | over).get("training_recipe"))
    if adapters and _is_adapters((base | own).get("training_recipe")):
        settings = base | _adapters(recipe, stage, base | own) | own
    elif adapters:  # requested outside the recipe, whose learning rates are for full weights
        settings = base | own | _adapters(recipe, stage, over)
    else:
        settings = base | own
    if not (settings | over).get("teacher_path"):
        over = {name: value for name, value in over.items() if name not in DISTILLATION or name in extra}
    if not adapters:
        over = {name: value for name, value in over.items() if name not in ADAPTERS or name in extra}
    settings = {name: value for name, value in (settings | over).items() if not is_unset(value)}
    return _command(settings, over, request, title)


def _from_variables(variables: Mapping[str, str], *, recipe_too: bool) -> Settings:
    known = {name: TRAINING[name] for name in variables if name in TRAINING and name != "PRETRAINED_PATH"}
    return {
        variable.setting: variables[name]
        for name, variable in known.items()
        if variable.setting and (recipe_too or not variable.recipe_only)
    }


def _adapters(recipe: Recipe, stage: str, settings: Settings) -> Settings:
    return {"tune_type_llm": str(settings["training_recipe"]).split("_")[0]} | recipe.adapters[stage]


def _is_adapters(recipe: object) -> bool:
    return recipe == "lora" or str(recipe).startswith("qlora")


def _command(settings: Settings, given: Settings, request: Request, title: str) -> Training:
    variables, devices = request.variables, request.devices
    if "output_dir" not in settings:
        raise ValueError("output_dir is missing: pass --output_dir FOLDER.")
    settings = {name: request.expand(value) if isinstance(value, str) else value for name, value in settings.items()}
    launcher = find_launcher(variables, devices, _text(settings, "zero"))
    batch, usual = _batch(settings, given, launcher.processes)
    words = launch_words(variables, devices, launcher, request.python)
    flags = {name: value for name, value in settings.items() if name not in LAUNCH_SETTINGS}
    flags |= {
        "per_device_train_batch_size": str(batch.per_device),
        "gradient_accumulation_steps": str(batch.accumulate),
    }
    if {"eval_data_path", "eval_share"} & flags.keys():
        flags.setdefault("eval_strategy", "steps")
    else:
        flags.pop("eval_steps", None)
    if launcher.deepspeed is not None:
        flags["deepspeed"] = launcher.deepspeed
    if not {"bf16", "fp16"} & flags.keys():
        precision = _text(settings, "precision") or ("bf16" if devices.kind == "cuda" else "fp32")
        if precision not in ("bf16", "fp16", "fp32"):
            raise ValueError(f"PRECISION is {precision!r}; it must be bf16, fp16 or fp32.")
        if precision != "fp32":
            flags[precision] = "True"
    if devices.kind == "cpu":
        flags.setdefault("use_cpu", "True")
    flags.setdefault("dataloader_num_workers", "0" if devices.kind == "cpu" else "8")
    flags.setdefault("gradient_checkpointing", "False" if devices.kind == "cpu" else "True")
    for variable in TRAINING.values():  # flags and settings are checked like the variable of the same setting
        value = flags.get(variable.setting)
        wrong = variable.wrong(value) if isinstance(value, str) and value else None
        if wrong is not None:
            raise ValueError(f"--{variable.setting} is {value!r}; it must be {wrong}.")
    argv = [
        word for name, value in flags.items() for word in (f"--{name}", *([value] if isinstance(value, str) else value))
    ]
    check_command_line(argv)
    words += argv
    environment = launch_environment(devices, launcher)
    return Training(title, words, environment, batch, usual, str(settings["output_dir"]))


def _batch(settings: Settings, given: Settings, processes: int) -> tuple[Batch, int]:
    """The batch, and the wanted samples per step."""
    total = _count(settings, "global_batch_size")
    at_most = _count(settings, "per_device_batch_size")
    accumulate = _count(settings, "grad_accum")
    exact = at_most if "per_device_batch_size" in given else None
    if accumulate is not None and exact is None and "global_batch_size" not in given:
        exact = at_most or 1
    if total is None:  # a recipe without a global batch size
        exact, accumulate = exact or at_most or 8, accumulate or 1
        total = exact * accumulate * processes
    return batch_of(total, at_most or 8, processes, exact, accumulate), total


def _count(settings: Settings, name: str) -> int | None:
    value = _text(settings, name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1.")
    return int(value)


def _text(settings: Settings, name: str) -> str | None:
    value = settings.get(name)
    if isinstance(value, list):
        raise ValueError(f"{name} takes one value, not {len(value)}.")
    return value
