"""Refuse model folders that ask to run code of their own: only weights and settings are ever read from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING

from tinyllava_switchkd.constants import SPLIT_FOLDERS
from tinyllava_switchkd.io import JsonObject, read_json

OUR_TYPES = ("tinyllava", "tiny_llava")
OUR_CLASSES = ("TinyLlavaConfig", "TinyLlavaForConditionalGeneration")
"""Classes in the ``auto_map`` of TinyLLaVA v1's published checkpoints. This package has these classes, so the code in
such a folder is simply not used."""

CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines")
"""Fields that name Python files (transformers' custom models, generation loops and pipelines)."""


class CodeRefused(ValueError):
    """A folder asks to run code of its own."""


def refuse_code(folder: Path) -> None:
    """Refuse a folder whose settings ask to run code of its own; nothing is imported.

    Checks every field, nested or not, of all files whose names end in ``config.json`` (model, tokenizer, image and
    video processors, generation, adapters), also in the sub-folders of v1's split layout.

    Args:
        folder: a checkpoint, base model, vision tower or adapter.

    Raises:
        ValueError: a file asks for code, or is not JSON.
    """
    for file in sorted([*folder.glob("*config.json"), *folder.glob("*/*config.json")]):
        if file.is_file() and (file.parent == folder or file.parent.name in SPLIT_FOLDERS):
            refuse_code_in(read_json(file), file)
    if (folder / "custom_generate").is_dir():
        raise CodeRefused(_sentence(folder / "custom_generate", "holds a generation loop"))


def refuse_code_in(fields: JsonObject, source: object) -> None:
    """Refuse the fields of one file if they ask for code.

    Raises:
        ValueError: they do.
    """
    for part in objects_in(fields):
        for key in CODE_KEYS:
            if part.get(key) and not (key == "auto_map" and _is_native(part)):
                raise CodeRefused(_sentence(source, f"has the field {key!r}, which names"))


def one_sentence(error: BaseException) -> str:
    """Type and message of another library's exception, in one line of limited length."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def _sentence(source: object, what: str) -> str:
    return (
        f"{source} {what} code of its own, and code that comes with a model is never run; use a model whose classes "
        f"are in this package or in transformers, or write a plugin (docs/extend.md)."
    )


def _is_native(part: JsonObject) -> bool:
    """Whether this package or transformers has all classes in a model's ``auto_map``, under the same model type."""
    auto_map, model_type = part["auto_map"], part.get("model_type")
    if not isinstance(auto_map, dict) or not isinstance(model_type, str):
        return False
    names = [str(value).rpartition(".")[2] for value in auto_map.values()]
    if model_type in OUR_TYPES:
        return all(name in OUR_CLASSES for name in names)
    if model_type not in CONFIG_MAPPING:
        return False
    stem = CONFIG_MAPPING[model_type].__name__.removesuffix("Config")
    return all(name.startswith(stem) and hasattr(transformers, name) for name in names)


def objects_in(value: object) -> Iterator[JsonObject]:
    """All JSON objects in a value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
