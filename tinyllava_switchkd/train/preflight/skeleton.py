"""Models without weights, for checks before gigabytes are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinyllava_switchkd.model.checkpoint import plan_model
from tinyllava_switchkd.model.configuration import TinyLlavaConfig
from tinyllava_switchkd.model.layouts import image_processor_of, open_checkpoint, tokenizer_of
from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration
from tinyllava_switchkd.model.weights import resolve_folder
from tinyllava_switchkd.train.attention import attention_of
from tinyllava_switchkd.train.command_line.arguments import Arguments

if TYPE_CHECKING:
    from tinyllava_switchkd.model.modeling import TinyLlavaForConditionalGeneration as TinyLlava


FROM_ARGUMENTS = {
    "connector_type": "connector_type",
    "mm_vision_select_layer": "vision_feature_layer",
    "mm_vision_select_feature": "vision_feature_select_strategy",
    "num_queries": "num_queries",
    "resampler_hidden_size": "resampler_hidden_size",
    "num_resampler_layers": "num_resampler_layers",
}
"""Arguments that shape the model -> their names in its configuration. In a checkpoint they are fixed."""

PER_RUN = {"model_max_length": "tokenizer_model_max_length", "tokenizer_padding_side": "tokenizer_padding_side"}
"""Arguments that may change with every run -> their names in the configuration."""


def model_settings(arguments: Arguments) -> dict[str, Any]:
    """Arguments of `tinyllava_switchkd.model.build_model`, from the command line's."""
    model = arguments.model
    settings = {ours: getattr(model, name) for name, ours in {**FROM_ARGUMENTS, **PER_RUN}.items()}
    return settings | {
        "model_name_or_path": model.model_name_or_path,
        "tokenizer_name_or_path": model.tokenizer_name_or_path,
        "vision_tower": model.vision_tower,
        "vision_tower2": model.vision_tower2,
        "attn_implementation": attention_of(arguments),
        "cache_dir": model.cache_dir,
        "image_aspect_ratio": arguments.data.image_aspect_ratio,
        "template": arguments.data.template,
    }


def checkpoint_skeleton(path: str, cache_dir: str | None = None) -> TinyLlava:
    """The model of a checkpoint of any layout, on the meta device, with its tokenizer and image processor.

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint, or it is incomplete.
    """
    folder = resolve_folder(path, cache_dir=cache_dir)
    config, _ = open_checkpoint(Path(folder))
    model = on_meta(config)
    model.tokenizer = tokenizer_of(folder, config)
    model.image_processor = image_processor_of(folder, model.vision_tower)
    return model


def student_skeleton(arguments: Arguments) -> TinyLlava:
    """The student with this run's settings, without weights (on the meta device).

    Raises:
        FileNotFoundError, OSError: a part does not exist.
        ValueError: the parts do not fit together, or the command line contradicts the checkpoint.
    """
    path = arguments.training.pretrained_model_path
    if path is None:
        settings = model_settings(arguments)
        config, tokenizer = plan_model(**{name: settings[name] for name in settings if name != "attn_implementation"})
        model = on_meta(config)
        model.tokenizer, model.image_processor = tokenizer, model.vision_tower.image_processor
        return model
    model = checkpoint_skeleton(path, arguments.model.cache_dir)
    for name, field in FROM_ARGUMENTS.items():
        asked, stored = getattr(arguments.model, name), getattr(model.config, field)
        if name in arguments.given and asked != stored and stored is not None:
            raise ValueError(
                f"--{name} is {asked}, but the checkpoint {path} was trained with {stored}; leave the argument out, or "
                f"start from a checkpoint that fits."
            )
    apply_run_settings(model, arguments)
    return model


def apply_run_settings(model: TinyLlava, arguments: Arguments) -> None:
    """Apply this run's settings to a checkpoint's configuration and tokenizer."""
    config, tokenizer = model.config, model.tokenizer
    for name, field in PER_RUN.items():
        if name in arguments.given:
            setattr(config, field, getattr(arguments.model, name))
    if "image_aspect_ratio" in arguments.given:
        config.image_aspect_ratio = arguments.data.image_aspect_ratio
    config.template = arguments.data.template
    assert tokenizer is not None, "it came with the model"
    tokenizer.model_max_length = config.tokenizer_model_max_length
    tokenizer.padding_side = config.tokenizer_padding_side


def visual_tokens(model: TinyLlava) -> str:
    """The number of visual tokens per image, with tower and connector, as a phrase for messages."""
    config = model.config
    name = config.vision_model_name_or_path or config.vision_config.model_type
    return f"{model.num_image_tokens:,} visual tokens ({name}, {config.connector_type})"


def on_meta(config: TinyLlavaConfig) -> TinyLlava:
    """The model of a configuration, with shapes but without weights."""
    with torch.device("meta"):
        return TinyLlavaForConditionalGeneration(config)
