"""Configurations of TinyLLaVABench, the code before TinyLLaVA v1 (``bczhou/TinyLLaVA-{1.5B,2.0B,3.1B}``)."""

from __future__ import annotations

from tinyllava_switchkd.io import JsonObject
from tinyllava_switchkd.model.configuration import TinyLlavaConfig

# Architecture -> language model, and the base model whose tokenizer and template it was trained with
# (v1, model/convert_legecy_weights_to_tinyllavafactory.py).
BENCH_LLMS = {
    "TinyLlavaLlamaForCausalLM": ("llama", "TinyLlama/TinyLlama-1.1B-chat-v1.0"),
    "TinyLlavaStablelmForCausalLM": ("stablelm", "stabilityai/stablelm-2-zephyr-1_6b"),
    "TinyLlavaPhiForCausalLM": ("phi", "microsoft/phi-2"),
}
# The vision tower of every released Bench model; their configurations only name its repository.
SIGLIP_SO400M = "google/siglip-so400m-patch14-384"
SIGLIP_SO400M_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


def is_bench_config(fields: JsonObject) -> bool:
    """Whether a ``config.json`` is TinyLLaVABench's: a flat dict of the language model's and ``mm_*`` fields."""
    return "mm_projector_type" in fields and fields.get("model_type") != TinyLlavaConfig.model_type


def config_from_bench(fields: JsonObject) -> TinyLlavaConfig:
    """Convert TinyLLaVABench's configuration to v1's.

    Raises:
        ValueError: v1's converter does not know the architecture either.
    """
    architecture = (fields.get("architectures") or ["none"])[0]
    if architecture not in BENCH_LLMS:
        raise ValueError(
            f"The checkpoint's architecture {architecture!r} is not TinyLLaVABench's ({', '.join(BENCH_LLMS)})."
        )
    model_type, llm = BENCH_LLMS[architecture]
    mine = ("architectures", "model_type", "auto_map", "image_aspect_ratio", "tokenizer_model_max_length")
    text = {name: value for name, value in fields.items() if not name.startswith("mm_") and name not in mine}
    tower = fields.get("mm_vision_tower") or SIGLIP_SO400M
    known = tower == SIGLIP_SO400M or tower.startswith("bczhou/")
    return TinyLlavaConfig(
        llm_model_name_or_path=llm,
        vision_model_name_or_path=SIGLIP_SO400M if known else tower,
        connector_type=fields["mm_projector_type"],
        text_config={**text, "model_type": model_type},
        vision_config=dict(SIGLIP_SO400M_CONFIG) if known else None,
        vision_feature_layer=fields.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=fields.get("mm_vision_select_feature", "patch"),
        image_aspect_ratio=fields.get("image_aspect_ratio", "square"),
        tokenizer_padding_side=fields.get("tokenizer_padding_side", "right"),
        tokenizer_model_max_length=fields.get("tokenizer_model_max_length", 2048),
        pad_token=fields.get("pad_token"),
    )
