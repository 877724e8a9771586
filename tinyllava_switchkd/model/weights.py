"""Read weights from disk or the hub: all layouts of TinyLLaVA v1, mapped to one set of names."""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyllava_switchkd.cli import first_line
from tinyllava_switchkd.constants import SPLIT_FOLDERS
from tinyllava_switchkd.io import read_json
from tinyllava_switchkd.model.trust import refuse_code

# Buffers that older versions of transformers saved and newer ones compute.
COMPUTED_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.(cos|sin)_cached|rotary_emb\.inv_freq|masked_bias)$")
# TinyLLaVABench (the code before v1) -> v1, as in v1's own converter.
LEGACY_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower._vision_tower."),
    (r"^model\.mm_projector\.", "connector._connector."),
    (r"^model\.(embed_tokens|layers|norm|final_layernorm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_folder(name_or_path: str | os.PathLike[str], **hub: Any) -> Path:
    """The local folder of a model: the path itself, or a downloaded hub repository.

    Args:
        name_or_path: a folder, or a repository name.
        hub: arguments of `huggingface_hub.snapshot_download` (`cache_dir`, `revision`, `token`, `local_files_only`,
            ...).

    Raises:
        FileNotFoundError: it is neither.
        ValueError: it brings code of its own, see `refuse_code`.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        refuse_code(folder)
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = str(name_or_path)
    hub = {key: value for key, value in hub.items() if value is not None}
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, **hub))
        if _lacks_safetensors(folder):  # many repositories have both formats
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin"], **hub))
    except HFValidationError as error:
        raise FileNotFoundError(f"There is no folder {name!r} (nor is it a name on the hub).") from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"There is no folder {name!r}, and it could not be loaded from the hub: {first_line(error)}"
        ) from error
    refuse_code(folder)
    return folder


def _lacks_safetensors(folder: Path) -> bool:
    """Whether a downloaded folder has no weights in safetensors, or a part of the split layout has none."""
    found = {file.parent for file in folder.rglob("*.safetensors") if not file.name.startswith("adapter_model")}
    parts = {place.parent / part for place in found if place.name in SPLIT_FOLDERS for part in SPLIT_FOLDERS}
    return not found or not parts <= found


def read_weights(folder: Path) -> dict[str, Tensor] | None:
    """All tensors of the safetensors or ``.bin`` files in a folder, by name; None if there are no such files.

    Tensors are memory-mapped on the CPU. Pickles may hold only tensors (`weights_only`).
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            names = shard_names(index)
        elif (folder / f"{stem}{suffix}").is_file():
            names = [f"{stem}{suffix}"]
        elif any(folder.glob(f"{stem}-*-of-*{suffix}")):
            raise FileNotFoundError(f"{folder} has shards of weights, but not their index {index.name}.")
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{index} names {name}, which does not exist: the checkpoint is incomplete.")
            tensors.update(read_file(folder / name))
        return tensors
    return None


def shard_names(index: Path) -> list[str]:
    """The files in an index of shards.

    Raises:
        ValueError: it is not an index, or names files outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map of tensors to files; it was not written by transformers.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{index} names the file {name!r}, which is not a plain file name.")
    return sorted(set(weight_map.values()))


def refuse_unusable(tensors: Mapping[str, Tensor], source: object, parameters: Collection[str] | None = None) -> None:
    """Raise a ValueError that names the first weight with NaNs, infinities or integers.

    Only the minimum and maximum of each tensor are computed (both are NaN if any value is); nothing is copied.

    Args:
        tensors: weights by name.
        source: where they came from.
        parameters: names of parameters, which may not be integers, unlike buffers; None means all are parameters.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            if parameters is None or name in parameters:
                raise ValueError(
                    f"The weights of {source} cannot be used: {name} has dtype "
                    f"{str(tensor.dtype).removeprefix('torch.')}, not a floating-point one."
                )
        elif tensor.numel() and tensor.device.type != "meta":
            least, greatest = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
            if not (math.isfinite(least) and math.isfinite(greatest)):
                bad = (~torch.isfinite(tensor.float())).sum()
                raise ValueError(
                    f"The weights of {source} cannot be used: {int(bad)} of {tensor.numel()} numbers in {name} are NaN "
                    f"or infinite; take an earlier checkpoint."
                )


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a pickle of plain tensors with any other suffix.

    Raises:
        ValueError: it is damaged, or a pickle that holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before PyTorch 1.6 cannot be memory-mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        with open(file, "rb") as stream:
            is_pointer = stream.read(24).startswith(b"version https://git-lfs")
        if is_pointer:
            reason = "it is only a git-lfs pointer to the weights, fetch them with 'git lfs pull'"
        elif file.suffix == ".safetensors":
            reason = f"it is cut off or damaged ({error})"
        else:
            reason = "it is cut off, damaged, or a pickle of more than tensors (whose code is never run)"
        raise ValueError(f"The weights in {file} cannot be read: {reason}.") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"The weights in {file} cannot be read: it holds something other than named tensors.")
    return tensors


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter, judged by its files and not by its name."""
    return (folder / "adapter_config.json").is_file()


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The tensors of a TinyLLaVA checkpoint of any layout, under the names of v1's full layout.

    Raises:
        FileNotFoundError: the folder, or one of its parts, holds no weights.
    """
    tensors = read_weights(folder)
    if tensors is not None:
        return normalise_keys(tensors)
    if not any((folder / part).is_dir() for part in SPLIT_FOLDERS):
        raise FileNotFoundError(
            f"{folder} holds no weights: neither model.safetensors, nor pytorch_model.bin, nor the folders "
            f"{', '.join(SPLIT_FOLDERS)} of the split layout."
        )
    tensors = {}
    for part, prefix in SPLIT_FOLDERS.items():
        weights = read_weights(folder / part)
        if weights is None:
            raise FileNotFoundError(f"{folder / part} holds no weights (model.safetensors or pytorch_model.bin).")
        tensors.update({prefix + name: tensor for name, tensor in weights.items()})
    return normalise_keys(tensors)


