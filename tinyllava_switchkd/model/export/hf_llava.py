"""``--to hf-llava``: transformers' `LlavaForConditionalGeneration`, `LlavaProcessor` and a chat template.

The weights get the names of the LLaVA models on the hub (``language_model.model.*``, ``vision_tower.vision_model.*``,
``multi_modal_projector.linear_1.*``), which every version of transformers, vLLM and SGLang reads.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    BaseImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.io import JsonObject, write_json
from tinyllava_switchkd.model.chat import conversation_template, stop_token_ids
from tinyllava_switchkd.model.checkpoint import load_pretrained_model
from tinyllava_switchkd.model.export.chat_template import jinja_template
from tinyllava_switchkd.model.export.files import RECORD, empty_folder, read_by_older_versions, whole_folder
from tinyllava_switchkd.model.export.verify import verify_export
from tinyllava_switchkd.model.saving import save_image_processor

if TYPE_CHECKING:
    from tinyllava_switchkd.model.configuration import TinyLlavaConfig
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava

logger = logging.getLogger(__name__)

TOWERS = ("siglip_vision_model", "clip_vision_model")
CONNECTORS = {"mlp2x_gelu": "gelu", "linear": "linear", "mlp1x_gelu": "linear"}
"""Connectors that LLaVA's two linear layers can represent -> the activation between them."""
STRATEGIES = {"patch": "default", "cls_patch": "full"}


def to_hf_llava(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    template: str | None = None,
    dtype: torch.dtype | str | None = None,
    verify: bool = False,
) -> float | None:
    """Export a TinyLLaVA checkpoint to transformers' LLaVA.

    The visual tokens are the same: LLaVA's strategy ``default`` always drops the tower's first token, as v1's ``patch``
    does, so SigLIP loses its first patch in both (729 -> 728). The processor writes one ``<image>`` for each visual
    token. ``<image>`` takes a spare row of the embeddings, or a new one.

    Args:
        source: a TinyLLaVA checkpoint of any layout, or its name on the hub.
        output_dir: an empty folder, or one that does not exist yet; written completely or not at all.
        template: conversation template; the checkpoint's own if None.
        dtype: of the weights; None keeps the checkpoint's own.
        verify: compare the two models before the folder gets its name, see `verify_export`.

    Returns:
        the largest difference between two logits; None without `verify`.

    Raises:
        ValueError: LLaVA cannot represent the model, its conversation template or its image processing, or the export
            computes something else.
    """
    empty_folder(output_dir)
    model, tokenizer, image_processor, _ = load_pretrained_model(source, device="cpu", dtype=dtype)
    reason = why_not_llava(model)
    if reason is not None:
        raise ValueError(f"{source} cannot be exported: {reason}")
    template = template or conversation_template(model, tokenizer)
    record = record_of(model, tokenizer, template)  # before the tokenizer changes
    image_token = add_image_token(tokenizer)
    processor = _processor(model, tokenizer, image_processor, jinja_template(template, tokenizer))
    tensors = _tensors(model, image_token)
    rows = len(tensors["language_model.model.embed_tokens.weight"])

    with whole_folder(source, output_dir) as folder:
        save_torch_state_dict(tensors, folder)
        write_json(folder / "config.json", _config(model, image_token, rows) | {RECORD: record}, sort_keys=True)
        generation_config_of(model, tokenizer, template, image_token, rows).save_pretrained(folder)
        processor.save_pretrained(folder)
        save_image_processor(processor.image_processor, folder)
        read_by_older_versions(folder)
        if verify:
            del model, tensors  # `verify_export` needs the memory
            return verify_export(source, folder)
    return None


