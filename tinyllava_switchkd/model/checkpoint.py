"""Load a checkpoint of any of TinyLLaVA v1's layouts, or build a new model from its parts."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinyllava_switchkd.model.compiled import compile_generation
from tinyllava_switchkd.model.configuration import TinyLlavaConfig
from tinyllava_switchkd.model.connector import ConnectorFactory
from tinyllava_switchkd.model.layouts import image_processor_of, merge_adapter, tokenizer_of
from tinyllava_switchkd.model.llm import load_tokenizer
from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava_switchkd.model.quantized import check_quantization, quantization_config
from tinyllava_switchkd.model.vision_tower import resolve_vision_tower
from tinyllava_switchkd.model.weights import is_adapter, read_checkpoint, read_connector, read_weights, resolve_folder
from tinyllava_switchkd.runtime import default_device

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, BitsAndBytesConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_pretrained_model(
    model_name_or_path: str | os.PathLike,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict[str, int | str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | dict[str, str] | None = None,
    compile: bool = False,
    config: TinyLlavaConfig | None = None,
    **hub: Any,
) -> tuple[TinyLlavaForConditionalGeneration, PreTrainedTokenizerBase, BaseImageProcessor, int]:
    """Load a checkpoint of any of v1's layouts, ready to generate.

    The configuration, tokenizer and image processor are the checkpoint's own. Only what it lacks is read from the base
    models that it names.

    Args:
        model_name_or_path: a folder (full, split or LoRA layout) or a hub repository.
        load_8bit: quantise the language model to 8 bits (bitsandbytes), but not the tower, connector and head.
        load_4bit: quantise it to 4 bits (NF4).
        device_map: as in transformers; None puts the whole model on `device`.
        device: device of the model; None means this process's GPU if there is one, otherwise the CPU.
        dtype: of the weights; None keeps the checkpoint's own.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, or a dict by part (``text_config``,
            ``vision_config``).
        compile: generate with compiled steps over a static cache, see `compile_generation`.
        config: the checkpoint's configuration, if it has been read already.
        hub: `cache_dir`, `revision`, `token`, `local_files_only`.

    Returns:
        (model in eval mode, tokenizer, image processor, context length in positions).

    Raises:
        FileNotFoundError: there is no such checkpoint, or it lacks weights or a tokenizer.
        ValueError: its weights do not fit its configuration, or it cannot be quantised on this machine.
    """
    kwargs: dict[str, Any] = {"dtype": dtype, "config": config}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    device = device if device is not None else default_device()
    if load_8bit or load_4bit:
        kwargs["quantization_config"] = _quantization_config(load_8bit, load_4bit, device, dtype)
    if device_map is None and "quantization_config" in kwargs:
        device_map = {"": str(device)}  # weights are quantised on the device
    folder = resolve_folder(model_name_or_path, **hub)
    model = TinyLlavaForConditionalGeneration.from_pretrained(folder, device_map=device_map, **kwargs)
    if device_map is None:
        model = model.to(device)
    model.config.name_or_path = str(model_name_or_path)
    if compile:
        compile_generation(model)
    model.tokenizer = tokenizer_of(folder, model.config)
    model.image_processor = image_processor_of(folder, model.vision_tower)
    return model, model.tokenizer, model.image_processor, model.config.tokenizer_model_max_length


def _quantization_config(
    load_8bit: bool, load_4bit: bool, device: str | torch.device, dtype: torch.dtype | str | None
) -> BitsAndBytesConfig | None:
    if load_8bit and load_4bit:
        raise ValueError("Ask for load_8bit or load_4bit, not both.")
    check_quantization("load_8bit" if load_8bit else "load_4bit", device)
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32
        if torch.device(device).type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return quantization_config(8 if load_8bit else 4, dtype)


def plan_model(
    model_name_or_path: str,
    vision_tower: str,
    connector_type: str = "mlp2x_gelu",
    *,
    tokenizer_name_or_path: str | None = None,
    vision_tower2: str = "",
    cache_dir: str | None = None,
    **config_fields: Any,
) -> tuple[TinyLlavaConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of the model that `build_model` builds from the same arguments, without its weights.

    Raises:
        FileNotFoundError, ValueError, OSError: a part does not exist, or the parts do not fit together.
    """
    config = TinyLlavaConfig(
        llm_model_name_or_path=model_name_or_path,
        tokenizer_name_or_path=tokenizer_name_or_path,
        vision_model_name_or_path=vision_tower,
        vision_model_name_or_path2=vision_tower2,
        connector_type=connector_type,
        cache_dir=cache_dir,
        **config_fields,
    )
    resolve_vision_tower(vision_tower, config.vision_config).complete_config(config.vision_config, None, {})
    tokenizer = load_tokenizer(
        config.tokenizer_name_or_path,
        config.text_config,
        llm=model_name_or_path,
        model_max_length=config.tokenizer_model_max_length,
        padding_side=config.tokenizer_padding_side,
        cache_dir=cache_dir,
    )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer {config.tokenizer_name_or_path!r} has {len(tokenizer)} tokens, but the language model "
            f"{model_name_or_path!r} has embeddings for {config.vocab_size}; use the language model's own tokenizer."
        )
    config.pad_token, config.pad_token_id = tokenizer.pad_token, tokenizer.pad_token_id
    return config, tokenizer


