"""Recipes: YAML files that give the stages of a training and their settings.

Values are written as on a command line: `1e-3`, `True`, `mlp2x_gelu`; `null` removes a setting::

    extends: tinyllava          # another recipe; its settings apply unless this one overrides them
    version: mine               # part of the names of output folders
    models:
      teacher: Qwen/Qwen2.5-3B
      student: Qwen/Qwen2.5-0.5B
    settings:                   # of all stages: flags of the training entry, and `LAUNCH_SETTINGS`
      vision_tower: google/siglip-so400m-patch14-384
    defaults:                   # of all stages of one kind
      distill: {tune_type_vision_tower: full}
    stages:                     # in order
      - stage: pretrain
        model: student
        settings: {learning_rate: 5e-4}
      - stage: distill
        model: student

The package's recipes are in `RECIPES`. Every run writes its own recipe to ``recipe.yaml`` in its output folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tinyllava_switchkd.io import read_text
from tinyllava_switchkd.launch.values import folder_name, word

RECIPES = Path(__file__).parent / "recipes"
KINDS = ("pretrain", "finetune", "distill", "custom")

LAUNCH_SETTINGS = {
    "global_batch_size": "samples per optimiser step, on any number of devices",
    "per_device_batch_size": "samples that a device is expected to hold at a time",
    "grad_accum": "micro-batches per step; by default computed from the two above",
    "precision": "bf16, fp16 or fp32; by default bf16 on a GPU and fp32 on a CPU",
    "zero": "2, 3, 2_offload, a DeepSpeed JSON file, or none",
}
"""Settings that are not flags of the training entry; the launcher converts them to such flags."""

Settings = dict[str, "str | list[str]"]


@dataclass(frozen=True)
class Item:
    """One stage of a recipe.

    Attributes:
        stage: pretrain, finetune or distill; "" if the recipe was written by a run and has all settings.
        model: teacher or student; "" if the settings name the models.
        start: the stage whose output it starts from.
        distills: whether it learns from the teacher; always true for distill.
        settings: settings of this stage only.
    """

    stage: str = ""
    model: str = ""
    start: str = ""
    distills: bool = False
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe, merged with those that it extends.

    Attributes:
        name: the name of its file.
        version: part of the names of output folders.
        models: the language models of teacher and student.
        settings: settings of each kind of stage ("" for a stage without a kind).
        adapters: more settings of each kind of stage if it trains adapters.
        switch_kd: more settings of each kind of stage if its method is Switch-KD.
        stages: the stages in order.
        world: "tiny" if random models and drawn pictures have to be made first.
    """

    name: str
    version: str = ""
    models: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Settings] = field(default_factory=dict)
    adapters: dict[str, Settings] = field(default_factory=dict)
    switch_kd: dict[str, Settings] = field(default_factory=dict)
    stages: tuple[Item, ...] = ()
    world: str = ""


