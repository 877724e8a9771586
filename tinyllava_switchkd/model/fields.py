"""Validation of a checkpoint's ``config.json`` and ``adapter_config.json``: the type and range of each field.

A wrong value is refused before any weight is read; the error names the field, the file and the allowed values. Numbers
that do not fit each other are found when the model is built on the meta device, see `modeling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.model.vision_tower.base import SELECT_STRATEGIES

Rule = tuple[str, Callable[[Any], bool]]
"""The allowed values in words, and a function that tests a value."""


def whole(low: int, high: int) -> Rule:
    return f"a whole number from {low} to {high}", lambda value: _is_int(value) and low <= value <= high


def real(low: float, high: float) -> Rule:
    return f"a number from {low:g} to {high:g}", lambda value: _is_number(value) and low <= value <= high


def one_of(*names: str) -> Rule:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


def of(kind: type, words: str) -> Rule:
    return words, lambda value: isinstance(value, kind)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


TEXT, FLAG, OBJECT = of(str, "text"), of(bool, "true or false"), of(dict, "an object of fields")
NAMES: Rule = ("a list of names", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
TOKEN: Rule = (
    "a token's number, or a list of them",
    lambda value: all(_is_int(v) and -1 <= v < 2**24 for v in (value if isinstance(value, list) else [value])),
)
DTYPE = one_of(*(prefix + name for prefix in ("", "torch.") for name in ("float32", "float16", "bfloat16", "float64")))

OWN: dict[str, Rule] = {
    **dict.fromkeys(("llm_model_name_or_path", "tokenizer_name_or_path", "cache_dir", "connector_type"), TEXT),
    **dict.fromkeys(("vision_model_name_or_path", "vision_model_name_or_path2", "pad_token"), TEXT),
    **dict.fromkeys(("template", "conv_version"), TEXT),
    **dict.fromkeys(("tune_type_llm", "tune_type_connector", "tune_type_vision_tower", "_name_or_path"), TEXT),
    **dict.fromkeys(("text_config", "vision_config", "qformer_config"), OBJECT),
    **dict.fromkeys(("use_cache", "tokenizer_use_fast"), FLAG),
    "architectures": NAMES,
    "vision_feature_layer": whole(-1000, 1000),
    "vision_feature_select_strategy": one_of(*SELECT_STRATEGIES),
    "image_aspect_ratio": one_of("square", "pad"),
    "num_queries": whole(1, 100_000),
    "resampler_hidden_size": whole(1, 2**20),
    "num_resampler_layers": whole(1, 1000),
    "tokenizer_padding_side": one_of("right", "left"),
    "tokenizer_model_max_length": whole(1, 2**31),
    "tune_vision_tower_from_layer": whole(-1000, 1000),
    # never used: they follow from the parts
    "vision_hidden_size": whole(1, 2**20),
    "image_token_index": whole(-(2**24), 2**24),
    "ignore_index": whole(-(2**24), 2**24),
}
"""TinyLLaVA's own fields."""

PART: dict[str, Rule] = {
    "model_type": TEXT,
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "embed_dim", "head_dim"), whole(1, 2**20)),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), whole(1, 2000)),
    "vocab_size": whole(1, 2**24),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), whole(1, 2**31)),
    "original_max_position_embeddings": whole(1, 2**31),
    **dict.fromkeys(("image_size", "patch_size"), whole(1, 2**14)),
    "num_patches": whole(1, 2**20),
    "num_channels": whole(3, 3),
    "num_prefix_tokens": whole(0, 1000),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), real(0, 0.1)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), real(1, 1e12)),
    "partial_rotary_factor": real(0.01, 1),
    "initializer_range": real(0, 100),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "drop_path_rate"), real(0, 1)),
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attention_probs_dropout_prob"), real(0, 1)),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "attention_bias", "use_swiglu_ffn", "qkv_bias"), FLAG),
    **dict.fromkeys(("hidden_act", "hidden_activation"), ("an activation's name", lambda v: v in tuple(ACT2FN))),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKEN),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "vision_cfg", "model_args", "dinov2_config"), OBJECT),
    "architectures": NAMES,
    "layer_types": NAMES,
    "mlp_ratio": real(0.01, 1000),
    "layerscale_value": real(-1e6, 1e6),
    **dict.fromkeys(("architecture", "interpolation", "model_name_or_path", "model_name_or_path2"), TEXT),
    **dict.fromkeys(
        ("image_mean", "image_std"),
        ("three numbers", lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_number, v))),
    ),
}
"""Fields of language models and vision towers, at any depth."""

