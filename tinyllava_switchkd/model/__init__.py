"""The model: configuration, factories of its parts, the model itself, and its checkpoints."""

from .configuration import TinyLlavaConfig
from .connector import ConnectorFactory, register_connector
from .llm import LLMFactory, register_llm
from .modeling import TinyLlavaForConditionalGeneration
from .vision_tower import VisionTowerFactory, register_vision_tower

__all__ = [
    "ConnectorFactory",
    "LLMFactory",
    "TinyLlavaConfig",
    "TinyLlavaForConditionalGeneration",
    "VisionTowerFactory",
    "register_connector",
    "register_llm",
    "register_vision_tower",
]
