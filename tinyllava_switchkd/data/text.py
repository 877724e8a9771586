"""Conversations to token ids, and the list of messages that a conversation is kept in."""

from __future__ import annotations

import base64
import copy
import inspect
from collections.abc import Collection, Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from tinyllava_switchkd.constants import DEFAULT_IMAGE_TOKEN
from tinyllava_switchkd.data.template import TemplateFactory, check_template

_PREVIEW_LONG_SIDE, _PREVIEW_SHORT_SIDE = 800, 400


def template_of(data_args: Any) -> str:
    """Name of the conversation template in data arguments: ``template``, or by v1's name ``conv_version``."""
    return getattr(data_args, "template", None) or data_args.conv_version


class TextPreprocess:
    """Encodes conversations with one template (TinyLLaVA v1, ``data/text_preprocess.py``).

    Args:
        tokenizer: the language model's tokenizer.
        template: name of a conversation template, see `TemplateFactory`.
        eos_token_ids: the ids that generation stops at, the tokenizer's eos if None; see `check_template`.
    """

    def __init__(self, tokenizer: Any, template: str, eos_token_ids: int | Collection[int] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template_name = template
        self.eos_token_ids = eos_token_ids
        self.template = TemplateFactory(template)()
        self._checked = False
        # A third party's template may have v1's encode(messages, tokenizer, mode).
        self._counts_images = "num_images" in inspect.signature(self.template.encode).parameters

    @property
    def version(self) -> str:
        """v1's word for `template_name`."""
        return self.template_name

    def __call__(
        self, messages: Sequence[dict[str, Any]], mode: str = "train", num_images: int | None = None
    ) -> dict[str, Any]:
        """Encode a conversation.

        Args:
            messages: ``{"from": "human" | "gpt", "value": text}`` in turn.
            mode: "train" for labels, "eval" for the text up to the answer that is to be generated (its value None).
            num_images: images the conversation comes with; see `Template.encode`.

        Returns:
            ``{"input_ids": [T], "labels": [T]}`` or, for "eval", ``{"input_ids": [T], "prompt": text}``.

        Raises:
            ValueError: the template does not fit the tokenizer ("train" only: nothing else has an end to learn), or
                the conversation does not fit the template.
        """
        if mode == "train" and not self._checked:
            check_template(self.tokenizer, self.template_name, self.eos_token_ids)
            self._checked = True
        if self._counts_images:
            return self.template.encode(messages, self.tokenizer, mode, num_images=num_images)
        return self.template.encode(messages, self.tokenizer, mode)


class Message:
    """A conversation in the making, with its images (TinyLLaVA v1, ``utils/message.py``).

    Args:
        msg: messages to begin with; they are copied.
    """

    def __init__(self, msg: Sequence[dict[str, Any]] | None = None) -> None:
        self._messages: list[dict[str, Any]] = copy.deepcopy(list(msg)) if msg else []
        self._images: list[tuple[Image.Image, int]] = []

    def add_message(self, question: str, answer: str | None = None) -> None:
        """Add a question and its answer, None while there is none."""
        self._messages.append({"from": "human", "value": question})
        self._messages.append({"from": "gpt", "value": answer})

    def add_image(self, image: Image.Image, index: int = 0) -> None:
        """Add an image to the message at `index`."""
        self._images.append((image, index))

    @property
    def images(self) -> list[tuple[Image.Image, int]]:
        """Images and the indices of the messages they belong to."""
        return self._images

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages, to be handed to `TextPreprocess`."""
        return self._messages

    def copy(self) -> Message:
        """A conversation that goes its own way (v1's shared its list with the original)."""
        other = Message(self._messages)
        other._images = list(self._images)
        return other

    def to_gradio_chatbot(self) -> list[dict[str, str]]:
        """The conversation as Gradio 6 wants it: a ``{"role", "content"}`` a turn, an image being a turn of its own."""
        turns = []
        for index, message in enumerate(self._messages):
            role = "user" if message["from"] in ("human", "user") else "assistant"
            for image, place in self._images:
                if place == index:
                    turns.append({"role": role, "content": _image_as_html(image)})
            if message["value"] is not None:
                turns.append({"role": role, "content": message["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()})
        return turns


def _image_as_html(image: Image.Image) -> str:
    """A preview of the image, inlined."""
    preview = image.convert("RGB")
    scale = min(1.0, _PREVIEW_LONG_SIDE / max(image.size), _PREVIEW_SHORT_SIDE / min(image.size))
    preview = preview.resize(tuple(max(1, round(side * scale)) for side in image.size))
    buffer = BytesIO()
    preview.save(buffer, format="JPEG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="image of the user">'
