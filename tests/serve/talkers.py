"""Tiny chat models with random weights that generate only letters and spaces, at a chosen speed."""

from __future__ import annotations

import string
import time
from collections.abc import Iterable

import numpy as np
from PIL import Image

from tests.tiny import tiny_llava, tiny_tokenizer
from tinyllava_switchkd.serve.engine import ChatModel
from tinyllava_switchkd.serve.pool import ModelPool, Slot

CONTEXT = 512


def talker(name: str = "tiny", seed: int = 0, seconds_per_token: float = 0.0, **kwargs) -> ChatModel:
    """A `ChatModel` that never ends an answer by itself."""
    # Large weights give every prompt a different answer.
    kwargs = {"llm": "llama", "text": {"initializer_range": 0.4}, **kwargs}
    model, tokenizer = tiny_llava(seed=seed, vision={"image_size": 56}, **kwargs), tiny_tokenizer()
    spoken = set(tokenizer(string.ascii_lowercase + " ", add_special_tokens=False).input_ids)
    model.language_model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - spoken)
    if seconds_per_token:
        model.language_model.register_forward_pre_hook(lambda *_: time.sleep(seconds_per_token))
    return ChatModel(model, tokenizer, model.vision_tower.image_processor, CONTEXT, name, template="qwen2_base")


def pool_of(models: Iterable[ChatModel]) -> ModelPool:
    """A pool of loaded models."""
    return ModelPool([Slot(model.name, model=model) for model in models])


def picture(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A different image for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
