"""TinyLlavaConfig: TinyLLaVA v1's configuration, built from the checkpoint alone where possible."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tinyllava_switchkd import _auto
from tinyllava_switchkd.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tinyllava_switchkd.io import JsonObject


class TinyLlavaConfig(PretrainedConfig):
    """Configuration of a TinyLLaVA model: a language model, a vision tower and the connector between them.

    Field names and defaults are v1's (``model/configuration_tinyllava.py``), plus `template` and `qformer_config`. If
    `text_config` or `vision_config` is absent, the base model's is read from `llm_model_name_or_path` or
    `vision_model_name_or_path` (never with remote code).

    Args:
        llm_model_name_or_path: base language model, a hub name or a folder.
        tokenizer_name_or_path: where the tokenizer came from; the language model's path if left out.
        vision_model_name_or_path: base vision tower; may carry a prefix (``timm:``, ``open_clip:``, ``mof:``).
        vision_model_name_or_path2: the second tower of ``mof`` (DINOv2).
        connector_type: a registered connector, e.g. ``mlp2x_gelu``.
        text_config: configuration (or its dict) of the language model.
        vision_config: configuration (or its dict) of the vision tower.
        vision_feature_layer: index into the tower's hidden states (0 = embeddings); -2 is the second-to-last layer.
        vision_feature_select_strategy: ``patch`` drops the tower's first token, ``cls_patch`` keeps all.
        num_queries: visual tokens that ``resampler`` and ``qformer`` emit.
        resampler_hidden_size: stored as in v1, but never read (``resampler`` has the language model's width).
        num_resampler_layers: depth of ``resampler``.
        qformer_config: overrides of the Q-Former's own configuration (a dict), None for v1's (BERT base).
        image_aspect_ratio: ``square`` (the processor alone) or ``pad`` (first pad to a square with the mean colour).
        tokenizer_model_max_length: maximum positions of a sequence, image tokens included.
        template: name of the conversation template that the model was trained with; None if unknown.
        tune_type_llm, tune_type_connector, tune_type_vision_tower, tune_vision_tower_from_layer: what was trained.
    """

    model_type = "tinyllava"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 (transformers' protocol)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    llm_model_name_or_path: str = ""
    tokenizer_name_or_path: str = ""
    vision_model_name_or_path: str = ""
    vision_model_name_or_path2: str = ""
    connector_type: str | None = None
    text_config: Any = None
    vision_config: Any = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "patch"
    image_aspect_ratio: str = "square"
    num_queries: int | None = None
    resampler_hidden_size: int | None = None
    num_resampler_layers: int | None = None
    qformer_config: JsonObject | None = None
    pad_token: str | None = None
    pad_token_id: int | None = None
    tokenizer_padding_side: str = "right"
    tokenizer_model_max_length: int = 2048
    tokenizer_use_fast: bool = False
    use_cache: bool = False
    cache_dir: str | None = None
    template: str | None = None
    tune_type_llm: str = "frozen"
    tune_type_connector: str = "frozen"
    tune_type_vision_tower: str = "frozen"
    tune_vision_tower_from_layer: int = -1

    def __post_init__(self, **kwargs: object) -> None:
        older = kwargs.pop("conv_version", None)  # the template's name until 0.2.0
        if isinstance(older, str):
            self.template = self.template or older
        for name in TinyLlavaConfig.__annotations__:  # published checkpoints write null or "" for the default
            if getattr(self, name) is None or getattr(self, name) == "":
                setattr(self, name, getattr(TinyLlavaConfig, name))
        self.tokenizer_name_or_path = self.tokenizer_name_or_path or self.llm_model_name_or_path
        self.text_config = self._build_text_config(self.text_config)
        self.vision_config = self._build_vision_config(self.vision_config)
        width = "hidden_size" if getattr(self.text_config, "hidden_size", None) else "model_dim"
        for part, config, field in (
            ("text", self.text_config, "vocab_size"),
            ("text", self.text_config, width),
            ("vision", self.vision_config, "hidden_size"),
        ):
            if getattr(config, field, None) is None:
                name = self.llm_model_name_or_path if part == "text" else self.vision_model_name_or_path
                raise ValueError(
                    f"{name or part + '_config'} is a model of type {config.model_type!r} and no "
                    f"{'language model' if part == 'text' else 'vision tower'}: its configuration has no {field}."
                )
        # These follow from the parts; a contradicting value in the file is ignored.
        for name in ("hidden_size", "vocab_size", "vision_hidden_size", "ignore_index", "image_token_index"):
            kwargs.pop(name, None)
        self.hidden_size: int = getattr(self.text_config, width)
        self.vocab_size: int = self.text_config.vocab_size
        self.vision_hidden_size: int = self.vision_config.hidden_size
        self.ignore_index = IGNORE_INDEX
        self.image_token_index = IMAGE_TOKEN_INDEX
        # The language model ties its own head; the composite model has nothing to tie.
        kwargs.pop("tie_word_embeddings", None)
        super().__post_init__(**kwargs)

    def _build_text_config(self, text_config: JsonObject | PretrainedConfig | None) -> PretrainedConfig:
        if isinstance(text_config, PretrainedConfig):
            return text_config
        if text_config:
            # v1 leaves out values that equal its default, which is a llama configuration.
            return config_from_dict(text_config, "llama", "text_config")
        if self.llm_model_name_or_path:
            from tinyllava_switchkd.model.llm import read_base_config

            return read_base_config(self.llm_model_name_or_path, self.cache_dir)
        return CONFIG_MAPPING["llama"]()

    def _build_vision_config(self, vision_config: JsonObject | PretrainedConfig | None) -> PretrainedConfig:
        if isinstance(vision_config, PretrainedConfig):
            config = vision_config
        elif vision_config:
            importlib.import_module(".vision_tower", __package__)  # registers timm's and open_clip's configurations
            config = config_from_dict(vision_config, "clip_vision_model", "vision_config")
            config = getattr(config, "vision_config", config)  # v1 also accepts the configuration of a whole CLIP
        elif self.vision_model_name_or_path:
            from tinyllava_switchkd.model.vision_tower import VisionTowerFactory

            tower = VisionTowerFactory(self.vision_model_name_or_path)
            config = tower.load_config(
                self.vision_model_name_or_path, self.vision_model_name_or_path2, cache_dir=self.cache_dir
            )
        else:  # v1's default: CLIP ViT-L/14 at 336 pixels
            config = CONFIG_MAPPING["clip_vision_model"](
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            )
        # The tower looks up its image processor by these names, which v1 stores here too.
        config.model_name_or_path = self.vision_model_name_or_path
        config.model_name_or_path2 = self.vision_model_name_or_path2
        return config

    @classmethod
    def from_dict(cls, config_dict: JsonObject, **kwargs: object) -> TinyLlavaConfig:
        """As in transformers; also registers the model, which AutoModelForCausalLM may need next."""
        _auto.register_model()
        # The attention kernel of the training run may not exist on this machine.
        config_dict = {key: value for key, value in config_dict.items() if "attn_implementation" not in key}
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> JsonObject:
        """As in transformers, but without the folders of the training machine (which v1 keeps)."""
        fields = super().to_dict()
        names = ("llm_model_name_or_path", "tokenizer_name_or_path")
        towers = [f"{prefix}model_name_or_path{number}" for prefix in ("vision_", "") for number in ("", "2")]
        for part, keys in ((fields, (*names, *towers)), (fields.get("vision_config") or {}, towers)):
            for key in keys:
                if part.get(key):
                    part[key] = without_folder(part[key])
        for part in (fields, fields.get("text_config") or {}, fields.get("vision_config") or {}):
            part.pop("_name_or_path", None)
        fields.pop("cache_dir", None)
        rope = (fields.get("text_config") or {}).get("rope_parameters") or {}
        for key in ("rope_theta", "partial_rotary_factor"):  # transformers 4, and so v1, reads them here
            if key in rope:
                fields["text_config"][key] = rope[key]
        return fields


def without_folder(name: str) -> str:
    """``"mof:/data/clip-vit"`` -> ``"mof:clip-vit"``; hub names and relative paths stay as they are."""
    prefix, colon, path = name.rpartition(":")
    if Path(path).expanduser().is_absolute():
        path = Path(path).name
    return prefix + colon + path


def config_from_dict(fields: JsonObject, default_type: str, where: str) -> PretrainedConfig:
    """A transformers configuration from its dict, by its ``model_type``.

    Raises:
        ValueError: transformers does not know the model type (v1 would run remote code for it).
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{where} has model_type {model_type!r}, which this transformers does not know; "
            f"register its configuration with AutoConfig.register (remote code is never run)."
        )
    return CONFIG_MAPPING[model_type].from_dict(fields)


AutoConfig.register(TinyLlavaConfig.model_type, TinyLlavaConfig, exist_ok=True)
