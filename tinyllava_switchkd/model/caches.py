"""transformers renamed the argument and the output `past_key_values` to `cache`; its old name goes in 5.40."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from transformers import Cache, GenerationMixin

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What the language models of the installed transformers call their cache, as an argument and in their outputs."""


def with_cache(cache: Cache | None) -> dict[str, Cache]:
    """The keyword argument that hands a cache to a language model; nothing without one."""
    return {} if cache is None else {CACHE: cache}


def cache_of(outputs: ModelOutput) -> Cache | None:
    """The cache in a language model's output; None without one."""
    return outputs.get(CACHE)
