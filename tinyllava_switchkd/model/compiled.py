"""Generation at one shape: a static key-value cache, and a decoding step that torch.compile has made of it."""

from __future__ import annotations

from collections.abc import Callable

from transformers import CompileConfig, PreTrainedModel


def compile_generation(
    model: PreTrainedModel, max_length: int | None = None, mode: str = "default", backend: str | Callable = "inductor"
) -> PreTrainedModel:
    """Make `generate` run compiled decoding steps over a static cache, in place.

    The first answer waits for the compiler; the prompt of each (with its image) runs as before. It helps where a step
    is short and its launches count: small models on a GPU, one request at a time. The tokens are the same; beam search
    needs the ordinary cache (``cache_implementation="dynamic"``).

    Args:
        model: a `TinyLlavaForConditionalGeneration`.
        max_length: positions of the cache, prompt and answer; the configuration's own context length if None. A longer
            request is served too, after another compilation.
        mode: torch.compile's. ``reduce-overhead`` records CUDA graphs, which are faster still, but may only be replayed
            by the thread that recorded them.
        backend: torch.compile's.

    Returns:
        the model.
    """
    language_model = model.language_model
    config = CompileConfig(mode=mode, backend=backend)
    config._compile_all_devices = True  # transformers leaves the CPU out unless told so
    language_model.generation_config.cache_implementation = "static"
    language_model.generation_config.compile_config = config
    # transformers never makes a cache shorter than the longest before: started here, one shape serves every prompt.
    language_model._previous_max_cache_length = max_length or model.config.tokenizer_model_max_length
    return model
