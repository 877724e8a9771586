"""Tiny random models, tokenizers and base folders for tests (a model has about 50,000 parameters)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from tinyllava_switchkd.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration

IMAGE_SIZE, PATCH_SIZE = 28, 7  # 16 patches

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TOKENIZERS = {
    "qwen2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "qwen2_instruct": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "phi": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<unk>", "unk_token": "<unk>"},
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", "<s>", "</s>", "<bos>", "<eos>"]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def tiny_tokenizer(style: str = "qwen2", model_max_length: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes, then `SPECIAL_TOKENS`; every style has the same ids.

    Args:
        style: a key of `TOKENIZERS`; llama and gemma add their BOS token, as their real tokenizers do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    roles = TOKENIZERS[style]
    if "bos_token" in roles:
        from tokenizers.processors import TemplateProcessing

        bos = roles["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=model_max_length, clean_up_tokenization_spaces=False, **roles
    )
    fast.chat_template = CHATML
    return fast


def tiny_text_config(
    llm: str = "qwen2", vocab: int = VOCAB_SIZE, hidden: int = 32, layers: int = 2, **kwargs: Any
) -> Any:
    """Configuration of a tiny language model; `llm` is a transformers model type."""
    fields = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if llm == "phi" else 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "tie_word_embeddings": llm in ("qwen2", "qwen3", "gemma"),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if llm in ("qwen3", "gemma", "llama"):
        fields["head_dim"] = hidden // 4
    return CONFIG_MAPPING[llm](**{**fields, **kwargs})


def tiny_vision_config(
    tower: str = "siglip", hidden: int = 32, layers: int = 3, image_size: int = IMAGE_SIZE, **kwargs: Any
) -> Any:
    """Configuration of a tiny vision encoder: siglip, siglip2 (NaFlex), clip, dinov2, mof, timm or open_clip."""
    if tower == "mof":
        config = tiny_vision_config("clip", hidden, layers, image_size, **kwargs)
        config.dinov2_config = tiny_vision_config("dinov2", hidden, layers, image_size).to_diff_dict()
        return config
    if tower == "timm":
        from tinyllava_switchkd.model.vision_tower import VisionTowerFactory

        return VisionTowerFactory("timm:test_vit").load_config("timm:test_vit")
    if tower == "open_clip":
        size = {"image_size": image_size, "patch_size": PATCH_SIZE}
        vision = {**size, "width": hidden, "layers": layers, "head_width": hidden // 4}
        return CONFIG_MAPPING["open_clip_vision_tower"](
            vision_cfg=vision, embed_dim=16, hidden_size=hidden, num_hidden_layers=layers, **size
        )
    fields = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "patch_size": PATCH_SIZE}
    if tower == "dinov2":
        fields |= {"image_size": image_size, "mlp_ratio": 2}
        return CONFIG_MAPPING["dinov2"](**{**fields, **kwargs})
    fields |= {"intermediate_size": 2 * hidden}
    if tower == "siglip2":
        fields |= {"num_patches": (image_size // PATCH_SIZE) ** 2}
    else:
        fields |= {"image_size": image_size}
    return CONFIG_MAPPING[f"{tower}_vision_model"](**{**fields, **kwargs})


def tiny_config(
    llm: str = "qwen2",
    tower: str = "siglip",
    connector: str = "mlp2x_gelu",
    vocab: int = VOCAB_SIZE,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **kwargs: Any,
) -> TinyLlavaConfig:
    """Configuration of a tiny TinyLLaVA; `text` and `vision` go to the parts, `kwargs` to `TinyLlavaConfig`."""
    fields = {
        "llm_model_name_or_path": f"{llm}-tiny",
        "vision_model_name_or_path": f"{tower}:tiny" if tower in ("mof", "timm", "open_clip") else f"{tower}-tiny",
        "connector_type": connector,
        "num_queries": 4,
        "num_resampler_layers": 2,
        "resampler_hidden_size": 32,
        "tokenizer_model_max_length": 512,
    }
    return TinyLlavaConfig(
        text_config=tiny_text_config(llm, vocab, **(text or {})),
        vision_config=tiny_vision_config(tower, **(vision or {})),
        **{**fields, **kwargs},
    )


def tiny_llava(
    llm: str = "qwen2",
    tower: str = "siglip",
    connector: str = "mlp2x_gelu",
    vocab: int = VOCAB_SIZE,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **kwargs: Any,
) -> TinyLlavaForConditionalGeneration:
    """A tiny random model in eval mode; arguments as in `tiny_config`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyLlavaForConditionalGeneration(
            tiny_config(llm, tower, connector, vocab, text, vision, **kwargs)
        ).eval()


def write_tiny_llm(
    folder: str | Path, llm: str = "qwen2", style: str | None = None, seed: int = 0, **kwargs: Any
) -> str:
    """A base language model on disk (weights, configuration, tokenizer); returns the folder as a string.

    Args:
        style: the tokenizer, see `tiny_tokenizer`; by default the language model's.
        kwargs: for `tiny_text_config`.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer(style or (llm if llm in TOKENIZERS else "qwen2"))
    kwargs.setdefault("eos_token_id", tokenizer.eos_token_id)
    config = tiny_text_config(llm, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_tiny_tower(folder: str | Path, tower: str = "siglip", seed: int = 0, **kwargs: Any) -> str:
    """A base vision encoder on disk (weights, configuration, image processor); returns the folder as a string.

    Args:
        kwargs: for `tiny_vision_config`.
    """
    from transformers import AutoModel

    from tinyllava_switchkd.model.vision_tower import VisionTowerFactory

    config = tiny_vision_config(tower, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModel.from_config(config).save_pretrained(folder)
    VisionTowerFactory(tower)(config).default_image_processor().save_pretrained(folder)
    return str(folder)