def normalise_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of TinyLLaVABench, of peft's base layers and of transformers 5 to v1's names.

    transformers 5 drops the ``vision_model.`` level of SigLIP and CLIP; it is added again.
    """
    legacy = any(name.startswith("model.mm_projector.") for name in tensors)
    flat_tower = any(
        re.match(r"vision_tower\._vision_tower\.embeddings\.(patch_embedding|position_embedding)\.", name)
        for name in tensors
    )
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.replace(".base_layer.", ".")
        if legacy:
            for pattern, replacement in LEGACY_NAMES:
                name = re.sub(pattern, replacement, name)
        if flat_tower:
            name = re.sub(r"^vision_tower\._vision_tower\.", "vision_tower._vision_tower.vision_model.", name)
        if not COMPUTED_BUFFERS.search(name):
            named[name] = tensor
    return named


def refuse(source: object, missing: Iterable[str], unexpected: Iterable[str], wrong_shape: Iterable[str]) -> None:
    """Raise a ValueError that names the weights that do not fit, if there are any."""
    parts = [
        f"{len(names)} weights {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in (
            ("are missing", sorted(missing)),
            ("are not expected", sorted(unexpected)),
            ("have another shape", sorted(wrong_shape)),
        )
        if names
    ]
    if parts:
        raise ValueError(f"The weights of {source} do not fit the configuration: {'; '.join(parts)}.")


def read_connector(source: str | Path) -> dict[str, Tensor]:
    """A connector's tensors, under names from ``_connector.`` on, from its folder or file or a whole checkpoint."""
    path = Path(source).expanduser()
    if path.is_file():
        tensors = read_file(path)
    else:
        folder = resolve_folder(source)
        tensors = read_weights(folder) or read_weights(folder / "connector") or {}
        if not tensors:
            raise FileNotFoundError(f"{folder} holds no connector (model.safetensors or pytorch_model.bin).")
    named = normalise_keys(tensors)
    # As in v1, everything before "_connector." is cut, for both a connector's own file and a whole checkpoint.
    return {name[name.index("_connector.") :]: tensor for name, tensor in named.items() if "_connector." in name}


def own_memory(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Copy the memory that a module shares with `tensors`.

    These are mapped from files, so overwriting the checkpoint that a model came from would change or crash the model.
    """
    shared = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for value in (*module.parameters(), *module.buffers()):
        if value.device.type == "cpu" and value.untyped_storage().data_ptr() in shared:
            value.data = value.data.clone()


@contextmanager
def without_load_report() -> Iterator[None]:
    """Suppress transformers' table of weights that do not fit, which advises ignoring them; see `refuse`."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(is_other)
    try:
        yield
    finally:
        reporter.removeFilter(is_other)


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Build models without partitioning their parameters, even if DeepSpeed ZeRO-3 is configured.

    Under ZeRO-3 transformers partitions parameters while it builds a model, and a frozen teacher outside the engine
    could never gather them. The engine partitions the student itself when it starts.
    """
    from transformers.integrations import deepspeed

    active = deepspeed.deepspeed_config() is not None and deepspeed._hf_deepspeed_config_weak_ref()
    if not active:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(active)