def build_model(
    model_name_or_path: str,
    vision_tower: str,
    connector_type: str = "mlp2x_gelu",
    *,
    tokenizer_name_or_path: str | None = None,
    vision_tower2: str = "",
    pretrained_llm_path: str | None = None,
    pretrained_vision_tower_path: str | None = None,
    pretrained_connector_path: str | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | dict[str, str] | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
    **config_fields: Any,
) -> tuple[TinyLlavaForConditionalGeneration, PreTrainedTokenizerBase, BaseImageProcessor]:
    """Build a new TinyLLaVA model from a base language model, a base vision tower and a connector.

    Args:
        model_name_or_path: base language model.
        vision_tower: base vision tower.
        connector_type: a registered connector, randomly initialised unless `pretrained_connector_path` is given.
        tokenizer_name_or_path: the tokenizer, if it is not the language model's.
        vision_tower2: the second tower of ``mof``.
        pretrained_llm_path: folder with weights to use instead of the base model's (from v1's pre-training stage).
        pretrained_vision_tower_path: likewise for the tower.
        pretrained_connector_path: a connector's folder or file, or a checkpoint that contains one.
        dtype: of the weights; float32 if None.
        attn_implementation: see `load_pretrained_model`.
        device: device of the model.
        cache_dir: the hub's cache.
        config_fields: other fields of `TinyLlavaConfig`.

    Returns:
        (model in eval mode with every parameter trainable, tokenizer, image processor).
    """
    config, tokenizer = plan_model(
        model_name_or_path,
        vision_tower,
        connector_type,
        tokenizer_name_or_path=tokenizer_name_or_path,
        vision_tower2=vision_tower2,
        cache_dir=cache_dir,
        **config_fields,
    )
    tower_class = resolve_vision_tower(vision_tower, config.vision_config)
    llm_source = pretrained_llm_path or model_name_or_path
    llm_weights = read_weights(resolve_folder(llm_source, cache_dir=cache_dir))
    if llm_weights is None:
        raise FileNotFoundError(f"{llm_source} holds no weights of a language model.")
    with torch.device("meta"):
        tower = tower_class(config.vision_config)
    tower_weights = tower.base_state_dict(pretrained_vision_tower_path or vision_tower, vision_tower2)
    if pretrained_connector_path is not None:
        connector_weights = read_connector(pretrained_connector_path)
    else:
        connector_weights = ConnectorFactory(connector_type)(config).state_dict()
    tensors = {f"language_model.{name}": tensor for name, tensor in llm_weights.items()}
    tensors |= {f"vision_tower._vision_tower.{name}": tensor for name, tensor in tower_weights.items()}
    tensors |= {f"connector.{name}": tensor for name, tensor in connector_weights.items()}
    kwargs: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = TinyLlavaForConditionalGeneration.from_tensors(
        config,
        tensors,
        f"{llm_source}, {vision_tower} and {connector_type}",
        dtype=dtype or torch.float32,
        **kwargs,
    ).to(device)
    model.tokenizer = tokenizer
    model.image_processor = model.vision_tower.image_processor
    return model, model.tokenizer, model.image_processor


def load_checkpoint_weights(model: TinyLlavaForConditionalGeneration, folder: str | os.PathLike) -> None:
    """Load the weights of a checkpoint of any layout into an existing model (to resume, or evaluate while training).

    Raises:
        ValueError: they do not fit.
    """
    folder = Path(folder)
    tensors = read_checkpoint(folder)
    loaded = type(model).from_tensors(model.config, tensors, folder, dtype=model.dtype)
    if is_adapter(folder):
        loaded = merge_adapter(loaded, folder)
    model.load_state_dict(loaded.state_dict())
