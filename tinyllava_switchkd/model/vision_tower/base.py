"""VisionTower: the base class of vision towers, with TinyLLaVA v1's feature selection, and their factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PretrainedConfig

from tinyllava_switchkd.model.llm import read_model_type
from tinyllava_switchkd.model.processor import load_image_processor
from tinyllava_switchkd.registry import Registry, base_name

SELECT_STRATEGIES = ("patch", "cls_patch")


class VisionTower(nn.Module):
    """Images -> visual tokens.

    A subclass builds the encoder in ``self._vision_tower`` and implements the methods that raise NotImplementedError.
    The parameters' names are the checkpoint's keys (``vision_tower._vision_tower.*``), so nothing is ever renamed.

    Args:
        cfg: configuration of the encoder.
    """

    model_types: tuple[str, ...] = ()
    """``model_type`` of the configurations that this tower accepts."""

    def __init__(self, cfg: PretrainedConfig) -> None:
        super().__init__()
        self._vision_tower: Any = None  # a library's encoder
        self._image_processor: BaseImageProcessor | None = None
        self.config = cfg

    @classmethod
    def load_config(cls, name: str, name2: str = "", cache_dir: str | None = None) -> PretrainedConfig:
        """Configuration of the encoder `name` (prefix included), from its folder, its library or the hub."""
        raise NotImplementedError

    @classmethod
    def is_complete(cls, config: PretrainedConfig) -> bool:
        """Whether the tower can be built from a configuration without `complete_config`."""
        return True

    @classmethod
    def complete_config(cls, config: PretrainedConfig, folder: Path | None, tensors: dict[str, Tensor]) -> None:
        """Complete a checkpoint's nested configuration from its folder or its weights, in place.

        Args:
            config: the tower's configuration.
            folder: the checkpoint; None for a new model.
            tensors: the checkpoint's weights under v1's names.
        """

    @property
    def vision_tower(self) -> Any:
        """The encoder (v1's name), a module of transformers, timm or open_clip."""
        return self._vision_tower

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens that the strategy ``patch`` drops.

        v1 always drops one, so SigLIP, which has no class token, loses its first patch (729 -> 728 tokens). Every
        released checkpoint was trained this way.
        """
        return 1

    @property
    def num_layers(self) -> int:
        """Layers of the encoder; there is one more hidden state (the embeddings)."""
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of a visual token."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Height and width of the input in pixels."""
        return int(self.config.image_size)

    @property
    def total_tokens(self) -> int:
        """Tokens of a hidden state, class token included."""
        raise NotImplementedError

    @property
    def image_processor(self) -> BaseImageProcessor:
        """The encoder's image processor (PIL resampling, bit-exact with v1), built on first use."""
        if self._image_processor is None:
            self._image_processor = self.build_image_processor()
        return self._image_processor

    def build_image_processor(self) -> BaseImageProcessor:
        """The base model's image processor (PIL backend), or the default one if its folder does not exist here.

        Checkpoints may name base models by paths of another machine, so a missing folder is not an error.
        """
        name = strip_prefix(getattr(self.config, "model_name_or_path", "") or "")
        if name and (Path(name) / "preprocessor_config.json").is_file():
            return load_image_processor(name)
        return self.default_image_processor()

    def default_image_processor(self) -> BaseImageProcessor:
        """The default processor of this kind of encoder, at the configuration's image size."""
        raise NotImplementedError

    def hidden_state(self, pixels: Tensor, num_layers: int) -> Tensor:
        """[I, 3, H, W] -> the output of the first `num_layers` layers, [I, total_tokens, width]."""
        raise NotImplementedError

    def base_state_dict(self, source: str, source2: str = "") -> dict[str, Tensor]:
        """Pretrained weights under the names of ``self.vision_tower``.

        Args:
            source: the base model (prefix included), or a folder written by the pre-training stage.
            source2: the second base model of ``mof``.
        """
        raise NotImplementedError

    def restore_buffers(self) -> None:
        """Set the buffers that no checkpoint stores, after the tower was built on the meta device.

        transformers does this for its own models; towers of other libraries copy them from a newly built tower.
        """

    def layer_count(self, vision_feature_layer: int) -> int:
        """Number of layers to run to get ``hidden_states[vision_feature_layer]``.

        Raises:
            ValueError: there is no such hidden state.
        """
        states = self.num_layers + 1
        if not -states <= vision_feature_layer < states:
            raise ValueError(
                f"vision_feature_layer is {vision_feature_layer}, but the tower has {states} hidden states "
                f"(-{states} to {states - 1})."
            )
        return vision_feature_layer % states

    def num_tokens(self, vision_feature_select_strategy: str = "patch") -> int:
        """Visual tokens per image with the given strategy."""
        return self.total_tokens - self._num_dropped(vision_feature_select_strategy)

    def _num_dropped(self, strategy: str) -> int:
        if strategy not in SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy must be one of {', '.join(SELECT_STRATEGIES)}, not {strategy!r}."
            )
        return self.prefix_tokens if strategy == "patch" else 0

    def forward(
        self, x: Tensor, vision_feature_layer: int = -2, vision_feature_select_strategy: str = "patch"
    ) -> Tensor:
        """Compute the visual tokens of images.

        Args:
            x: [I, 3, H, W] preprocessed images.
            vision_feature_layer: index into the hidden states; later layers are not computed.
            vision_feature_select_strategy: ``patch`` or ``cls_patch``.

        Returns:
            [I, tokens, width].
        """
        dropped = self._num_dropped(vision_feature_select_strategy)
        return self.hidden_state(x, self.layer_count(vision_feature_layer))[:, dropped:]

    def freeze_unused(self, vision_feature_layer: int) -> int:
        """Freeze the parameters that no loss can reach (layers after the feature layer, pooling heads, mask tokens).

        Distributed data parallel refuses trainable parameters without a gradient. They stay in checkpoints. They are
        found by autograd on a copy of the tower on the meta device, which works for any library.

        Returns:
            the number of parameters frozen.
        """
        try:
            unused = self._unused_parameters(vision_feature_layer, "meta")
        except (RuntimeError, NotImplementedError):  # an encoder that reads values of its tensors
            unused = self._unused_parameters(vision_feature_layer, "cpu")
        frozen = 0
        for name, parameter in self.named_parameters():
            if name in unused:
                frozen += parameter.numel() if parameter.requires_grad else 0
                parameter.requires_grad_(False)
        return frozen

    def _unused_parameters(self, vision_feature_layer: int, device: str) -> set[str]:
        with torch.device(device), torch.enable_grad():
            twin = type(self)(self.config).requires_grad_(True)
            features = twin(torch.zeros(1, 3, self.image_size, self.image_size), vision_feature_layer)
        names, parameters = zip(*twin.named_parameters(), strict=True)
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        return {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """Switch gradient checkpointing of encoders that transformers does not manage."""


class _TowerRegistry(Registry[type[VisionTower]]):
    """Looks a tower up by its prefix before ``:`` (``timm:vit_small_patch14_dinov2``), otherwise by its base name."""

    def name_of(self, name: str | None) -> str:
        prefix = name.split(":", 1)[0] if isinstance(name, str) else ""
        return super().name_of(prefix if ":" in str(name) and prefix in self else name)


def _tower_of_model_type(name: str) -> str | None:
    model_type = read_model_type(name)
    return model_type and tower_name_of_type(model_type)


def tower_name_of_type(model_type: str) -> str | None:
    """Registered name of the tower that accepts configurations of this ``model_type``."""
    for name in VisionTowerFactory.list():
        types = getattr(VisionTowerFactory(name), "model_types", ())
        if model_type in types or f"{model_type}_vision_model" in types:
            return name
    return None


VisionTowerFactory = _TowerRegistry("vision tower", fuzzy=True, fallback=_tower_of_model_type)
register_vision_tower = VisionTowerFactory.register


def resolve_vision_tower(name_or_path: str, vision_config: PretrainedConfig) -> type[VisionTower]:
    """The tower class for a name, or for the type of `vision_config` if the named tower does not accept that."""
    error: ValueError | None = None
    known = (name_or_path.split(":", 1)[0] if ":" in name_or_path else base_name(name_or_path)).lower()
    # Use the name only if it contains a registered one; otherwise the registry would ask the hub, in vain.
    if any(entry in known for entry in VisionTowerFactory.list()):
        try:
            tower = VisionTowerFactory(name_or_path)
            if not tower.model_types or vision_config.model_type in tower.model_types:
                return tower
        except ValueError as unknown:
            error = unknown
    name = tower_name_of_type(vision_config.model_type)
    if name is None:
        raise error or ValueError(
            f"No registered vision tower takes a vision_config of type {vision_config.model_type!r}; "
            f"registered: {', '.join(VisionTowerFactory.list())}."
        )
    return VisionTowerFactory(name)


def strip_prefix(name: str) -> str:
    """``"mof:openai/clip"`` -> ``"openai/clip"``; a name without a prefix is unchanged."""
    return name.rsplit(":", 1)[-1]


def flatten_images(images: Tensor | list[Tensor]) -> Tensor:
    """[I, 3, H, W] from a 4- or 5-dimensional tensor (samples x images), or a list of images or stacks of images.

    Raises:
        ValueError: the images differ in size, or are not images.
    """
    if isinstance(images, Tensor):
        flat = images.flatten(0, 1) if images.dim() == 5 else images
    else:
        stacks = [image[None] if image.dim() == 3 else image for image in images]
        sizes = {tuple(stack.shape[-2:]) for stack in stacks}
        if len(sizes) != 1:
            raise ValueError(f"The images of a batch must have the same size, got {sorted(sizes)}.")
        flat = torch.cat(stacks)
    if flat.dim() == 3:
        flat = flat[None]
    if flat.dim() != 4 or flat.shape[1] != 3:
        raise ValueError(f"Images must be tensors of shape [images, 3, height, width], got {tuple(flat.shape)}.")
    return flat
