"""Mixture of features: interleaved tokens of CLIP and DINOv2."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, CLIPVisionModel, Dinov2Config, PretrainedConfig

from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.model.llm import read_base_config
from tinyllava_switchkd.model.vision_tower.base import VisionTower, register_vision_tower, strip_prefix
from tinyllava_switchkd.model.vision_tower.transformers_towers import (
    CLIPVisionTower,
    VisionModelHolder,
    build_dinov2,
    clip_image_processor,
    embed_clip,
    read_dinov2,
    read_vision_model,
    run_dinov2,
    run_vision_model,
)
from tinyllava_switchkd.model.weights import read_weights, resolve_folder


class MoF(nn.Module):
    """The two encoders under v1's names."""

    def __init__(self, clip: PretrainedConfig, dinov2: PretrainedConfig) -> None:
        super().__init__()
        self.clip = VisionModelHolder(CLIPVisionModel(clip))
        self.dinov2 = build_dinov2(dinov2)


@register_vision_tower("mof")
class MoFVisionTower(VisionTower):
    """v1's ``mof``: `vision_tower` is ``mof:`` and a CLIP, `vision_tower2` is ``mof:`` and a DINOv2 (CLIP's processor).

    v1 passes two tensors to its connector ``mof_mlp``. Here they are one, with CLIP at even positions, so that any
    connector works. The second configuration is stored as `dinov2_config` in the first; v1 does not store it.
    """

    model_types = ("clip_vision_model",)

    def __init__(self, cfg: PretrainedConfig) -> None:
        super().__init__(cfg)
        if getattr(cfg, "dinov2_config", None) is None:
            self.complete_config(cfg, None, {})
        dinov2 = Dinov2Config(**{k: v for k, v in cfg.dinov2_config.items() if k != "model_type"})
        if dinov2.hidden_size != cfg.hidden_size or dinov2.patch_size != cfg.patch_size:
            raise ValueError(
                f"The tower 'mof' needs two encoders of the same width and patch size, but CLIP has {cfg.hidden_size} "
                f"and {cfg.patch_size}, DINOv2 {dinov2.hidden_size} and {dinov2.patch_size}."
            )
        dinov2._attn_implementation = cfg._attn_implementation
        self._vision_tower = MoF(cfg, dinov2)

    @classmethod
    def load_config(cls, name: str, name2: str = "", cache_dir: str | None = None) -> PretrainedConfig:
        if not name2:
            raise ValueError(f"The tower {name!r} needs a second one (--vision_tower2 mof:facebook/dinov2-large).")
        config = CLIPVisionTower.load_config(name, cache_dir=cache_dir)
        config.dinov2_config = read_base_config(strip_prefix(name2), cache_dir).to_diff_dict()
        return config

    @classmethod
    def is_complete(cls, config: PretrainedConfig) -> bool:
        return getattr(config, "dinov2_config", None) is not None

    @classmethod
    def complete_config(cls, config: PretrainedConfig, folder: Path | None, tensors: dict[str, Tensor]) -> None:
        if getattr(config, "dinov2_config", None) is not None:
            return
        name = strip_prefix(getattr(config, "model_name_or_path2", "") or "")
        beside = [] if folder is None else [folder / name, folder.parent / name]
        found = [path for path in (Path(name), *beside) if name and (path / "config.json").is_file()]
        if found:
            config.dinov2_config = read_base_config(str(found[0])).to_diff_dict()
            return
        config.dinov2_config = dinov2_config_of(tensors, config.num_attention_heads)
        if config.dinov2_config is None:
            raise ValueError(
                f"The configuration of the second vision tower {name!r} is not in the checkpoint and cannot be "
                f"derived from its weights; put its folder beside the checkpoint."
            )

    @property
    def total_tokens(self) -> int:
        return (self.image_size // self.config.patch_size) ** 2 + 1  # of each encoder

    def num_tokens(self, vision_feature_select_strategy: str = "patch") -> int:
        return 2 * super().num_tokens(vision_feature_select_strategy)

    def default_image_processor(self) -> BaseImageProcessor:
        """CLIP's, at CLIP's size."""
        return clip_image_processor(self.image_size)

    def base_state_dict(self, source: str, source2: str = "") -> dict[str, Tensor]:
        if not source2 or not source.startswith("mof:"):  # a folder written by the pre-training stage has both
            tensors = read_weights(resolve_folder(strip_prefix(source))) or {}
            if any(name.startswith("dinov2.") for name in tensors):
                return tensors
        clip = {f"clip.{name}": tensor for name, tensor in read_vision_model(source).items()}
        dinov2 = read_dinov2(source2, self._vision_tower.dinov2.config)
        return clip | {f"dinov2.{name}": tensor for name, tensor in dinov2.items()}

    def forward(
        self, x: Tensor, vision_feature_layer: int = -2, vision_feature_select_strategy: str = "patch"
    ) -> Tensor:
        """[I, 3, H, W] -> [I, 2 * tokens, width], CLIP's tokens at even positions and DINOv2's at odd ones."""
        dropped = self._num_dropped(vision_feature_select_strategy)
        towers = self._vision_tower
        clip_model = towers.clip.vision_model
        clip = run_vision_model(clip_model, embed_clip(clip_model, x), self.layer_count(vision_feature_layer))
        states = towers.dinov2.config.num_hidden_layers + 1
        dinov2 = run_dinov2(towers.dinov2, x, vision_feature_layer % states)
        return torch.stack([clip[:, dropped:], dinov2[:, dropped:]], dim=2).flatten(1, 2)  # [I, N, 2, D] -> [I, 2N, D]


def dinov2_config_of(tensors: dict[str, Tensor], num_heads: int) -> JsonObject | None:
    """DINOv2's configuration, derived from its weights; None if there are none.

    The weights do not show the number of heads. The towers have the same width, so CLIP's number is used, which is
    right for every published pair (64 channels per head).
    """
    prefix = "vision_tower._vision_tower.dinov2."
    positions = tensors.get(f"{prefix}embeddings.position_embeddings")
    patches = tensors.get(f"{prefix}embeddings.patch_embeddings.projection.weight")
    hidden = tensors.get(f"{prefix}encoder.layer.0.mlp.fc1.weight")
    if positions is None or patches is None:
        return None
    layers = [re.match(rf"{re.escape(prefix)}encoder\.layer\.(\d+)\.", name) for name in tensors]
    width, patch = positions.shape[-1], patches.shape[-1]
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(match[1]) for match in layers if match),
        "num_attention_heads": num_heads,
        "mlp_ratio": 4 if hidden is None else hidden.shape[0] // width,
        "use_swiglu_ffn": hidden is None,
        "patch_size": patch,
        "image_size": int((positions.shape[1] - 1) ** 0.5) * patch,
    }
