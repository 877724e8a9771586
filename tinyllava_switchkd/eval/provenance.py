"""How answers were made: the `run` object that goes with every result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_switchkd import __version__
from tinyllava_switchkd.constants import SPLIT_FOLDERS
from tinyllava_switchkd.io import digest_of_files

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig

PROMPT_PROTOCOL = "LLaVA-1.5: one turn, the image first, then the question file's text as it is"

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "timm", "open_clip_torch", "pillow")

_FILES = (
    *("model*.safetensors", "pytorch_model*.bin", "adapter_model*.safetensors", "adapter_model*.bin"),
    *("config.json", "adapter_config.json", "preprocessor_config.json", "generation_config.json"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
)


def checkpoint_digest(folder: str | Path) -> str:
    """SHA-256 over all that a checkpoint's answers depend on: weights, configuration, tokenizer, image processor.

    Optimiser states, logs and the model card are left out, so that they may come and go.

    Args:
        folder: the checkpoint, of any layout (parts in folders of their own included).

    Returns:
        ``sha256:`` and 64 hexadecimal digits.
    """
    folder = Path(folder)
    places = ("", *(f"{part}/" for part in SPLIT_FOLDERS))
    found = {file for place in places for name in _FILES for file in folder.glob(place + name) if file.is_file()}
    return f"sha256:{digest_of_files(folder, found)}"


def package_versions() -> dict[str, str]:
    """Versions of what takes part in an answer, Python's included; packages that are not installed are left out."""
    versions = {"python": platform.python_version(), "tinyllava_switchkd": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_parts(config: TinyLlavaConfig) -> dict[str, str | None]:
    """Language model, vision tower and connector of a checkpoint."""
    return {
        "language_model": config.llm_model_name_or_path,
        "vision_tower": config.vision_model_name_or_path,
        "connector": config.connector_type,
    }
