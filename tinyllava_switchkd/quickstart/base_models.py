"""Folders of tiny, untrained base models, in the shape in which Qwen2.5 and SigLIP come from the hub.

``scripts/train/*.sh`` take them by path exactly as they take ``Qwen/Qwen2.5-0.5B`` and
``google/siglip-so400m-patch14-384`` by name.
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

from . import scenes

SHIPPED = Path(__file__).parent / "shipped"
"""The three base models that come with the project, which `bases` made."""

CONV_VERSION = "qwen2_base"
"""Conversation template of every stage but pre-training: that of Qwen's base models."""

END_OF_TEXT = "<|endoftext|>"
"""End-of-sequence and padding token, as in Qwen2's base models."""

_OPENERS = "The Describe What Where Is Yes No A B C D"
_WORDS = "the image digit digits is are there in a"

_POSITION_SCALE = 0.5
"""Standard deviation of the vision tower's position embedding. SigLIP's own 1/sqrt(width) drowns in the patches, and
captions in a fixed order never ask the tower where a digit is, so it would be lost before a question does."""


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's tokenizer without its merges: every word of the scenes is one token, all other text goes byte by byte.

    The fixed sentences of LLaVA's prompts (the system prompt, the two suffixes that ask for a format) are one token
    each, too: they say nothing about a scene, and spelled out they would make the sequences four times as long.
    """
    system = TemplateFactory(CONV_VERSION)().system.apply().strip()
    sentences = [system, "USER:", scenes.SHORT_ANSWER.strip(), scenes.LETTER_ANSWER.strip()]
    # What stands at a beginning takes the white space before it; other words have their space in front, as in Qwen
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


def write_llm(folder: Path, width: int, layers: int, heads: int = 2, seed: int = 0, padding: int = 0) -> None:
    """Write a random Qwen2 with its tokenizer, as a Hugging Face folder.

    Args:
        folder: to write to; its name tells the LLM factory what it is, so "qwen2" should be in it.
        width: hidden size.
        layers: decoder layers.
        heads: attention heads, each with keys of its own.
        seed: of the weights.
        padding: rows of the vocabulary beyond the tokenizer's, as larger Qwen2.5 have them.
    """
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer) + padding,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        # Qwen2.5's. With few and slowly turning dimensions a question finds its cell by what is in it; at 10,000 and
        # with four heads of a quarter the width, base training took twice as long or missed it altogether.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=width**-0.5,  # Qwen2's 0.02 is for widths of 1000: at this one, nothing would ever move
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_vision_tower(folder: Path, width: int = 64, layers: int = 2, heads: int = 4, seed: int = 0) -> None:
    """Write a random SigLIP vision tower of one token a cell with its image processor, as a Hugging Face folder.

    Args:
        folder: to write to; its name tells the vision tower factory what it is, so "siglip" should be in it.
        width: hidden size.
        layers: encoder layers.
        heads: attention heads.
        seed: of the weights.
    """
    config = SiglipVisionConfig(
        image_size=scenes.IMAGE_SIZE,
        patch_size=scenes.CELL_SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vision_use_head=False,  # the pooling head has no part in a VLM
    )
    torch.manual_seed(seed)
    tower = SiglipVisionModel(config)
    with torch.no_grad():
        tower.get_parameter("embeddings.position_embedding.weight").normal_(std=_POSITION_SCALE)
    tower.save_pretrained(folder)
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    SiglipImageProcessor(size=size).save_pretrained(folder)
