"""Vision towers from transformers: SigLIP, SigLIP 2, CLIP, DINOv2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BaseImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    PretrainedConfig,
    PreTrainedModel,
    Siglip2VisionModel,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tinyllava_switchkd.model.llm import read_base_config
from tinyllava_switchkd.model.vision_tower.base import VisionTower, register_vision_tower, strip_prefix
from tinyllava_switchkd.model.weights import outside_zero_init, read_weights, resolve_folder

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BICUBIC = 3


class VisionModelHolder(nn.Module):
    """Keeps v1's key level ``vision_model.``, which transformers 5 removed from SigLIP and CLIP vision models."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model


class TransformersTower(VisionTower):
    """Base class of towers whose encoder is a transformers model."""

    class_tokens = 0
    """1 for an encoder with a class token."""

    def __init__(self, cfg: PretrainedConfig) -> None:
        super().__init__(cfg)
        self._vision_tower = self.build_encoder(cfg)

    @classmethod
    def build_encoder(cls, cfg: PretrainedConfig) -> nn.Module:
        """The encoder with random weights."""
        raise NotImplementedError

    @classmethod
    def load_config(cls, name: str, name2: str = "", cache_dir: str | None = None) -> PretrainedConfig:
        config = read_base_config(strip_prefix(name), cache_dir)
        # CLIP and SigLIP repositories hold a text tower, too; take the vision half.
        return getattr(config, "vision_config", config)

    @property
    def total_tokens(self) -> int:
        return (self.image_size // self.config.patch_size) ** 2 + self.class_tokens


class HoldsVisionModel(TransformersTower):
    """Base class of SigLIP and CLIP, whose embeddings and layers are under ``vision_model``."""

    encoder_class: type = SiglipVisionModel

    @classmethod
    def build_encoder(cls, cfg: PretrainedConfig) -> nn.Module:
        return VisionModelHolder(cls.encoder_class(cfg))

    def embed(self, pixels: Tensor) -> Tensor:
        """[I, 3, H, W] -> [I, total_tokens, width]."""
        return self._vision_tower.vision_model.embeddings(pixels)

    def hidden_state(self, pixels: Tensor, num_layers: int) -> Tensor:
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"The vision tower takes images of {self.image_size} x {self.image_size} pixels, not of "
                f"{' x '.join(map(str, pixels.shape[-2:]))}; prepare them by ImagePreprocess with its image processor."
            )
        return run_vision_model(self._vision_tower.vision_model, self.embed(pixels), num_layers)

    def base_state_dict(self, source: str, source2: str = "") -> dict[str, Tensor]:
        return read_vision_model(source)


def run_vision_model(model: PreTrainedModel, hidden: Tensor, num_layers: int) -> Tensor:
    """Run the first `num_layers` layers of a SigLIP or CLIP vision model on its embeddings [I, N, D]."""
    for layer in model.encoder.layers[:num_layers]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def read_vision_model(source: str) -> dict[str, Tensor]:
    """The vision weights in a CLIP or SigLIP folder (of both towers, of the vision model alone, or v1's split folder).

    Returns:
        tensors whose names start with ``vision_model.``.
    """
    folder = resolve_folder(strip_prefix(source))
    tensors = read_weights(folder)
    if tensors is None:
        raise FileNotFoundError(f"{folder} holds no weights of a vision tower.")
    held = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    # transformers 5 saves a vision model without this level, which all others write.
    return held or {f"vision_model.{name}": tensor for name, tensor in tensors.items()}


@register_vision_tower("siglip")
class SiglipVisionTower(HoldsVisionModel):
    """SigLIP, and SigLIP 2 at a fixed resolution (model type ``siglip``). It has no class token."""

    model_types: tuple[str, ...] = ("siglip_vision_model",)

    def default_image_processor(self) -> BaseImageProcessor:
        return SiglipImageProcessorPil(size={"height": self.image_size, "width": self.image_size}, resample=BICUBIC)


