"""``--to v1``: TinyLLaVA v1's full layout, from any of its layouts or from any checkpoint of transformers' LLaVA."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaConfig, PreTrainedTokenizerBase

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.template import TemplateFactory
from tinyllava_switchkd.io import JsonObject, read_json, write_json
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.model.configuration import TinyLlavaConfig
from tinyllava_switchkd.model.export.chat_template import template_behind
from tinyllava_switchkd.model.export.files import empty_folder, read_by_older_versions, whole_folder
from tinyllava_switchkd.model.export.hf_llava import CONNECTORS, RECORD, STRATEGIES, TOWERS
from tinyllava_switchkd.model.fields import check_config
from tinyllava_switchkd.model.layouts import add_stop_tokens, made
from tinyllava_switchkd.model.llm import open_tokenizer
from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava_switchkd.model.processor import check_image_processor
from tinyllava_switchkd.model.saving import save_pretrained_model
from tinyllava_switchkd.model.weights import COMPUTED_BUFFERS, read_weights, refuse, resolve_folder

# transformers 5's names -> the hub's -> v1's.
NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(vision_model\.)?", "vision_tower._vision_tower.vision_model."),
)


def is_hf_llava(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of transformers' LLaVA."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "llava"


def from_hf_llava(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    template: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Convert a checkpoint of transformers' LLaVA to TinyLLaVA v1's layout; the exact inverse of `to_hf_llava`.

    Args:
        source: the checkpoint, a folder or a name on the hub.
        output_dir: an empty folder, or one that does not exist yet.
        template: conversation template; None finds the one that matches the chat template.
        dtype: of the weights; None keeps the checkpoint's own.

    Raises:
        ValueError: TinyLLaVA cannot represent the model, or no conversation template matches its chat template.
    """
    empty_folder(output_dir)
    folder = resolve_folder(source)
    fields, record = _read_config(folder / "config.json")
    reason = why_not_tinyllava(fields)
    if reason is not None:
        raise ValueError(f"{source} cannot be converted: {reason}")
    tokenizer = open_tokenizer(str(folder))
    template = (
        template
        or record.get("template")
        or record.get("conv_version")
        or template_behind(tokenizer.chat_template or "", tokenizer)
    )
    if template is None:
        raise ValueError(
            f"The chat template of {source} is none of ours ({', '.join(TemplateFactory.list())}); register a "
            f"conversation template that gives the same text, or pass --template with a similar one."
        )
    settings_file, settings = _image_settings(folder)
    tensors = read_weights(folder)
    if tensors is None:
        raise FileNotFoundError(f"{folder} holds no weights (model.safetensors or pytorch_model.bin).")
    tensors = _tensors(tensors, fields, record, source)
    config = _config(fields, record, tensors, tokenizer, template, bool(settings.pop("do_pad", False)))
    if not record:  # to ours, the export added the template's
        add_stop_tokens(config, folder / "generation_config.json")
    model = TinyLlavaForConditionalGeneration.from_tensors(config, tensors, source, dtype=dtype)
    kind = type(model.vision_tower.default_image_processor())
    image_processor = made(lambda: kind(**settings), settings_file, "an image processor")
    check_image_processor(image_processor, model.image_size, settings_file)
    tokenizer.chat_template = record.get("chat_template", tokenizer.chat_template)
    tokenizer.padding_side = config.tokenizer_padding_side
    with whole_folder(folder, output_dir) as returned:
        save_pretrained_model(model, tokenizer, image_processor, returned)
        if record.get("adds_image_token"):
            _forget_image_token(returned)
        read_by_older_versions(returned)


def to_v1(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    template: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Convert a TinyLLaVA checkpoint of any layout (split, LoRA, TinyLLaVABench) to v1's full layout."""
    empty_folder(output_dir)
    model, tokenizer, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=dtype)
    with whole_folder(source, output_dir) as folder:
        save_pretrained_model(model, tokenizer, image_processor, folder, template=template)
        read_by_older_versions(folder)


def why_not_tinyllava(fields: JsonObject) -> str | None:
    """Why TinyLLaVA cannot represent a LLaVA with this configuration, in one sentence; None if it can."""
    tower = fields.get("vision_config", {}).get("model_type", "clip_vision_model")
    if tower not in TOWERS:
        return f"its vision tower is {tower!r}, not one of {', '.join(TOWERS)}."
    if not isinstance(fields.get("vision_feature_layer", -2), int):
        return "it reads several layers of its vision tower."
    if not fields.get("multimodal_projector_bias", True):
        return "its projector has no bias."
    if fields.get("projector_hidden_act", "gelu") not in CONNECTORS.values():
        return f"its projector's activation is {fields['projector_hidden_act']!r}, not 'gelu'."
    return None


