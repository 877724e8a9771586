"""Vision towers from open_clip: ``open_clip:NAME`` or ``open_clip:NAME/TAG``.

Examples: ``open_clip:ViT-L-14/datacomp_xl_s13b_b90k``, ``open_clip:hf-hub:org/name``, ``open_clip:local-dir:folder``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from tinyllava_switchkd.io import JsonObject, read_json
from tinyllava_switchkd.model.vision_tower.base import register_vision_tower
from tinyllava_switchkd.model.vision_tower.timm import (
    LibraryTower,
    LibraryVisionConfig,
    forward_by,
    geometry,
    intermediate,
    keep_initialisation,
)


class OpenClipVisionConfig(LibraryVisionConfig):
    """Configuration of the vision half of an open_clip model.

    Args:
        vision_cfg: open_clip's own ``vision_cfg``.
        embed_dim: width of CLIP's joint space (of a projection that is stored but not used).
        quick_gelu: whether to use OpenAI's approximation of GELU.
    """

    model_type = "open_clip_vision_tower"
    vision_cfg: JsonObject | None = None
    embed_dim: int = 512
    quick_gelu: bool = False
    num_prefix_tokens: int = 1
    usual_mean: ClassVar = (0.48145466, 0.4578275, 0.40821073)
    usual_std: ClassVar = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self, **kwargs: object) -> None:
        self.vision_cfg = self.vision_cfg or {}
        super().__post_init__(**kwargs)


AutoConfig.register(OpenClipVisionConfig.model_type, OpenClipVisionConfig, exist_ok=True)


@register_vision_tower("open_clip")
class OpenClipVisionTower(LibraryTower):
    """open_clip's vision transformer, or a timm trunk, which many of its models have."""

    model_types = (OpenClipVisionConfig.model_type,)

    def __init__(self, cfg: PretrainedConfig) -> None:
        super().__init__(cfg)
        self._vision_tower = create(cfg.vision_cfg, cfg.embed_dim, cfg.quick_gelu)
        keep_initialisation(self._vision_tower)
        if hasattr(self._vision_tower, "trunk"):
            forward_by(self._vision_tower.trunk, intermediate)
        else:
            forward_by(self._vision_tower, vit_intermediate)

    @classmethod
    def load_config(cls, name: str, name2: str = "", cache_dir: str | None = None) -> PretrainedConfig:
        import open_clip

        model_name, tag = split_tag(name)
        model_cfg = read_model_cfg(model_name)
        vision_cfg, embed_dim = model_cfg["vision_cfg"], model_cfg["embed_dim"]
        quick_gelu = bool(model_cfg.get("quick_gelu", False))
        preprocess = open_clip.get_pretrained_cfg(model_name, tag) if tag else preprocess_cfg_of(model_name)
        quick_gelu = quick_gelu or bool(preprocess.get("quick_gelu", False))
        with torch.device("meta"):
            visual = create(vision_cfg, embed_dim, quick_gelu)
        image_size = visual.image_size
        fields: JsonObject = geometry(visual.trunk) if hasattr(visual, "trunk") else vit_geometry(visual)
        kept = {"image_mean": "mean", "image_std": "std", "interpolation": "interpolation"}
        return OpenClipVisionConfig(
            vision_cfg={key: value for key, value in vision_cfg.items() if key != "timm_model_pretrained"},
            embed_dim=embed_dim,
            quick_gelu=quick_gelu,
            image_size=image_size[0] if isinstance(image_size, (tuple, list)) else image_size,
            **{field: preprocess[key] for field, key in kept.items() if preprocess.get(key) is not None},
            **fields,
        )

    def layer_count(self, vision_feature_layer: int) -> int:
        layers = super().layer_count(vision_feature_layer)
        if layers == 0:
            raise ValueError("open_clip's towers do not support vision_feature_layer 0 (the embeddings).")
        return layers

    def hidden_state(self, pixels: Tensor, num_layers: int) -> Tensor:
        return getattr(self._vision_tower, "trunk", self._vision_tower)(pixels, num_layers)

    def pretrained_state_dict(self, source: str) -> dict[str, Tensor]:
        import open_clip

        model_name, tag = split_tag(source)
        if ":" not in model_name and tag is None:
            tags = open_clip.list_pretrained_tags_by_model(model_name)
            raise ValueError(
                f"open_clip's {model_name!r} comes with several weights; name one as open_clip:{model_name}/TAG, where "
                f"TAG is one of {', '.join(tags) or '(none published)'}."
            )
        return open_clip.create_model(model_name, pretrained=tag, require_pretrained=True).visual.state_dict()


def split_tag(name: str) -> tuple[str, str | None]:
    """``open_clip:ViT-L-14/openai`` -> (``ViT-L-14``, ``openai``); hub and local names have no tag."""
    name = name.split(":", 1)[-1]
    if ":" in name:
        return name, None
    model_name, _, tag = name.partition("/")
    return model_name, tag or None


def read_model_cfg(model_name: str) -> JsonObject:
    """open_clip's configuration of a model.

    Raises:
        ValueError: open_clip does not know the model.
    """
    import open_clip

    try:
        model_cfg = open_clip.get_model_config(model_name)
    except OSError as error:
        raise ValueError(f"open_clip's configuration of {model_name!r} cannot be read: {error}.") from error
    if model_cfg is None:
        raise ValueError(f"open_clip has no model {model_name!r}; open_clip.list_models() names them.")
    return model_cfg


def preprocess_cfg_of(model_name: str) -> JsonObject:
    """The preprocessing stored in a local folder of open_clip; {} for other models."""
    if not model_name.startswith("local-dir:"):
        return {}
    file = Path(model_name.removeprefix("local-dir:")) / "open_clip_config.json"
    return read_json(file).get("preprocess_cfg") or {}


def create(vision_cfg: JsonObject, embed_dim: int, quick_gelu: bool) -> Any:
    """open_clip's vision tower with random weights.

    Raises:
        ValueError: it is a ResNet, whose stages have different widths.
    """
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    if isinstance(vision_cfg.get("layers"), (list, tuple)):
        raise ValueError("open_clip's ResNets cannot be vision towers; choose a vision transformer or a timm trunk.")
    cfg = CLIPVisionCfg(**{**vision_cfg, "timm_model_pretrained": False})
    return _build_vision_tower(embed_dim, cfg, quick_gelu)


def vit_intermediate(visual: Any, pixels: Tensor, num_layers: int) -> Tensor:
    """[I, 3, H, W] -> the output of the first `num_layers` layers of open_clip's transformer, [I, 1 + patches, D]."""
    output = visual.forward_intermediates(
        pixels,
        indices=[num_layers - 1],
        stop_early=True,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    return torch.cat([output["image_intermediates_prefix"][0], output["image_intermediates"][0]], dim=1)


def vit_geometry(visual: Any) -> dict[str, int]:
    """Configuration fields of open_clip's own vision transformer."""
    return {
        "hidden_size": visual.conv1.out_channels,
        "patch_size": visual.patch_size[0],
        "num_hidden_layers": len(visual.transformer.resblocks),
        "num_prefix_tokens": 1,
    }