def why_not_llava(model: TinyLlava) -> str | None:
    """Why transformers' LLaVA cannot represent a model, in one sentence; None if it can."""
    config = model.config
    if config.vision_config.model_type not in TOWERS or not hasattr(model.vision_tower.vision_tower, "vision_model"):
        return f"LLaVA's vision tower is one SigLIP or CLIP, not a {type(model.vision_tower).__name__}."
    if config.connector_type.lower() not in CONNECTORS:
        return f"LLaVA's projector is an MLP with two layers, which {config.connector_type!r} is not."
    if hasattr(model.get_input_embeddings(), "embed_scale"):
        return (
            f"{config.text_config.model_type!r} scales its embeddings, and implementations of LLaVA do not agree on "
            f"whether to scale visual tokens, too."
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return f"LLaVA's output head has no bias, but that of {config.text_config.model_type!r} has one."
    return None


def record_of(model: TinyLlava, tokenizer: PreTrainedTokenizerBase, template: str) -> JsonObject:
    """The settings of TinyLLaVA's configuration and tokenizer that LLaVA's do not have."""
    fields = model.config.to_diff_dict()
    for name in ("text_config", "vision_config", "architectures", "dtype", "transformers_version", "model_type"):
        fields.pop(name, None)
    return fields | {
        "template": template,
        "vocab_size": model.config.vocab_size,
        "chat_template": tokenizer.chat_template,
        "adds_image_token": DEFAULT_IMAGE_TOKEN not in tokenizer.get_vocab(),
    }


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make ``<image>`` one special token of the tokenizer and return its id; batches are padded on the left."""
    token = AddedToken(DEFAULT_IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.padding_side = "left"
    return tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)


def _processor(
    model: TinyLlava, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor, chat_template: str
) -> LlavaProcessor:
    """The processor, after comparing it on one image with `ImagePreprocess`.

    Raises:
        ValueError: the pixels or the number of image tokens differ.
    """
    config = model.config
    processor = LlavaProcessor(
        image_processor=_image_processor(image_processor, config),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=STRATEGIES[config.vision_feature_select_strategy],
        num_additional_image_tokens=model.vision_tower.class_tokens,
        chat_template=chat_template,
    )
    noise = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    inputs = processor(images=image, text=DEFAULT_IMAGE_TOKEN, return_tensors="pt")
    count = int((inputs["input_ids"] == processor.image_token_id).sum())
    pixels = ImagePreprocess(image_processor, config)(image)  # [3, H, W]
    if count != model.num_image_tokens or not torch.allclose(inputs["pixel_values"][0], pixels, atol=1e-5):
        raise ValueError(
            f"LLaVA's processor cannot do what this checkpoint's {type(image_processor).__name__} does with "
            f"image_aspect_ratio {config.image_aspect_ratio!r} ({count} image tokens instead of "
            f"{model.num_image_tokens}, or other pixels)."
        )
    return processor


def _image_processor(image_processor: BaseImageProcessor, config: TinyLlavaConfig) -> BaseImageProcessor:
    """The image processor; for ``pad`` it is LLaVA's own, which can pad to a square."""
    settings = image_processor.to_dict() | {"do_convert_rgb": True}
    settings.pop("image_processor_type", None)
    if not settings.get("crop_size"):  # SigLIP does not crop, but LlavaProcessor reads the image size here
        settings |= {"crop_size": settings["size"], "do_center_crop": False}
    if config.image_aspect_ratio == "pad":
        return LlavaImageProcessorPil(**settings, do_pad=True)
    return type(image_processor)(**settings)


def _tensors(model: TinyLlava, image_token: int) -> dict[str, Tensor]:
    """The weights under LLaVA's names, with an embedding row for the image token."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("connector."):
            continue
        tensors[name.replace("vision_tower._vision_tower.", "vision_tower.")] = tensor
    if model.config.text_config.tie_word_embeddings:
        del tensors["language_model.lm_head.weight"]
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in tensors:
            tensors[name] = _with_row(tensors[name], image_token)
    return tensors | _projector(model)


def _with_row(weight: Tensor, index: int) -> Tensor:
    """[V, D] -> [max(V, index + 1), D]; new rows are the mean of all rows.

    In an output head, a mean row's logit is the mean of all logits, so it is never the largest and its probability is
    at most 1 / (V + 1).
    """
    missing = index + 1 - len(weight)
    if missing <= 0:
        return weight
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


def _projector(model: TinyLlava) -> dict[str, Tensor]:
    """The connector as two linear layers; a single one is followed by the identity."""
    own = [parameter.detach() for parameter in model.connector.parameters()]
    if len(own) == 2:
        weight, bias = own
        own += [torch.eye(len(bias), dtype=weight.dtype), torch.zeros_like(bias)]
    names = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    return {f"multi_modal_projector.{name}": tensor for name, tensor in zip(names, own, strict=True)}


def _config(model: TinyLlava, image_token: int, rows: int) -> JsonObject:
    """LLaVA's ``config.json``."""
    config = model.config
    text = config.text_config.to_dict() | {"architectures": [type(model.language_model).__name__], "vocab_size": rows}
    vision = config.vision_config.to_dict()
    for name in ("model_name_or_path", "model_name_or_path2", "_name_or_path"):
        text.pop(name, None)
        vision.pop(name, None)
    llava = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        image_seq_length=model.num_image_tokens,
        projector_hidden_act=CONNECTORS[config.connector_type.lower()],
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=STRATEGIES[config.vision_feature_select_strategy],
        tie_word_embeddings=config.text_config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=model.dtype,
    )
    return llava.to_diff_dict()


def generation_config_of(
    model: TinyLlava, tokenizer: PreTrainedTokenizerBase, template: str, image_token: int, rows: int
) -> GenerationConfig:
    """Greedy decoding that stops where the checkpoint's own answers do."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(stop_token_ids(model, tokenizer, template)) or None,
        pad_token_id=tokenizer.pad_token_id,
        # Suppress only a row that the model did not have; all other logits are the model's.
        suppress_tokens=[image_token] if rows > model.config.vocab_size else None,
    )
