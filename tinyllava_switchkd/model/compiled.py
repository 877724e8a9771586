"""Generation with a static key-value cache and compiled decoding steps."""

from __future__ import annotations

from collections.abc import Callable

from transformers import CompileConfig, PreTrainedModel


def compile_generation(
    model: PreTrainedModel, max_length: int | None = None, mode: str = "default", backend: str | Callable = "inductor"
) -> PreTrainedModel:
    """Make `generate` use compiled decoding steps and a static cache; changes the model in place.

    The first answer waits for compilation. Prompts, with their images, are not compiled. This helps if a step is short
    and kernel launches dominate: small models on a GPU, one request at a time. The tokens are the same. Beam search
    needs the ordinary cache (``cache_implementation="dynamic"``).

    Args:
        model: a `TinyLlavaForConditionalGeneration`.
        max_length: positions in the cache, for prompt and answer; the configuration's context length if None. A longer
            request works too, after another compilation.
        mode: of torch.compile. ``reduce-overhead`` records CUDA graphs, which are faster still, but only the thread
            that recorded them may replay them.
        backend: of torch.compile.

    Returns:
        the model.
    """
    language_model = model.language_model
    config = CompileConfig(mode=mode, backend=backend)
    config._compile_all_devices = True  # transformers leaves the CPU out unless told so
    language_model.generation_config.cache_implementation = "static"
    language_model.generation_config.compile_config = config
    # transformers never makes a cache shorter than the previous one, so that from here on one shape fits every prompt.
    language_model._previous_max_cache_length = max_length or model.config.tokenizer_model_max_length
    return model
