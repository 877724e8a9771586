"""Vision towers: `VisionTowerFactory` and its entries."""

from tinyllava_switchkd.model.vision_tower import mof, open_clip, timm, transformers_towers
from tinyllava_switchkd.model.vision_tower.base import (
    VisionTower,
    VisionTowerFactory,
    register_vision_tower,
    resolve_vision_tower,
)

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
