"""Writes folders of tiny, untrained base models in the layout of Qwen2.5 and SigLIP on the hub.

``scripts/train/*.sh`` accept their paths just like the names ``Qwen/Qwen2.5-0.5B`` and
``google/siglip-so400m-patch14-384``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tinyllava_switchkd.data.template import TemplateFactory
from tinyllava_switchkd.quickstart import scenes

SHIPPED = Path(__file__).parent / "shipped"
"""The three base models shipped with the project; `bases` made them."""

CONV_VERSION = "qwen2_base"
"""Conversation template of all trainings but the base tower's: that of Qwen's base models."""

END_OF_TEXT = "<|endoftext|>"
"""End-of-sequence and padding token, as in Qwen2's base models."""

_OPENERS = "The Describe What Where Is Yes No A B C D"
_WORDS = "the image digit digits is are there in a"

_POSITION_SCALE = 0.5
"""Standard deviation of the vision tower's position embedding. SigLIP's 1/sqrt(width) is too small beside the patches.
Captions in a fixed order never need a digit's position, so the embedding would be lost before a question needs it."""


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's tokenizer without merges: every word of the scenes is one token, all other text is one token per byte.

    The fixed sentences of LLaVA's prompts (the system prompt, and the two suffixes that ask for a format) are one token
    each, too. They say nothing about a scene, and would otherwise make the sequences four times as long.
    """
    system = TemplateFactory(CONV_VERSION)().system.apply().strip()
    sentences = [system, "USER:", scenes.SHORT_ANSWER.strip(), scenes.LETTER_ANSWER.strip()]
    # Words at a beginning absorb the white space before them; other words start with a space, as in Qwen
    tokens = [AddedToken(text, lstrip=True, rstrip=text == "USER:", normalized=False) for text in sentences]
    tokens += [AddedToken("ASSISTANT:", lstrip=True, normalized=False)]
    tokens += [AddedToken(word, lstrip=True, single_word=True, normalized=False) for word in _OPENERS.split()]
    words = [*_WORDS.split(), *scenes.POSITIONS, *scenes.COLOURS, *"0123456789"]
    tokens += [AddedToken(" " + word, normalized=False) for word in words]
    alphabet = [END_OF_TEXT, *bytes_to_unicode().values()]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(alphabet)},
        merges=[],
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=None,
        model_max_length=512,
    )
    tokenizer.add_tokens(tokens)
    return tokenizer


def write_llm(folder: Path, width: int, layers: int, seed: int = 0, padding: int = 0) -> None:
    """Write a random Qwen2 with its tokenizer, as a Hugging Face folder.

    Args:
        folder: output folder; its name should contain "qwen2", from which the LLM factory chooses the class.
        width: hidden size.
        layers: decoder layers.
        seed: seed of the weights.
        padding: vocabulary rows beyond the tokenizer's, as in larger Qwen2.5 models.
    """
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer) + padding,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # As in Qwen2.5. With few, slowly rotating dimensions, a question finds its cell by content. With theta 10,000
        # and four heads of a quarter of the width, base training took twice as long or failed.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=width**-0.5,  # Qwen2's 0.02 suits widths of 1000; here, nothing would learn
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_vision_tower(folder: Path, width: int = 64, layers: int = 2, seed: int = 0) -> None:
    """Write a random SigLIP vision tower (one token per cell) and its image processor, as a Hugging Face folder.

    Args:
        folder: output folder; its name should contain "siglip", from which the factory chooses the class.
        width: hidden size.
        layers: encoder layers.
        seed: seed of the weights.
    """
    config = SiglipVisionConfig(
        image_size=scenes.IMAGE_SIZE,
        patch_size=scenes.CELL_SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vision_use_head=False,  # a VLM does not use the pooling head
    )
    torch.manual_seed(seed)
    tower = SiglipVisionModel(config)
    with torch.no_grad():
        tower.get_parameter("embeddings.position_embedding.weight").normal_(std=_POSITION_SCALE)
    tower.save_pretrained(folder)
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    SiglipImageProcessor(size=size).save_pretrained(folder)