@register_vision_tower("siglip2")
class Siglip2VisionTower(SiglipVisionTower):
    """SigLIP 2: fixed-resolution models, which have SigLIP's architecture, and NaFlex models at one square size.

    A NaFlex encoder takes patches and the shape of their grid. Here every image is a square of `num_patches` patches,
    so a batch needs no padding and no mask.
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
        side = self.image_size // self.config.patch_size
        # On the CPU, because the embeddings read the numbers of rows and columns one by one.
        shapes = torch.tensor([[side, side]] * len(pixels), device="cpu")  # [I, 2]
        return embeddings(self.patches(pixels), shapes)

    def patches(self, pixels: Tensor) -> Tensor:
        """[I, 3, H, W] -> [I, patches, p * p * 3], row by row: the input of a NaFlex encoder."""
        size = self.config.patch_size
        grid = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [I, 3, r, p, c, p]
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def build_image_processor(self) -> BaseImageProcessor:
        # NaFlex's own processor keeps the aspect ratio, but `embed` takes square images.
        return self.default_image_processor() if self.is_naflex else super().build_image_processor()


@register_vision_tower("clip")
class CLIPVisionTower(HoldsVisionModel):
    """CLIP; its class token comes before the patches."""

    model_types = ("clip_vision_model",)
    encoder_class = CLIPVisionModel
    class_tokens = 1

    def embed(self, pixels: Tensor) -> Tensor:
        return embed_clip(self._vision_tower.vision_model, pixels)

    def default_image_processor(self) -> BaseImageProcessor:
        return clip_image_processor(self.image_size)


def embed_clip(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """[I, 3, H, W] -> CLIP's embeddings [I, 1 + patches, width] (``pre_layrnorm`` is CLIP's own spelling)."""
    return model.pre_layrnorm(model.embeddings(pixels))


def clip_image_processor(size: int, **kwargs: object) -> BaseImageProcessor:
    """CLIP's image processor: shortest edge to `size`, centre crop."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": kwargs.pop("resize_to", size)}, crop_size={"height": size, "width": size}, **kwargs
    )


@register_vision_tower("dinov2")
class DINOv2VisionTower(TransformersTower):
    """DINOv2; its class token comes before the patches.

    The published configurations say 518 x 518 pixels, but the processors crop to 224, the size that v1 uses.
    """

    model_types = ("dinov2",)
    class_tokens = 1

    @classmethod
    def build_encoder(cls, cfg: PretrainedConfig) -> nn.Module:
        return build_dinov2(cfg)

    @property
    def image_size(self) -> int:
        return 224 if self.config.image_size == 518 else int(self.config.image_size)

    def hidden_state(self, pixels: Tensor, num_layers: int) -> Tensor:
        return run_dinov2(self._vision_tower, pixels, num_layers)

    def base_state_dict(self, source: str, source2: str = "") -> dict[str, Tensor]:
        return read_dinov2(source, self.config)

    def default_image_processor(self) -> BaseImageProcessor:
        size = self.image_size
        resize_to = 256 if size == 224 else size
        return clip_image_processor(size, resize_to=resize_to, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)


class V1Dinov2Embeddings(Dinov2Embeddings):
    """DINOv2's embeddings with the interpolation of transformers 4.40, and so of v1."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        return dinov2_positions(self.position_embeddings, height // self.patch_size, width // self.patch_size)


def build_dinov2(cfg: PretrainedConfig) -> nn.Module:
    """DINOv2 with random weights, and v1's position embeddings."""
    model = Dinov2Model(cfg)
    # transformers fixes the class of the embeddings, so it is replaced afterwards; the parameters are the same.
    model.embeddings.__class__ = V1Dinov2Embeddings
    return model


def run_dinov2(model: PreTrainedModel, pixels: Tensor, num_layers: int) -> Tensor:
    """[I, 3, H, W] -> the output of DINOv2's first `num_layers` layers, [I, 1 + patches, width]."""
    hidden = model.embeddings(pixels)  # [I, 1 + N, D]
    for layer in model.encoder.layer[:num_layers]:
        hidden = layer(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden


def dinov2_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings [1, 1 + P, D] for a grid of rows x columns patches.

    For a grid other than the trained one they are interpolated as in transformers 4.40, and so in v1: by a scale factor
    with 0.1 patch added. Later versions interpolate to the exact size, which changes every embedding a little.
    """
    side = int((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, side, side]
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = F.interpolate(grid.float(), scale_factor=scale, mode="bicubic", align_corners=False).to(positions.dtype)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def read_dinov2(source: str, config: PretrainedConfig) -> dict[str, Tensor]:
    """DINOv2's weights from its folder, under the names of the installed transformers."""
    folder = resolve_folder(strip_prefix(source))
    with outside_zero_init():
        model, info = Dinov2Model.from_pretrained(folder, config=config, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks weights of DINOv2: {', '.join(sorted(info['missing_keys'])[:4])}.")
    return model.state_dict()