FETCHED = (
    "pretrained",
    "checkpoint_path",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "pretrained_strict",
)
"""Arguments of timm that make it fetch or open other files; a checkpoint does not need them."""

ADAPTER: dict[str, Rule] = {
    "peft_type": one_of("LORA"),
    "r": whole(1, 2**16),
    "lora_alpha": real(0, 1e9),
    "lora_dropout": real(0, 1),
    "bias": one_of("none", "all", "lora_only"),
    "target_modules": ("a name or a list of names", lambda v: isinstance(v, str) or NAMES[1](v)),
    "modules_to_save": NAMES,
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), OBJECT),
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "inference_mode"), FLAG),
    "base_model_name_or_path": TEXT,
}


def check_config(fields: JsonObject, file: Path) -> None:
    """Refuse a TinyLLaVA configuration with a wrong field.

    Raises:
        ValueError: names the field, the value, the allowed values and the file.
    """
    if fields.get("quantization_config") is not None:
        raise ValueError(
            f"{file} has a quantization_config, but checkpoints are read in full precision; load the original and ask "
            f"for load_4bit or load_8bit."
        )
    if not isinstance(fields.get("connector_type"), str):
        raise ValueError(f"{file}: connector_type is {fields.get('connector_type')!r}, not the name of a connector.")
    _check(fields, {**PART, **OWN}, file, "")
    for name in ("text_config", "vision_config", "qformer_config"):
        _check_nested(fields.get(name) or {}, file, f"{name}.")
    args = (fields.get("vision_config") or {}).get("model_args") or {}
    fetched = [name for name in args if name in FETCHED]
    names = [(fields.get("vision_config") or {}).get("architecture")]
    names.append(((fields.get("vision_config") or {}).get("vision_cfg") or {}).get("timm_model_name"))
    if fetched or any(isinstance(name, str) and (":" in name or "/" in name) for name in names):
        what = f"vision_config.model_args.{fetched[0]}" if fetched else "vision_config's architecture"
        raise ValueError(f"{file}: {what} would fetch or open other files; a checkpoint holds all it needs.")


def check_adapter(fields: JsonObject, file: Path) -> None:
    """Refuse an ``adapter_config.json`` that does not describe a LoRA adapter.

    Raises:
        ValueError: names the field, the value, the allowed values and the file.
    """
    for name in ("peft_type", "r", "lora_alpha", "target_modules"):
        if fields.get(name) is None:
            raise ValueError(f"{file} has no {name}; it is not the file that peft writes for a LoRA adapter.")
    if fields.get("megatron_config") is not None:
        raise ValueError(f"{file} has a megatron_config, for which peft would import a module that the file names.")
    _check(fields, ADAPTER, file, "")


def check_generation(fields: JsonObject, file: Path) -> None:
    """Refuse wrong values among the fields of a ``generation_config.json`` that are read.

    Raises:
        ValueError: names the field, the value, the allowed values and the file.
    """
    _check(fields, PART, file, "")


def _check_nested(fields: object, file: Path, where: str) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: {where.rstrip('.')} is {_shown(fields)}, not an object of fields.")
    _check(fields, PART, file, where)
    for name, value in fields.items():
        if isinstance(value, dict) and name not in ("id2label", "label2id"):
            _check_nested(value, file, f"{where}{name}.")
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if width and heads and not fields.get("head_dim") and width % heads:
        raise ValueError(f"{file}: {where}hidden_size {width} is not divisible by its num_attention_heads {heads}.")
    if fields.get("image_size") and fields.get("patch_size") and fields["image_size"] < fields["patch_size"]:
        raise ValueError(
            f"{file}: {where}image_size {fields['image_size']} is smaller than one patch of {fields['patch_size']}."
        )


def _check(fields: JsonObject, rules: Mapping[str, Rule], file: Path, where: str) -> None:
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{file}: {where}{name} is {value}, not a finite number.")
        if value is None or name not in rules:
            continue  # null is the default
        words, is_good = rules[name]
        if not is_good(value):
            raise ValueError(f"{file}: {where}{name} is {_shown(value)}, not {words}.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