class _Loader(yaml.SafeLoader):
    """Reads all scalars as text; rejects duplicate keys and invalid UTF-8."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, object]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        if any("\ud800" <= char <= "\udfff" for char in node.value):
            raise yaml.constructor.ConstructorError(None, None, "it contains half of a character", node.start_mark)
        return super().construct_scalar(node)


def names() -> list[str]:
    """Names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def path_of(recipe: str) -> Path:
    """The file of a recipe: the package's by name, or any other by path.

    Raises:
        ValueError: there is no such recipe.
    """
    own = RECIPES / f"{recipe}.yaml"
    if folder_name(recipe) is None and own.is_file():
        return own
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.yaml").is_file():  # a run's output folder
        return path / "recipe.yaml"
    near = difflib.get_close_matches(recipe, names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"use a file, or one of {', '.join(names())}."
    raise ValueError(f"There is no recipe {recipe}; {hint}")


def read_recipe(recipe: str) -> Recipe:
    """Read a recipe and those that it extends.

    Raises:
        ValueError: it does not exist, is not YAML, or has an unknown part.
        FileNotFoundError: it cannot be read.
    """
    return _read(path_of(recipe), ())


def _read(path: Path, seen: tuple[Path, ...]) -> Recipe:
    if path in seen:
        raise ValueError(f"The recipe {path} extends itself.")
    try:
        content = yaml.load(read_text(path, what="recipe"), Loader=_Loader)
    except yaml.reader.ReaderError as error:
        where = f"character {error.position + 1}, U+{error.character:04X}"
        raise ValueError(f"{path}, {where}: not a recipe ({error.reason}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not a recipe ({getattr(error, 'problem', None) or error}).") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read.") from None
    content = _mapping(content, path, "the file")
    _known(
        content, ("extends", "version", "models", "settings", "defaults", "stages", "world", "machine"), path, "part"
    )
    base = Recipe("")
    if content.get("extends"):
        base = _read(_beside(path, _text(content, "extends", path)), (*seen, path))
    settings = _settings(content.get("settings", {}), path, "settings")
    defaults = _mapping(content.get("defaults", {}), path, "defaults")
    _known(defaults, KINDS, path, "stage")
    layers: dict[str, dict[str, Settings]] = {"settings": {}, "adapters": {}, "switch_kd": {}}
    for kind in ("", *KINDS):
        of_kind = dict(_mapping(defaults.get(kind, {}), path, f"defaults of {kind}"))
        for name in ("adapters", "switch_kd"):
            layers[name][kind] = getattr(base, name).get(kind, {}) | _settings(of_kind.pop(name, {}), path, name)
        own = settings | _settings(of_kind, path, f"defaults of {kind}")
        layers["settings"][kind] = base.settings.get(kind, {}) | own
    models = _mapping(content.get("models", {}), path, "models")
    _known(models, ("teacher", "student"), path, "model")
    version = _text(content, "version", path, base.version)
    if version and folder_name(version):
        raise ValueError(f"{path}: version is {version!r}; it must be {folder_name(version)}.")
    stages = content.get("stages")
    if stages is not None and (not isinstance(stages, list) or not stages):
        raise ValueError(f"{path}: stages must be a list of stages.")
    return Recipe(
        name=path.stem,
        version=version,
        models=base.models | {who: _text(models, who, path) for who in models},
        **layers,
        stages=base.stages if stages is None else tuple(_item(item, path) for item in stages),
        world=_text(content, "world", path, base.world, ("tiny",)),
    )


def _beside(path: Path, name: str) -> Path:
    """The file of a recipe that the recipe `path` extends: in the same folder, or the package's."""
    neighbour = path.parent / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    return neighbour if neighbour.is_file() else path_of(name)


def _item(content: object, path: Path) -> Item:
    content = _mapping(content, path, "a stage")
    _known(content, ("stage", "model", "start", "distills", "settings"), path, "part of a stage")
    stage = _text(content, "stage", path, choices=KINDS[:3])
    model = _text(content, "model", path, choices=("teacher", "student"))
    start = _text(content, "start", path, choices=KINDS[:3])
    distills = _text(content, "distills", path, choices=("True", "False", "true", "false")).lower()
    settings = _settings(content.get("settings", {}), path, f"settings of {stage or 'the stage'}")
    return Item(stage, model, start, distills == "true" or stage == "distill", settings)


def _settings(content: object, path: Path, what: str) -> Settings:
    settings: Settings = {}
    for name, value in _mapping(content, path, what).items():
        if word(name) is not None:
            raise ValueError(f"{path}, {what}: {name!r} is not a valid name of a setting.")
        if not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))):
            raise ValueError(f"{path}, {what}: {name} must be a value, or a list of values, without a YAML tag.")
        if setting_name(name) in settings:
            raise ValueError(f"{path}, {what}: {name} is set twice, in two spellings of {setting_name(name)}.")
        settings[setting_name(name)] = value
    return settings


def is_unset(value: str | list[str]) -> bool:
    """Whether a value removes its setting."""
    return value in ("", "null", "~")


SAME = {
    "per_device_train_batch_size": "per_device_batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "deepspeed": "zero",
    "conv_version": "template",
    "conv_mode": "template",
}
"""Other names of settings: flags that the launcher computes itself, and names from TinyLLaVA v1 and LLaVA."""


def setting_name(name: str) -> str:
    """The canonical name of a setting."""
    name = name.replace("-", "_")
    return SAME.get(name, name)


def _mapping(content: object, path: Path, what: str) -> Mapping[str, object]:
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {what} must be names with values, like 'learning_rate: 1e-3'.")
    return content


def _text(
    content: Mapping[str, object], name: str, path: Path, default: str = "", choices: tuple[str, ...] = ()
) -> str:
    value = content.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"{path}: {name} must be a single value.")
    if value and choices and value not in choices:
        raise ValueError(f"{path}: {name} is {value!r}; it must be {', '.join(choices)}.")
    return value


def _known(content: Mapping[str, object], names: tuple[str, ...], path: Path, what: str) -> None:
    for name in content:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}."
            raise ValueError(f"{path}: there is no {what} {name!r}; {hint}")
