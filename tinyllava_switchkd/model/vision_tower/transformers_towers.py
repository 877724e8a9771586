"""Vision towers through transformers: SigLIP, SigLIP 2, CLIP, DINOv2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    PretrainedConfig,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from . import register_vision_tower
from .base import VisionTower

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BICUBIC = 3


class VisionModelHolder(nn.Module):
    """Keeps v1's key level ``vision_model.``, which transformers 5 removed from its SigLIP and CLIP vision models."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model


class TransformersTower(VisionTower):
    """A tower whose encoder is a transformers model; subclasses say which."""

    def __init__(self, cfg: PretrainedConfig) -> None:
        super().__init__(cfg)
        self._vision_tower = self.build_encoder(cfg)

    @classmethod
    def build_encoder(cls, cfg: PretrainedConfig) -> nn.Module:
        """The encoder with random weights."""
        raise NotImplementedError

    @classmethod
    def load_config(cls, name: str, name2: str = "", cache_dir: str | None = None) -> PretrainedConfig:
        config = AutoConfig.from_pretrained(strip_prefix(name), cache_dir=cache_dir)
        # A CLIP or SigLIP repository holds both towers; ours is the vision half.
        return getattr(config, "vision_config", config)

    @property
    def total_tokens(self) -> int:
        return (self.image_size // self.config.patch_size) ** 2 + self.class_tokens

    class_tokens = 0
    """1 for an encoder with a class token."""

    def build_image_processor(self) -> Any:
        processor = find_image_processor(self.config)
        return processor if processor is not None else self.default_image_processor()

    def default_image_processor(self) -> Any:
        """The processor of this encoder's family at the configuration's image size."""
        raise NotImplementedError


class HoldsVisionModel(TransformersTower):
    """SigLIP and CLIP: an encoder of embeddings and layers under ``vision_model``."""

    encoder_class: type = SiglipVisionModel

    @classmethod
    def build_encoder(cls, cfg: PretrainedConfig) -> nn.Module:
        return VisionModelHolder(cls.encoder_class(cfg))

    def embed(self, pixels: Tensor) -> Tensor:
        """[I, 3, H, W] -> [I, total_tokens, width]."""
        return self._vision_tower.vision_model.embeddings(pixels)

    def hidden_state(self, pixels: Tensor, num_layers: int) -> Tensor:
        hidden = self.embed(pixels)  # [I, N, D]
        for layer in self._vision_tower.vision_model.encoder.layers[:num_layers]:
            hidden = layer(hidden, attention_mask=None)
        return hidden

    def later_modules(self, num_layers: int) -> Iterator[nn.Module]:
        model = self._vision_tower.vision_model
        yield from model.encoder.layers[num_layers:]
        yield model.post_layernorm
        if hasattr(model, "head"):
            yield model.head


@register_vision_tower("siglip")
class SiglipVisionTower(HoldsVisionModel):
    """SigLIP, and SigLIP 2 at a fixed resolution (whose repositories say ``siglip``). It has no class token."""

    model_types = ("siglip_vision_model",)

    def default_image_processor(self) -> Any:
        return SiglipImageProcessorPil(size={"height": self.image_size, "width": self.image_size}, resample=BICUBIC)


@register_vision_tower("siglip2")
class Siglip2VisionTower(HoldsVisionModel):
    """SigLIP 2: the fixed-resolution models are SigLIP's architecture, the NaFlex ones are fed one square size.

    A NaFlex encoder reads patches and their grid; here every image is a square of `num_patches` patches, so a batch
    needs no padding and no mask.
    """

    model_types = ("siglip2_vision_model", "siglip_vision_model")

    @classmethod
    def build_encoder(cls, cfg: PretrainedConfig) -> nn.Module:
        if cfg.model_type == "siglip_vision_model":
            return VisionModelHolder(SiglipVisionModel(cfg))
        return VisionModelHolder(Siglip2VisionModel(cfg))

    @property
    def is_naflex(self) -> bool:
        """Whether the encoder takes patches instead of pixels."""
        return self.config.model_type == "siglip2_vision_model"

    @property
    def image_size(self) -> int:
        if self.is_naflex:
            return int(self.config.num_patches**0.5) * self.config.patch_size
        return int(self.config.image_size)

    def embed(self, pixels: Tensor) -> Tensor:
        embeddings = self._vision_tower.vision_model.embeddings
        if not self.is_naflex:
            return embeddings(pixels)
        size = self.config.patch_size
        images, channels, height, width = pixels.shape
        rows, columns = height // size, width // size
        grid = pixels.reshape(images, channels, rows, size, columns, size)  # [I, 3, r, p, c, p]
        patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [I, r*c, p*p*3]
        shapes = torch.tensor([[rows, columns]] * images, device=pixels.device)  # [I, 2]
        return embeddings(patches, shapes)

    def default_image_processor(self) -> Any:
        return SiglipImageProcessorPil(size={"height": self.image_size, "width": self.image_size}, resample=BICUBIC)

    def build_image_processor(self) -> Any:
        # NaFlex's own processor emits patches of any aspect ratio, which the square path above does not read.
        return self.default_image_processor() if self.is_naflex else super().build_image_processor()


@register_vision_tower("clip")
class CLIPVisionTower(HoldsVisionModel):
    """CLIP: a class token, then the patches."""

    model_types = ("clip_vision_model",)
    encoder_class = CLIPVisionModel
    class_tokens = 1

    def embed(self, pixels: Tensor) -> Tensor:
        model = self._vision_tower.vision_model
        return model.pre_layrnorm(model.embeddings(pixels))

    def default_image_processor(self) -> Any:
        size = self.image_size
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@register_vision_tower("dinov2")
class DINOv2VisionTower(TransformersTower):
    """DINOv2: a class token, then the patches."""

    model_types = ("dinov2",)
    class_tokens = 1

    @classmethod
    def build_encoder(cls, cfg: PretrainedConfig) -> nn.Module:
        return Dinov2Model(cfg)

    def hidden_state(self, pixels: Tensor, num_layers: int) -> Tensor:
        return dinov2_hidden_state(self._vision_tower, pixels, num_layers)

    def later_modules(self, num_layers: int) -> Iterator[nn.Module]:
        yield from dinov2_later_modules(self._vision_tower, num_layers)

    def default_image_processor(self) -> Any:
        size = self.image_size
        return CLIPImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        )


def dinov2_hidden_state(model: nn.Module, pixels: Tensor, num_layers: int) -> Tensor:
    """[I, 3, H, W] -> the output of DINOv2's first `num_layers` layers, [I, 1 + patches, width]."""
    hidden = model.embeddings(pixels)
    for layer in model.encoder.layer[:num_layers]:
        hidden = layer(hidden)
    return hidden


def dinov2_later_modules(model: nn.Module, num_layers: int) -> Iterator[nn.Module]:
    """What of DINOv2 comes after its first `num_layers` layers."""
    yield from model.encoder.layer[num_layers:]
    yield model.layernorm


def strip_prefix(name: str) -> str:
    """``"mof:openai/clip"`` -> ``"openai/clip"``; a name without a prefix is returned as it is."""
    return name.rsplit(":", 1)[-1]


def find_image_processor(config: PretrainedConfig) -> Any:
    """The image processor beside the base model's files, on PIL; None where the base folder is not there.

    Checkpoints name their base models by paths that may not exist on this machine: those are passed over in silence,
    because the configuration suffices to build the processor of the encoder's family.
    """
    name = strip_prefix(getattr(config, "model_name_or_path", "") or "")
    if name and (Path(name) / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(name, backend="pil")
    return None
