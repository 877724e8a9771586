"""The implementation of `TinyLlavaForConditionalGeneration.chat`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from tinyllava_switchkd.data.image import ImagePreprocess
from tinyllava_switchkd.data.image_files import BadImageError, read_upright, upright
from tinyllava_switchkd.data.template import TemplateFactory
from tinyllava_switchkd.data.template.base import as_text, exchange, mark_first
from tinyllava_switchkd.data.text import TextPreprocess
from tinyllava_switchkd.model.layouts import image_processor_of, token_ids, tokenizer_of

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from tinyllava_switchkd.data.template.base import Message

logger = logging.getLogger(__name__)

Shown = Image.Image | str | Path
Images = Shown | list[Shown] | tuple[Shown, ...] | None

# Templates for checkpoints that do not name one, by language model (README of TinyLLaVA v1).
TEMPLATE_OF_LLM = {
    "qwen2": "qwen2_base",
    "qwen3": "qwen2_base",
    "phi": "phi",
    "phi3": "phi",
    "stablelm": "phi",
    "llama": "llama",
    "gemma": "gemma",
}


def conversation_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of a model's conversation template: the stored one, otherwise v1's for its language model.

    Raises:
        ValueError: neither is known.
    """
    if model.config.template:
        return model.config.template
    model_type = model.config.text_config.model_type
    template = TEMPLATE_OF_LLM.get(model_type)
    if template is None:
        raise ValueError(
            f"The checkpoint names no conversation template, and none is known for {model_type!r}; pass template."
        )
    if template == "qwen2_base" and tokenizer.eos_token == "<|im_end|>":
        template = "qwen2_instruct"
    logger.info("The checkpoint names no conversation template; using %r.", template)
    return template


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Tokens that end an answer: the checkpoint's, the tokenizer's, and the template's if it is one token.

    The checkpoint's are those of its ``config.json`` and ``generation_config.json``, see `open_checkpoint`.
    """
    end = TemplateFactory(template)().for_tokenizer(tokenizer).eos
    return token_ids(
        model.language_model.generation_config.eos_token_id,
        model.config.text_config.eos_token_id,
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids(end) if end in tokenizer.get_vocab() else None,
    )


def chat(
    model: PreTrainedModel,
    prompt: str,
    image: Images = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    history: Sequence[tuple[str, str]] = (),
    template: str | None = None,
    max_new_tokens: int = 512,
    **generate: Any,
) -> str:
    """Answer a question about an image (or several, or none).

    Args:
        model: a `TinyLlavaForConditionalGeneration`.
        prompt: the question.
        image: a PIL image or a path, or several; they belong to the first question, in order, with or without
            ``<image>`` in it. Each is turned upright as its EXIF data says.
        tokenizer: the model's own if None; read from its checkpoint if it is not loaded yet.
        image_processor: likewise.
        history: earlier (question, answer) pairs of this conversation.
        template: conversation template; the checkpoint's own if None.
        max_new_tokens: maximum length of the answer.
        generate: passed to `generate` (`do_sample`, `temperature`, `num_beams`, ...); greedy by default.

    Returns:
        the answer's text.

    Raises:
        ValueError: the model has no tokenizer and none is given, or a file is not an image.
        FileNotFoundError: an image does not exist.
    """
    if tokenizer is None and model.tokenizer is None:
        fetch_own(model)
    tokenizer = tokenizer or model.tokenizer
    if tokenizer is None:
        raise ValueError("The model has no tokenizer; pass one, or load the model with load_pretrained_model.")
    given = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
    images = [upright(item) if isinstance(item, Image.Image) else open_image(item) for item in given]
    template = template or conversation_template(model, tokenizer)
    text = TextPreprocess(tokenizer, template)
    messages: list[Message] = []
    for index, (question, answer) in enumerate([*history, (prompt, None)]):
        messages += exchange(as_text(question) if index else mark_first(question, len(images)), answer)
    encoded = text(messages, mode="eval", num_images=len(images))
    input_ids = encoded["input_ids"][None].to(model.device)  # [1, T]
    pixels = None
    if images:
        processor = image_processor or model.image_processor or model.vision_tower.image_processor
        preprocess = ImagePreprocess(processor, model.config)
        pixels = torch.stack([preprocess(item) for item in images])  # [I, 3, H, W]
    generate.setdefault("do_sample", False)
    if "generation_config" not in generate:
        generate.setdefault("eos_token_id", stop_token_ids(model, tokenizer, template) or None)
    new_ids = model.generate(
        input_ids,
        images=pixels,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        **generate,
    )
    return tokenizer.decode(new_ids[0], skip_special_tokens=True).strip()


def fetch_own(model: PreTrainedModel) -> None:
    """Load a model's tokenizer and image processor from its checkpoint; AutoModelForCausalLM does not."""
    if model.folder is not None:
        model.tokenizer = tokenizer_of(model.folder, model.config)
        model.image_processor = model.image_processor or image_processor_of(model.folder, model.vision_tower)


def open_image(path: str | Path) -> Image.Image:
    """Read an image file and turn it upright, see `read_upright`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"An image must be a PIL image or a path, not a {type(path).__name__}.")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no image {str(path)!r}.")
    try:
        return read_upright(file)  # as the demo and the terminal show it
    except BadImageError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}.") from None
