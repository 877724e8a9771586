"""Vision towers: `VisionTowerFactory` and its entries."""

from __future__ import annotations

from transformers import PretrainedConfig

from tinyllava_switchkd.registry import Registry, base_name

from ..llm import read_model_type


class _TowerRegistry(Registry["type[VisionTower]"]):
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


from . import mof, open_clip, timm, transformers_towers  # noqa: E402 (the entries need the decorator above)
from .base import VisionTower  # noqa: E402

__all__ = [
    "VisionTower",
    "VisionTowerFactory",
    "mof",
    "open_clip",
    "register_vision_tower",
    "resolve_vision_tower",
    "timm",
    "transformers_towers",
]
