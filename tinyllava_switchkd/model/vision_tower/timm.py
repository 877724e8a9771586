"""Vision towers from timm: ``timm:NAME`` with any NAME that `timm.create_model` takes.

Examples: ``timm:vit_small_patch14_dinov2.lvd142m``, ``timm:hf-hub:org/name``, ``timm:local-dir:folder``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, BaseImageProcessor, PretrainedConfig

from tinyllava_switchkd.io import JsonObject, read_json
from tinyllava_switchkd.model.trust import refuse_code
from tinyllava_switchkd.model.vision_tower.base import VisionTower, register_vision_tower
from tinyllava_switchkd.model.vision_tower.transformers_towers import clip_image_processor
from tinyllava_switchkd.model.weights import read_weights

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


class LibraryVisionConfig(PretrainedConfig):
    """Configuration fields that towers of timm and open_clip share.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of a token in pixels.
        hidden_size: width of the last layer's tokens.
        num_hidden_layers: blocks of a transformer, stages of a convolutional network.
        num_prefix_tokens: class and register tokens before the patches.
        image_mean, image_std: normalisation; the library's usual one if None.
        interpolation: how images are resized.
    """

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_prefix_tokens: int = 0
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    interpolation: str = "bicubic"
    usual_mean: ClassVar = (0.5, 0.5, 0.5)
    usual_std: ClassVar = (0.5, 0.5, 0.5)

    def __post_init__(self, **kwargs: object) -> None:
        self.image_mean = list(self.image_mean or self.usual_mean)
        self.image_std = list(self.image_std or self.usual_std)
        super().__post_init__(**kwargs)


class TimmVisionConfig(LibraryVisionConfig):
    """Configuration of a timm model, from which it is built without the hub.

    Args:
        architecture: timm's name, without a pretrained tag.
        model_args: arguments for `timm.create_model`.
    """

    model_type = "timm_vision_tower"
    architecture: str = ""
    model_args: JsonObject | None = None

    def __post_init__(self, **kwargs: object) -> None:
        self.model_args = self.model_args or {}
        super().__post_init__(**kwargs)


AutoConfig.register(TimmVisionConfig.model_type, TimmVisionConfig, exist_ok=True)


class LibraryTower(VisionTower):
    """Base class of timm's and open_clip's towers. Strategy ``patch`` drops the class and register tokens, if any."""

    @property
    def prefix_tokens(self) -> int:
        return self.config.num_prefix_tokens

    @property
    def total_tokens(self) -> int:
        return (self.image_size // self.config.patch_size) ** 2 + self.config.num_prefix_tokens

    def default_image_processor(self) -> BaseImageProcessor:
        """Shortest side to the image size, then centre crop. timm's margin would cut off answers at the edge."""
        cfg = self.config
        return clip_image_processor(
            self.image_size,
            image_mean=list(cfg.image_mean),
            image_std=list(cfg.image_std),
            resample=RESAMPLE.get(cfg.interpolation, RESAMPLE["bicubic"]),
        )

    def base_state_dict(self, source: str, source2: str = "") -> dict[str, Tensor]:
        if Path(source).is_dir():  # written by the pre-training stage
            return read_weights(Path(source)) or {}
        return self.pretrained_state_dict(source)

    def pretrained_state_dict(self, source: str) -> dict[str, Tensor]:
        """The library's pretrained weights."""
        raise NotImplementedError

    def restore_buffers(self) -> None:
        named = {
            f"{name}.{buffer}" if name else buffer
            for name, module in self._vision_tower.named_modules()
            for buffer in module._non_persistent_buffers_set
        }
        if named:
            fresh = dict(type(self)(self.config).vision_tower.named_buffers())
            for name, buffer in self._vision_tower.named_buffers():
                if name in named:
                    buffer.copy_(fresh[name])

    def set_gradient_checkpointing(self, enable: bool) -> None:
        self._vision_tower.set_grad_checkpointing(enable)


