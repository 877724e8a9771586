"""transformers renames the argument and output `past_key_values` to `cache`; 5.40 removes the old name."""

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
"""The name of the cache, as an argument and in outputs, in the installed transformers."""


def with_cache(cache: Cache | None) -> dict[str, Cache]:
    """The keyword argument that passes a cache to a language model; empty for None."""
    return {} if cache is None else {CACHE: cache}


def cache_of(outputs: ModelOutput) -> Cache | None:
    """The cache in a language model's output, or None."""
    return outputs.get(CACHE)
