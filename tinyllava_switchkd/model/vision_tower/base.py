"""VisionTower: what every vision tower offers, TinyLLaVA v1's choice of features, and the towers' factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PretrainedConfig

from tinyllava_switchkd.registry import Registry, base_name

from ..llm import read_model_type
from ..processor import load_image_processor

SELECT_STRATEGIES = ("patch", "cls_patch")


class VisionTower(nn.Module):
    """Images -> visual tokens.

    A subclass builds the encoder in ``self._vision_tower`` and implements the methods that raise NotImplementedError.
    Its parameters' names are the checkpoint's keys (``vision_tower._vision_tower.*``), so that a state dict read from
    disk, a Trainer's resume and `from_pretrained` all agree without a renaming.

    Args:
        cfg: configuration of the encoder.
    """

    model_types: tuple[str, ...] = ()
    """``model_type`` of the configurations that this tower takes."""

    def __init__(self, cfg: PretrainedConfig) -> None:
        super().__init__()
        self._vision_tower: Any = None  # a library's encoder
        self._image_processor: BaseImageProcessor | None = None
        self.config = cfg

    @classmethod
    def load_config(cls, name: str, name2: str = "", cache_dir: str | None = None) -> PretrainedConfig:
        """Configuration of the encoder called `name` (prefix included), from its folder, library or the hub."""
        raise NotImplementedError

    @classmethod
    def is_complete(cls, config: PretrainedConfig) -> bool:
        """Whether a configuration suffices to build the tower, without `complete_config`."""
        return True

    @classmethod
    def complete_config(cls, config: PretrainedConfig, folder: Path | None, tensors: dict[str, Tensor]) -> None:
        """Fill in what a checkpoint's nested configuration leaves out, from its folder or its weights, in place.

        Args:
            config: the tower's configuration.
            folder: the checkpoint; None for a fresh model.
            tensors: the checkpoint's weights under v1's names.
        """

    @property
    def vision_tower(self) -> Any:
        """The encoder itself (v1's name), a module of some library."""
        return self._vision_tower

    @property
    def prefix_tokens(self) -> int:
        """Tokens that the strategy ``patch`` drops.

        v1 drops one whatever the encoder, so SigLIP, which has no class token, loses its first patch (729 -> 728
        tokens); every released checkpoint was trained so.
        """
        return 1

    @property
    def num_layers(self) -> int:
        """Layers of the encoder; it has one hidden state more (the embeddings)."""
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of a visual token."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Height and width of an input image in pixels."""
        return int(self.config.image_size)

    @property
    def total_tokens(self) -> int:
        """Tokens of a hidden state, class token included."""
        raise NotImplementedError

    @property
    def image_processor(self) -> BaseImageProcessor:
        """The encoder's image processor (PIL resampling: bit-exact with v1), built when first asked for."""
        if self._image_processor is None:
            self._image_processor = self.build_image_processor()
        return self._image_processor

    def build_image_processor(self) -> BaseImageProcessor:
        """The image processor beside the base model's files, on PIL, else that of the encoder's family.

        Checkpoints name their base models by paths that may not exist on this machine: those are passed over in
        silence, because the configuration suffices to build the latter.
        """
        name = strip_prefix(getattr(self.config, "model_name_or_path", "") or "")
        if name and (Path(name) / "preprocessor_config.json").is_file():
            return load_image_processor(name)
        return self.default_image_processor()

    def default_image_processor(self) -> BaseImageProcessor:
        """The processor of this encoder's family at the configuration's image size."""
        raise NotImplementedError

    def hidden_state(self, pixels: Tensor, num_layers: int) -> Tensor:
        """[I, 3, H, W] -> the output of the first `num_layers` layers, [I, total_tokens, width]."""
        raise NotImplementedError

    def base_state_dict(self, source: str, source2: str = "") -> dict[str, Tensor]:
        """Pretrained weights, under the names of ``self.vision_tower``.

        Args:
            source: the base model (prefix included), or a folder that the pre-training stage wrote.
            source2: the second base model of ``mof``.
        """
        raise NotImplementedError

    def restore_buffers(self) -> None:
        """Set buffers that no checkpoint stores, after the tower was built without memory (on the meta device).

        transformers does that for its own models; towers of other libraries take them from a newly built one.
        """

    def layer_count(self, vision_feature_layer: int) -> int:
        """Number of layers to run for ``hidden_states[vision_feature_layer]``.

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
        """Visual tokens of an image under a strategy."""
        return self.total_tokens - self._num_dropped(vision_feature_select_strategy)

    def _num_dropped(self, strategy: str) -> int:
        if strategy not in SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy is one of {', '.join(SELECT_STRATEGIES)}, not {strategy!r}."
            )
        return self.prefix_tokens if strategy == "patch" else 0

    def forward(
        self, x: Tensor, vision_feature_layer: int = -2, vision_feature_select_strategy: str = "patch"
    ) -> Tensor:
        """Visual tokens of images.

        Args:
            x: [I, 3, H, W] preprocessed images.
            vision_feature_layer: index into the hidden states; layers after it are not computed.
            vision_feature_select_strategy: ``patch`` or ``cls_patch``.

        Returns:
            [I, tokens, width].
        """
        dropped = self._num_dropped(vision_feature_select_strategy)
        return self.hidden_state(x, self.layer_count(vision_feature_layer))[:, dropped:]

    def freeze_unused(self, vision_feature_layer: int) -> int:
        """Freeze the parameters that no loss can reach (layers after the feature layer, pooling heads, mask tokens).

        Distributed data parallel refuses trainable parameters without a gradient; they stay in checkpoints. Which they
        are is read off the autograd graph of a twin without memory, so it holds for towers of any library.

        Returns:
            the number of parameters frozen.
        """
        try:
            unused = self._unused_parameters(vision_feature_layer, "meta")
        except (RuntimeError, NotImplementedError):  # an encoder that reads its own numbers needs some
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
        """Switch checkpointing of encoders that transformers does not manage; nothing to do for the others."""


class _TowerRegistry(Registry[type[VisionTower]]):
    """A prefix before ``:`` names the tower (``timm:vit_small_patch14_dinov2``); without one, the base name does."""

    def name_of(self, name: str | None) -> str:
        prefix = name.split(":", 1)[0] if isinstance(name, str) else ""
        return super().name_of(prefix if ":" in str(name) and prefix in self else name)


def _tower_of_model_type(name: str) -> str | None:
    model_type = read_model_type(name)
    return model_type and tower_name_of_type(model_type)


def tower_name_of_type(model_type: str) -> str | None:
    """Registered name of the tower that takes configurations of this ``model_type``."""
    for name in VisionTowerFactory.list():
        types = getattr(VisionTowerFactory(name), "model_types", ())
        if model_type in types or f"{model_type}_vision_model" in types:
            return name
    return None


VisionTowerFactory = _TowerRegistry("vision tower", fuzzy=True, fallback=_tower_of_model_type)
register_vision_tower = VisionTowerFactory.register


def resolve_vision_tower(name_or_path: str, vision_config: PretrainedConfig) -> type[VisionTower]:
    """The tower class for a checkpoint: by its name, unless the configuration is of another kind than that tower's."""
    error: ValueError | None = None
    known = (name_or_path.split(":", 1)[0] if ":" in name_or_path else base_name(name_or_path)).lower()
    # A name that says nothing would be looked up on the hub, in vain: the configuration is here.
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
    """``"mof:openai/clip"`` -> ``"openai/clip"``; a name without a prefix is returned as it is."""
    return name.rsplit(":", 1)[-1]


def flatten_images(images: Tensor | list[Tensor]) -> Tensor:
    """[I, 3, H, W] from a tensor of 4 or 5 dimensions (samples x images) or a list of images or of stacks of images.

    Raises:
        ValueError: images of different sizes, or not images at all.
    """
    if isinstance(images, Tensor):
        flat = images.flatten(0, 1) if images.dim() == 5 else images
    else:
        stacks = [image[None] if image.dim() == 3 else image for image in images]
        sizes = {tuple(stack.shape[-2:]) for stack in stacks}
        if len(sizes) != 1:
            raise ValueError(f"The images of a batch must have one size, got {sorted(sizes)}.")
        flat = torch.cat(stacks)
    if flat.dim() == 3:
        flat = flat[None]
    if flat.dim() != 4 or flat.shape[1] != 3:
        raise ValueError(f"Images are tensors of shape [images, 3, height, width], got {tuple(flat.shape)}.")
    return flat