@register_vision_tower("timm")
class TimmVisionTower(LibraryTower):
    """Any timm model with `forward_intermediates`: a vision transformer, or a convolutional network and its stages."""

    model_types = (TimmVisionConfig.model_type,)

    def __init__(self, cfg: PretrainedConfig) -> None:
        super().__init__(cfg)
        self._vision_tower = create(cfg.architecture, cfg.model_args)
        keep_initialisation(self._vision_tower)
        forward_by(self._vision_tower, intermediate)

    @classmethod
    def load_config(cls, name: str, name2: str = "", cache_dir: str | None = None) -> PretrainedConfig:
        name = name.split(":", 1)[-1]
        model_args = model_args_of(name)
        with torch.device("meta"):
            model = create(name, model_args)
        cfg = model.pretrained_cfg
        image_size = model_args.get("img_size") or cfg["input_size"][-1]
        return TimmVisionConfig(
            architecture=cfg["architecture"],
            model_args=model_args,
            image_size=image_size[0] if isinstance(image_size, (tuple, list)) else image_size,
            image_mean=list(cfg["mean"]),
            image_std=list(cfg["std"]),
            interpolation=cfg.get("interpolation", "bicubic"),
            **geometry(model),
        )

    def layer_count(self, vision_feature_layer: int) -> int:
        layers = super().layer_count(vision_feature_layer)
        widths = [info["num_chs"] for info in self._vision_tower.feature_info]
        if layers == 0 or widths[layers - 1] != self.config.hidden_size:
            usable = [index + 1 for index, width in enumerate(widths) if width == self.config.hidden_size]
            raise ValueError(
                f"vision_feature_layer {vision_feature_layer} of timm's {self.config.architecture} has another width "
                f"than the last; choose one of {usable}, or -1."
            )
        return layers

    def hidden_state(self, pixels: Tensor, num_layers: int) -> Tensor:
        return self._vision_tower(pixels, num_layers)

    def pretrained_state_dict(self, source: str) -> dict[str, Tensor]:
        import timm

        model = timm.create_model(source.split(":", 1)[-1], pretrained=True, num_classes=0, **self.config.model_args)
        return model.state_dict()


def create(name: str, model_args: JsonObject) -> Any:
    """timm's model with random weights and no classifier.

    Raises:
        ValueError: timm does not know it, or it has no intermediate features.
    """
    import timm

    try:
        # For a folder or repository, timm reads the same arguments itself.
        model = timm.create_model(name, pretrained=False, num_classes=0, **model_args)
    except (RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"timm has no model {name!r}: {error}.") from error
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"timm's {name!r} has no intermediate features and cannot be a vision tower.")
    return model


def model_args_of(name: str) -> JsonObject:
    """The model arguments stored in a repository or folder of timm."""
    if name.startswith("local-dir:"):
        file = Path(name.removeprefix("local-dir:")) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"timm's folder {str(file.parent)!r} has no config.json.")
        refuse_code(file.parent)
        return read_json(file).get("model_args") or {}
    if name.startswith(("hf-hub:", "hf_hub:")):
        from timm.models import load_model_config_from_hf

        return load_model_config_from_hf(name.split(":", 1)[1])[2] or {}
    return {}


def geometry(model: Any) -> dict[str, int]:
    """Configuration fields of a timm model."""
    last = model.feature_info[-1]
    return {
        "hidden_size": last["num_chs"],
        "patch_size": last["reduction"],
        "num_hidden_layers": len(list(model.feature_info)),
        "num_prefix_tokens": getattr(model, "num_prefix_tokens", 0),
    }


def intermediate(model: Any, pixels: Tensor, num_layers: int) -> Tensor:
    """[I, 3, H, W] -> the output of a timm model's first `num_layers` layers, [I, prefix + patches, width]."""
    wants_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    kwargs = {"return_prefix_tokens": True} if wants_prefix else {}
    output = model.forward_intermediates(
        pixels, indices=[num_layers - 1], stop_early=True, intermediates_only=True, output_fmt="NCHW", **kwargs
    )[0]
    grid, prefix = output if isinstance(output, tuple) else (output, None)  # [I, D, h, w], [I, P, D]
    patches = grid.flatten(2).transpose(1, 2)  # [I, h*w, D]
    return patches if prefix is None else torch.cat([prefix, patches], dim=1)


def forward_by(model: Any, function: Callable[[Any, Tensor, int], Tensor]) -> None:
    """Make ``model(pixels, num_layers)`` run `function`.

    Without calling the module itself, its hooks would not run, and ZeRO-3 would not gather its own parameters (class
    token, positions).
    """
    model.forward = partial(function, model)


def keep_initialisation(model: Any) -> None:
    """Tell transformers not to initialise modules that their library has already initialised."""
    for module in model.modules():
        module._is_hf_initialized = True