def _read_config(file: Path) -> tuple[JsonObject, JsonObject]:
    """LLaVA's configuration with transformers' defaults for absent fields, and what our export recorded in it.

    Raises:
        ValueError: a field has a wrong value.
    """
    fields = read_json(file)
    record = fields.get(RECORD) or {}
    if not isinstance(record, dict):
        raise ValueError(f"{file}: {RECORD} is {record!r}, not an object of fields.")
    parts = {name: fields.get(name) for name in ("text_config", "vision_config")}
    check_config({"connector_type": "linear", **record, **parts}, file)
    return made(lambda: LlavaConfig.from_dict(fields).to_dict(), file), record


def _image_settings(folder: Path) -> tuple[Path, JsonObject]:
    """Settings of the image processor and their file, which is one of the two that transformers may write."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        settings = read_json(file)
    else:
        file = folder / "processor_config.json"
        settings = read_json(file).get("image_processor")
        if not isinstance(settings, dict):
            raise ValueError(f"{file} has no settings of an image_processor; take the base model's file.")
    if not settings.get("do_center_crop", True):
        settings.pop("crop_size", None)
        settings.pop("do_center_crop")
    for name in ("image_processor_type", "processor_class"):
        settings.pop(name, None)
    return file, settings


def _tensors(tensors: dict[str, Tensor], fields: JsonObject, record: JsonObject, source: object) -> dict[str, Tensor]:
    """The weights under v1's names, without the embedding row that the export added."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if COMPUTED_BUFFERS.search(name):
            continue
        if name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            tensor = tensor[: record.get("vocab_size")]
        named[name] = tensor
    needed = {
        f"multi_modal_projector.{layer}.{kind}" for layer in ("linear_1", "linear_2") for kind in ("weight", "bias")
    }
    refuse(source, {"language_model.model.embed_tokens.weight", *needed} - named.keys(), (), ())
    projector = {
        name.removeprefix("multi_modal_projector."): named.pop(name)
        for name in list(named)
        if name.startswith("multi_modal_projector.")
    }
    weight, bias, weight2, bias2 = (
        projector[f"{layer}.{kind}"] for layer in ("linear_1", "linear_2") for kind in ("weight", "bias")
    )
    if fields.get("projector_hidden_act", "gelu") == "gelu":
        layers = {"0.weight": weight, "0.bias": bias, "2.weight": weight2, "2.bias": bias2}
    else:  # two linear layers without an activation are one
        prefix = "0." if record.get("connector_type", "linear").startswith("mlp") else ""
        layers = {f"{prefix}weight": weight2 @ weight, f"{prefix}bias": weight2 @ bias + bias2}
    return named | {f"connector._connector.{name}": tensor for name, tensor in layers.items()}


def _config(
    fields: JsonObject,
    record: JsonObject,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    pad: bool,
) -> TinyLlavaConfig:
    text, vision = dict(fields["text_config"]), dict(fields["vision_config"])
    text["vocab_size"] = len(tensors["language_model.model.embed_tokens.weight"])
    if "language_model.lm_head.weight" not in tensors:
        text["tie_word_embeddings"] = True
    for part in (text, vision):
        part.pop("architectures", None)
    if "siglip" in vision.get("model_type", "") and not any(".vision_model.head." in name for name in tensors):
        vision["vision_use_head"] = False  # many LLaVAs lack SigLIP's pooling head
    own = {k: v for k, v in record.items() if k not in ("vocab_size", "chat_template", "adds_image_token")}
    own.setdefault("connector_type", "mlp2x_gelu" if fields.get("projector_hidden_act", "gelu") == "gelu" else "linear")
    own.setdefault("tokenizer_model_max_length", min(tokenizer.model_max_length, text["max_position_embeddings"]))
    own.setdefault("pad_token", tokenizer.pad_token)
    own.setdefault("pad_token_id", tokenizer.pad_token_id)
    strategy = fields.get("vision_feature_select_strategy", "default")
    own |= {
        "template": template,
        "image_aspect_ratio": "pad" if pad else "square",
        "vision_feature_layer": fields.get("vision_feature_layer", -2),
        "vision_feature_select_strategy": next(ours for ours, theirs in STRATEGIES.items() if theirs == strategy),
    }
    return TinyLlavaConfig(text_config=text, vision_config=vision, **own)


def _forget_image_token(folder: Path) -> None:
    """Remove ``<image>`` from a saved tokenizer; in TinyLLaVA it is not a token."""
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        fields = read_json(folder / name)
        entries = fields.get(key) or {}
        if isinstance(entries, list):
            fields[key] = [entry for entry in entries if entry["content"] != DEFAULT_IMAGE_TOKEN]
        elif entries:
            fields[key] = {k: entry for k, entry in entries.items() if entry["content"] != DEFAULT_IMAGE_TOKEN}
        write_json(folder / name, fields, sort_keys=True)
